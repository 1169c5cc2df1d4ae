"""The one exception for a user's mistake, and the nearest valid names for a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's input is wrong: a config, path, data or adapter. The command line prints it and exits with 2.

    The text says what is wrong, where (file, key, row) and what would be right.
    """


def near(word: str, names: Iterable[str]) -> str:
    """A hint for a wrong name: the closest valid ones, or the first twenty of all there are."""
    names = sorted(names)
    close = get_close_matches(word, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"there are {listed}" if names else "there are none"
