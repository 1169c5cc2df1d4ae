"""Every test runs offline, on one thread, with a data cache of its own."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for subprocesses
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True, scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own cache stays out of the tests."""
    os.environ["COEFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
