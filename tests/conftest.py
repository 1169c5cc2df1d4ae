"""Every test runs offline, on one thread, with a data cache of its own."""

import os
import signal

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses
os.environ.setdefault("WANDB_MODE", "offline")
# A shell that starts something in the background lets it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own cache stays out of the tests."""
    os.environ["COEFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
