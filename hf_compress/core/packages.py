"""Optional packages: imported when they are first needed; absent or broken, they cost nothing else."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import BackendError, first_line

EXTRAS = {"bitsandbytes": "bnb", "torchao": "torchao", "matplotlib": "eval", "peft": "lora"}
"""The extra of this package that installs each."""

IMPORT_ERRORS = (
    *(ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, NameError),
    *(AssertionError, SyntaxError, SystemError, ArithmeticError),
)
"""What packages that don't fit the machine raise while they are imported."""


def require(module: str) -> ModuleType:
    """Import an optional package, or a module of one.

    Args:
        module: Its import name.

    Raises:
        BackendError: It is not installed, or is broken; says how to install it and why it failed.
    """
    package = module.partition(".")[0]
    command = f'pip install "hf-compress[{EXTRAS.get(package, package)}]"'
    try:
        return importlib.import_module(module)
    except IMPORT_ERRORS as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise BackendError(f"The package {package!r} is not installed.", command) from error
        raise BackendError(
            f"The package {package!r} is installed but broken: {type(error).__name__}: {first_line(error)}.",
            f"{command} --force-reinstall",
        ) from error
