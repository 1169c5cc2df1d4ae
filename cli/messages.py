"""What the library reports while it works, on standard error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Line(logging.Formatter):
    """The message alone; warnings say that they are one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def messages() -> Iterator[None]:
    """Show what the logger `coeft` says, for as long as a command runs."""
    logger, handler = logging.getLogger("coeft"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
