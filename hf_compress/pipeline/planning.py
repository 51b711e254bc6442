"""Plans for a live model, or for an id or directory without reading its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeAlias

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from ..checkpoint.handover import check_awq, plan_of
from ..checkpoint.inputs import input_ranks
from ..checkpoint.plain import class_name, is_plain
from ..checkpoint.stock import architecture_of
from ..core.build import build_plan
from ..core.config import QuantConfig
from ..core.errors import (
    AlreadyQuantizedError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    UnsupportedModelError,
    first_line,
)
from ..core.fit import fit
from ..core.plan import DTYPES, Plan
from .backends import backend_of, check_minimum, plan_stock, refuse_live

Request: TypeAlias = QuantConfig | BitsAndBytesConfig | TorchAoConfig
"""A configuration of ours, or one of transformers' that is carried out by another library."""


def plan(model_or_id: nn.Module | str | Path, config: Request, min_coverage: float | None = None) -> Plan:
    """What would happen to every weight; reads no weights for an id or directory.

    Args:
        model_or_id: A live model, a Hub id or a directory.
        config: The request; one of another library needs an id or directory.
        min_coverage: Only with another library's configuration, which has no such field: smallest fraction of the
            values in scope that must be quantized, 0 to 1; 0.9 by default.

    Raises:
        HFCompressError: The plan is refused; the code says why.
        UnsupportedModelError: The model is inside of another module, such as `torch.compile`'s, or has adapters.
        ModelNotFoundError: There is no such model.
    """
    return plan_request(model_or_id, config, min_coverage)[0]


def plan_request(
    model_or_id: nn.Module | str | Path, config: Request, min_coverage: float | None = None
) -> tuple[Plan, nn.Module]:
    """The plan of any request, and the model that it was made with: the live one, or a skeleton on meta."""
    backend = backend_of(config)
    if backend is None or isinstance(config, QuantConfig):
        check_config(config, min_coverage)
        model = model_or_id if isinstance(model_or_id, nn.Module) else meta_model(model_or_id)
        return plan_model(model, config), model
    if isinstance(model_or_id, nn.Module):
        refuse_live(model_or_id, config)
    minimum = check_minimum(min_coverage)
    model = meta_model(model_or_id)
    return plan_stock(meta_model(model_or_id), config, backend, minimum), model


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


def plan_model(model: nn.Module, config: QuantConfig) -> Plan:
    """The plan for a model in memory or on meta."""
    check_config(config)
    if is_quantized(model):
        raise AlreadyQuantizedError(
            f"{type(model).__name__} is quantized already; quantizing twice would compound the error.",
            "start from the original model",
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
    for path, inner in model.named_modules():
        if _is(inner, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an adapter at {path}, which would be taken for weights of its own.",
                "merge the adapters before: PeftModel.from_pretrained(base, adapters).merge_and_unload()",
            )


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


def meta_model(model_id: str | Path) -> PreTrainedModel:
    """A model of the right class and data type on the meta device.

    Raises:
        ModelNotFoundError: There is no such id or directory, or it has no config.
        UnsupportedModelError: transformers has no such architecture.
        AlreadyQuantizedError: The checkpoint is quantized.
    """
    config = model_config(model_id)
    architecture = model_class(config, model_id)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = architecture(config)
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(
            f"{architecture.__name__} can't be built from the config of {str(model_id)!r}: {first_line(error)}",
            "check the config's sizes",
        ) from error
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else DTYPES.get(str(config.dtype), torch.float32)
    return model.to(dtype)


def model_config(model_id: str | Path) -> PreTrainedConfig:
    """The config of an id or directory.

    Raises:
        UnsupportedModelError: The argument is neither.
        ModelNotFoundError: There is none.
        AlreadyQuantizedError: It says that the checkpoint is quantized.
    """
    if not isinstance(model_id, str | Path):
        raise UnsupportedModelError(
            f"Expected a model, an id or a directory, got {type(model_id).__name__}.", "pass a transformers model"
        )
    path = Path(model_id)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"The directory {str(model_id)!r} has no config.json.", "point to a saved transformers model"
        )
    if not path.exists() and str(model_id).count("/") > 1:
        raise ModelNotFoundError(f"There is no directory {str(model_id)!r}.", "check the path")
    if (path / "hf_compress.safetensors").is_file() and is_plain(path):
        raise AlreadyQuantizedError(
            f"{str(model_id)!r} holds a plain module, {class_name(path)}, that is compressed already.",
            f'read it with hf_compress.load("{model_id}", model=...), or compress the original module',
        )
    try:
        config = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelNotFoundError(
            f"No usable model config at {str(model_id)!r}: {first_line(error)}",
            "check the spelling; a directory needs a config.json with a known model_type",
        ) from error
    if vars(config).get("quantization_config"):
        raise AlreadyQuantizedError(f"{str(model_id)!r} is quantized already.", "start from the original model")
    return config


def model_class(config: PreTrainedConfig, model_id: str | Path) -> type[PreTrainedModel]:
    """The class named in the config.

    Raises:
        UnsupportedModelError: There is none, or transformers doesn't have it.
    """
    kind = architecture_of(config)
    if kind is None:
        raise UnsupportedModelError(
            f"The config of {str(model_id)!r} names the architectures {config.architectures}; transformers "
            f"{transformers.__version__} has none of them for a {type(config).__name__}.",
            "load the model yourself and pass it instead of its id",
        )
    return kind
