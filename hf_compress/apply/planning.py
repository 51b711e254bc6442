"""Plans for a model in memory or on meta: what every method, callback and driver starts with."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.handover import check_awq, plan_of, training_plan_of
from ..checkpoint.inputs import input_ranks
from ..core.build import build_plan
from ..core.config import QuantConfig
from ..core.errors import AlreadyQuantizedError, ConfigError, InputError, UnsupportedModelError
from ..core.fit import fit
from ..core.plan import Plan


def check_config(config: object, min_coverage: float | None = None) -> None:
    """Refuse what is not a configuration of ours.

    Raises:
        ConfigError: It is something else, or `min_coverage` is given beside it.
    """
    if isinstance(config, QuantConfig) and min_coverage is not None:
        name = type(config).__name__
        raise ConfigError(
            f"min_coverage is a field of {name}; the argument is for configurations of other libraries.",
            f"{name}(min_coverage={min_coverage!r})",
        )
    if not isinstance(config, QuantConfig):
        raise ConfigError(
            f"Expected an hf_compress configuration, got {type(config).__name__}.",
            "pass for example RTNQuantConfig(bits=4)",
        )


def refuse_trained(config: QuantConfig) -> None:
    """Refuse a method that trains, where nothing is trained.

    Raises:
        ConfigError: With the two ways of using it.
    """
    if config.spec.prepare is not None:
        raise ConfigError(
            f"The method {config.method!r} works while a model is trained, and nothing is trained here.",
            f"Trainer(model, ..., callbacks=[hf_compress.QATCallback(hf_compress.{config!r})]), or "
            f"from_pretrained(..., quantization_config=hf_compress.{config!r}) and hf_compress.QATCallback()",
        )


def plan_model(model: nn.Module, config: QuantConfig) -> Plan:
    """The plan for a model in memory or on meta."""
    check_config(config)
    if is_quantized(model):
        raise AlreadyQuantizedError(
            f"{type(model).__name__} is quantized already; quantizing twice would compound the error.",
            "start from the original model",
        )
    if training_plan_of(model) is not None:
        raise AlreadyQuantizedError(
            f"{type(model).__name__} is prepared for quantization-aware training already.",
            "finish it with hf_compress.convert(model), or load the model again",
        )
    _check_bare(model)
    with torch.random.fork_rng(devices=[]):
        return _planned(model, config)


_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "pass model._orig_mod, and compile it afterwards",
    ("torch.nn", "DataParallel"): "pass model.module",
    ("torch.nn.parallel", "DistributedDataParallel"): "pass model.module",
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "load the model again, on one device",
    ("peft", "PeftModel"): "model = model.merge_and_unload()",
    ("peft", "PeftMixedModel"): "model = model.merge_and_unload()",
}
"""Classes that hold a model, and how to get it out."""


def _check_bare(model: nn.Module) -> None:
    """Refuse a model that is inside of something else, or has adapters.

    Raises:
        UnsupportedModelError: Its weights would go by other names, or the adapters' be taken for its own.
    """
    for (module, name), fix in _WRAPPERS.items():
        if _is(model, module, name):
            raise UnsupportedModelError(f"{type(model).__name__} is not the model itself but holds it.", fix)
    path = adapter_in(model)
    if path is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter at {path}, which would be taken for weights of its own.",
            "merge the adapters before: PeftModel.from_pretrained(base, adapters).merge_and_unload()",
        )


def adapter_in(model: nn.Module) -> str | None:
    """Path of the first layer that has an adapter of PEFT, or None."""
    named = model.named_modules()
    return next((path for path, inner in named if _is(inner, "peft.tuners.tuners_utils", "BaseTunerLayer")), None)


def _is(value: nn.Module, module: str, name: str) -> bool:
    """Whether something is an instance of a class; no instance exists of what was never imported."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, vars(loaded).get(name, ()))


def _planned(model: nn.Module, config: QuantConfig) -> Plan:
    """The plan; building models on meta may draw from the global random state."""
    drafted = build_plan(model, config, _ranks(model, config))
    if drafted.format in ("gptq", "gptq_v2"):
        return drafted.model_copy(update={"notes": (*drafted.notes, *_gptq_notes(model, drafted))})
    if drafted.format == "awq" and isinstance(model, PreTrainedModel):
        check_awq(model, drafted)
    if drafted.format != "compressed-tensors" or not _breaks_stock_init(model, drafted):
        return drafted
    redrafted = drafted.model_copy(update={"stock_dequantize": True})
    return fit(redrafted, config.fields.format, config.fields.min_coverage)


def _gptq_notes(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Why stock transformers will refuse this model as a GPTQ checkpoint, whatever wrote it."""
    if not isinstance(model, PreTrainedModel):
        return ()
    reasons = []
    if type(model).main_input_name != "input_ids":
        reasons.append(f"it takes GPTQ models of text only, not of {type(model).main_input_name}")
    if _breaks_stock_init(model, plan):
        reasons.append("this architecture's initialisation reads weights that packed layers don't have")
    what = f"stock transformers can't load {type(model).__name__} from GPTQ"
    return tuple(f"{what}: {reason}; hf_compress.load can" for reason in reasons)


def _breaks_stock_init(model: nn.Module, plan: Plan) -> bool:
    """Whether stock loading would fail because the architecture initialises layers through `layer.weight`.

    Stock compressed-tensors removes the parameter of packed layers before transformers initialises what the
    checkpoint lacks. T5, for one, then reads `self.wi.weight`. Probed on a copy without memory.
    """
    packed = {row.module for row in plan.quantized if row.quantization and row.quantization.format == "pack-quantized"}
    if not packed or not isinstance(model, PreTrainedModel):
        return False
    with torch.device("meta"):
        probe = type(model)(model.config)
    for path, module in probe.named_modules():
        if path in packed:
            module._parameters.pop("weight", None)
    kinds = {type(module): module for module in probe.modules()}
    try:
        for module in kinds.values():
            probe._init_weights(module)
    except AttributeError:
        return True
    return False


def is_quantized(model: nn.Module) -> bool:
    """Whether this package or transformers has quantized this model before; a cast does not count."""
    before = plan_of(model)
    return bool(before and before.quantized) or vars(model).get("hf_quantizer") is not None


def _ranks(model: nn.Module, config: QuantConfig) -> dict[str, set[int]] | None:
    """Input ranks of linears, where the method's scheme depends on them; None when they can't be traced."""
    if not config.spec.quantizes_activations or not isinstance(model, PreTrainedModel):
        return None
    try:
        return input_ranks(model)
    except InputError:
        return None
