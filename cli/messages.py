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


class _Stderr(logging.StreamHandler):
    """Writes to what standard error is at the time: a progress bar puts itself there, so that lines stay above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
def messages() -> Iterator[None]:
    """Show what the logger `coeft` says, for as long as a command runs."""
    logger, handler = logging.getLogger("coeft"), _Stderr()
    handler.setFormatter(_Line())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
