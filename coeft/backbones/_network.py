"""Asking a network that may not be there."""

import threading
from collections.abc import Callable
from typing import TypeVar

NETWORK_SECONDS = 5.0  # without a network the answer must come within ten seconds, imports included

T = TypeVar("T")


def in_time(call: Callable[[], T], seconds: float = NETWORK_SECONDS + 1) -> T:
    """call(), or TimeoutError: looking up a name has no time limit of its own, and may block for a minute."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # handed to the caller below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    result, problem = outcome[0]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]
