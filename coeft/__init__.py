"""coeft: parameter-efficient fine-tuning with Coeff-Tuning.

Importing this package is quick; what needs torch is imported when it is touched.
"""

from importlib import import_module
from typing import Any

# attribute -> the module that defines it
_LAZY = {
    "load_adapter": "coeft.adapter_io",
    "coeff_attention": "coeft.attention.functional",
    "CoeffConfig": "coeft.peft",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("coeft")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'coeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "__version__"])
