"""Arguments of the commands: argparse, with a wrong argument as a UserError, and typed values as Hydra reads them."""

import argparse
import re
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
