"""Whether a model, its baseline and its checkpoint belong together."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.foreign import parameter_shapes, quantization_of
from ..checkpoint.handover import current_plan, plan_of
from ..checkpoint.proof import current_record
from ..checkpoint.record import Record
from ..core.errors import DeviceError, UnsupportedModelError, listed
from ..core.plan import Plan
from ..modules.swap import packed_modules
from .forward import device_of
from .quality_data import config_value

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def checked_plan(model: nn.Module, baseline: nn.Module) -> Plan:
    """The model's plan, once model and baseline are a pair that can be compared.

    Raises:
        UnsupportedModelError: One is no module or has no weights, the model is not compressed, the baseline is, or it
            is another class.
        DeviceError: They are on different devices.
    """
    for side, given in (("model", model), ("baseline", baseline)):
        if not isinstance(given, nn.Module):
            raise UnsupportedModelError(
                f"The {side} is a {type(given).__name__} and no module.",
                "hf_compress.evaluate(model, baseline), with hf_compress.load(path) for a checkpoint",
            )
    plan, name = current_plan(model), type(model).__name__
    if plan is None:
        raise UnsupportedModelError(
            f"The {name} was not compressed by hf_compress: it has no plan.",
            "hf_compress.quantize(model, config) or hf_compress.load(path); the order is evaluate(model, baseline)",
        )
    if plan_of(baseline) is not None or quantization_of(baseline) is not None:
        raise UnsupportedModelError(
            f"The baseline, a {type(baseline).__name__}, is compressed too; quantize changes a live model in place.",
            "pass the original: load it again, or copy.deepcopy(model) before quantizing",
        )
    if not isinstance(model, type(baseline)):
        raise UnsupportedModelError(
            f"The model is a {name} and its baseline a {type(baseline).__name__}.",
            f"load the original with {name}.from_pretrained",
        )
    devices = [device_of(side) for side in (model, baseline)]
    if "meta" in (device.type for device in devices):
        raise UnsupportedModelError(f"The {name} or its baseline is on the meta device.", "load the weights")
    if devices[0] != devices[1]:
        raise DeviceError(
            f"The model is on {devices[0]} and its baseline on {devices[1]}.", f'baseline.to("{devices[0]}")'
        )
    return plan


def checked_record(path: Path, plan: Plan) -> Record:
    """The checkpoint's record, once it is of the same compression as the model.

    Raises:
        UnsupportedModelError: It is of another compression.
        CheckpointNotFoundError, CorruptCheckpointError: It can't be read.
    """
    record = current_record(path)
    there = {row.name: row.scheme for row in record.plan.rows}
    here = {row.name: row.scheme for row in plan.rows}
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing or record.plan.method != plan.method:
        detail = f": they differ at {listed(differing, 3)}" if differing else ""
        raise UnsupportedModelError(
            f"{path} holds another compression ({record.plan.method}) than the model ({plan.method}){detail}.",
            f'model = hf_compress.load("{path}")',
        )
    return record


def check_sizes(model: nn.Module, baseline: nn.Module) -> None:
    """Refuse a baseline of other sizes: numbers against it would say nothing about the compression.

    Raises:
        UnsupportedModelError: A size in the configs, or the shape of a weight that both have, differs.
    """
    found = []
    if isinstance(model, PreTrainedModel) and isinstance(baseline, PreTrainedModel):
        sizes = ((name, config_value(model, name), config_value(baseline, name)) for name in _SIZES)
        found = [f"{name} {new} and {old}" for name, new, old in sizes if new != old]
    shapes, others = _shapes(model), _shapes(baseline)
    found += [
        f"{name} {shapes[name]} and {others[name]}"
        for name in shapes
        if shapes[name] != others.get(name, shapes[name])
    ]
    if found:
        raise UnsupportedModelError(
            f"The model, a {type(model).__name__}, and its baseline differ in {listed(found, 3)}.",
            "load the original that the model was made from",
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters as they are, or were before packing."""
    shapes = parameter_shapes(model)
    for path, module in packed_modules(model):
        for name, layout in module.hfc_layouts.items():
            shapes[f"{path}.{name}" if path else name] = tuple(layout.parameter_shape)
    return shapes
