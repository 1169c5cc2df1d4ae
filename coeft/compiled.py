"""trainer.compile: the blocks of a model as code that torch.compile makes.

Block by block, not the model as a whole: the blocks of a transformer are alike, so that code is made once for all of
them, and what is done to a model outside of its blocks (heads, generation, kept features) stays as it is.
"""

import contextlib
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from coeft.backbones._backbone import Backbone
from coeft.errors import UserError

BACKEND = "inductor"
VARIANTS = 64
"""Most forms of a block that are compiled: training and evaluation, sizes of batches, blocks with other adapters."""


def check() -> None:
    """Whether torch.compile can make code here, before anything is trained.

    Raises:
        UserError: there is no C++ compiler, or no header of Python.
    """
    if BACKEND != "inductor":
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"trainer.compile=true needs a C++ compiler, and there is no {compiler}: install one (Debian: g++), name "
            "another in the environment variable CXX, or leave trainer.compile out"
        )
    if not torch.cuda.is_available() and not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise UserError(
            "trainer.compile=true needs Python's headers (Python.h): install them (Debian: python3-dev), or leave "
            "trainer.compile out"
        )


def compile_blocks(backbone: Backbone) -> None:
    """Let torch compile every block at its first call, or the whole model where it has no blocks; in place."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in [backbone.model.get_submodule(name) for name in backbone.blocks] or [backbone.model]:
        block.compile(backend=BACKEND)


def eagerly(compiled: bool) -> AbstractContextManager[None]:
    """A context in which nothing is compiled, for what has another shape at every call, such as generation."""
    if not compiled:
        return contextlib.nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
