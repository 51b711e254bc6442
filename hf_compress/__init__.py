"""Compress any Hugging Face model, prove what it cost, ship it anywhere.

Importing this package registers one quantizer with transformers, so that `from_pretrained` understands the
configurations below. Everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .integrations.transformers import register as _register

if TYPE_CHECKING:
    from .checkpoint.save import load, save, verify
    from .core.config import Calibration, QuantConfig, Rule
    from .core.errors import HFCompressError
    from .core.plan import Plan
    from .evaluation.comparison import Comparison
    from .evaluation.report import Report, evaluate
    from .methods.autoround import AutoRoundQuantConfig
    from .methods.awq import AWQQuantConfig
    from .methods.cast import CastConfig
    from .methods.codebook import CodebookQuantConfig
    from .methods.gptq import GPTQQuantConfig
    from .methods.hqq import HQQQuantConfig
    from .methods.int8_dynamic import Int8DynamicQuantConfig
    from .methods.int8_static import Int8StaticQuantConfig
    from .methods.rtn import RTNQuantConfig
    from .pipeline.compare import compare
    from .pipeline.compress import compress
    from .pipeline.inspect import inspect
    from .pipeline.optimize import optimize_for_inference
    from .pipeline.planning import plan
    from .pipeline.preflight import preflight
    from .pipeline.quantize import quantize
    from .pipeline.recipes import load_config
    from .pipeline.smooth import smooth

_WHERE = {
    "AutoRoundQuantConfig": "methods.autoround",
    "AWQQuantConfig": "methods.awq",
    "Calibration": "core.config",
    "CastConfig": "methods.cast",
    "CodebookQuantConfig": "methods.codebook",
    "Comparison": "evaluation.comparison",
    "HFCompressError": "core.errors",
    "GPTQQuantConfig": "methods.gptq",
    "HQQQuantConfig": "methods.hqq",
    "Int8DynamicQuantConfig": "methods.int8_dynamic",
    "Int8StaticQuantConfig": "methods.int8_static",
    "Plan": "core.plan",
    "QuantConfig": "core.config",
    "RTNQuantConfig": "methods.rtn",
    "Report": "evaluation.report",
    "Rule": "core.config",
    "compare": "pipeline.compare",
    "compress": "pipeline.compress",
    "evaluate": "evaluation.report",
    "inspect": "pipeline.inspect",
    "load": "checkpoint.save",
    "load_config": "pipeline.recipes",
    "optimize_for_inference": "pipeline.optimize",
    "plan": "pipeline.planning",
    "preflight": "pipeline.preflight",
    "quantize": "pipeline.quantize",
    "save": "checkpoint.save",
    "smooth": "pipeline.smooth",
    "verify": "checkpoint.save",
}

__all__ = [
    "AWQQuantConfig",
    "AutoRoundQuantConfig",
    "Calibration",
    "CastConfig",
    "CodebookQuantConfig",
    "Comparison",
    "GPTQQuantConfig",
    "HFCompressError",
    "HQQQuantConfig",
    "Int8DynamicQuantConfig",
    "Int8StaticQuantConfig",
    "Plan",
    "QuantConfig",
    "RTNQuantConfig",
    "Report",
    "Rule",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "load_config",
    "optimize_for_inference",
    "plan",
    "preflight",
    "quantize",
    "save",
    "smooth",
    "verify",
]

_register()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names."""
    return sorted(__all__)
