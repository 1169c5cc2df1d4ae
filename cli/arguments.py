"""Arguments of the commands: argparse, with a wrong argument as a UserError, and typed values as Hydra reads them."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from coeft.errors import UserError, near


class Parser(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            f"coeft {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

        self._command = command

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument .*: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            names = [name.strip(" '") for name in choice[2].split(",")]
            raise UserError(f"{self._command}: no {choice[1]!r}; {near(choice[1], names)}")
        unknown = re.fullmatch(r"unrecognized arguments: (-[^ =]+)(.*)", message, re.DOTALL)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(f"{self._command}: no flag {unknown[1]}; {near(unknown[1], flags)}")
        raise UserError(f"{self._command}: {message}; see {self.prog} --help")


def write_rows(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print rows in columns; those at the positions `right` end at the same place."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
