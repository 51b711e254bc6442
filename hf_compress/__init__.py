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
    from .training.distillation import (
        DistillationCallback,
        DistillationConfig,
        DistillationMixin,
        DistillationTrainer,
        HiddenConfig,
        RelationConfig,
        student_from_teacher,
    )
    from .training.lora import merge_adapter
    from .training.pruning import PruningCallback, PruningConfig, PruningRule
    from .training.qat import QATConfig
    from .training.qat.callback import QATCallback
    from .training.qat.convert import convert

_WHERE = {
    "AutoRoundQuantConfig": "methods.autoround",
    "AWQQuantConfig": "methods.awq",
    "Calibration": "core.config",
    "CastConfig": "methods.cast",
    "CodebookQuantConfig": "methods.codebook",
    "Comparison": "evaluation.comparison",
    "DistillationCallback": "training.distillation",
    "DistillationConfig": "training.distillation",
    "DistillationMixin": "training.distillation",
    "DistillationTrainer": "training.distillation",
    "HFCompressError": "core.errors",
    "GPTQQuantConfig": "methods.gptq",
    "HQQQuantConfig": "methods.hqq",
    "HiddenConfig": "training.distillation",
    "Int8DynamicQuantConfig": "methods.int8_dynamic",
    "Int8StaticQuantConfig": "methods.int8_static",
    "Plan": "core.plan",
    "PruningCallback": "training.pruning",
    "PruningConfig": "training.pruning",
    "PruningRule": "training.pruning",
    "QATCallback": "training.qat.callback",
    "QATConfig": "training.qat",
    "QuantConfig": "core.config",
    "RTNQuantConfig": "methods.rtn",
    "RelationConfig": "training.distillation",
    "Report": "evaluation.report",
    "Rule": "core.config",
    "compare": "pipeline.compare",
    "compress": "pipeline.compress",
    "convert": "training.qat.convert",
    "evaluate": "evaluation.report",
    "inspect": "pipeline.inspect",
    "load": "checkpoint.save",
    "load_config": "pipeline.recipes",
    "merge_adapter": "training.lora",
    "optimize_for_inference": "pipeline.optimize",
    "plan": "pipeline.planning",
    "preflight": "pipeline.preflight",
    "quantize": "pipeline.quantize",
    "save": "checkpoint.save",
    "smooth": "pipeline.smooth",
    "student_from_teacher": "training.distillation",
    "verify": "checkpoint.save",
}

__all__ = [
    "AWQQuantConfig",
    "AutoRoundQuantConfig",
    "Calibration",
    "CastConfig",
    "CodebookQuantConfig",
    "Comparison",
    "DistillationCallback",
    "DistillationConfig",
    "DistillationMixin",
    "DistillationTrainer",
    "GPTQQuantConfig",
    "HFCompressError",
    "HQQQuantConfig",
    "HiddenConfig",
    "Int8DynamicQuantConfig",
    "Int8StaticQuantConfig",
    "Plan",
    "PruningCallback",
    "PruningConfig",
    "PruningRule",
    "QATCallback",
    "QATConfig",
    "QuantConfig",
    "RTNQuantConfig",
    "RelationConfig",
    "Report",
    "Rule",
    "__version__",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "load_config",
    "merge_adapter",
    "optimize_for_inference",
    "plan",
    "preflight",
    "quantize",
    "save",
    "smooth",
    "student_from_teacher",
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
