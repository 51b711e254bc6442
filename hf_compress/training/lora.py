"""Adapters on compressed models: whether one can be merged is measured, not hoped for.

A merged weight W + BA (LoRA, arXiv:2106.09685, equation 3) has to go back onto the grid of its layer. Where the change
is small against the steps of that grid, rounding undoes it: the model loads and runs, and what was learned is gone. So
every layer is merged and rounded on trial, and its error is compared with what the adapter does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration.capture import run_on
from ..calibration.data import prepare
from ..calibration.gram import input_of, patches
from ..calibration.modes import evaluating
from ..calibration.padding import mask_names, padding_of, spread
from ..checkpoint.foreign import foreign_of, settle
from ..checkpoint.handover import current_plan, hand_over, plan_of
from ..core.config import Calibration
from ..core.errors import CalibrationError, ConfigError, MergeError, UnsupportedModelError, listed
from ..core.packages import require
from ..core.plan import Plan
from ..modules.kernels.choose import reference_kernels
from ..modules.swap import PackedModule
from .merging import WAYS_OUT, LayerMerge, Merging, active, merge, merge_by_library, merge_dense, merge_packed, ratio

INPUTS = 256
"""Inputs of a layer (tokens, windows of a convolution) that are kept for measuring, evenly spaced over the data."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What merging does to a model.

    Attributes:
        layers: All layers with an active adapter.
        measured: Norms are Frobenius norms of weights (`weights`), or of outputs for inputs from data (`data`).
        adapters: Names of the active adapters.
    """

    layers: tuple[LayerMerge, ...]
    measured: Literal["weights", "data"]
    adapters: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Error over effect of all layers together, norms added as squares."""
        return ratio(math.hypot(*(one.error for one in self.layers)), math.hypot(*(one.effect for one in self.layers)))

    @property
    def worst(self) -> tuple[LayerMerge, ...]:
        """The layers, largest ratio first."""
        return tuple(sorted(self.layers, key=lambda one: -one.ratio))

    def __str__(self) -> str:
        head = (
            f"merging {', '.join(self.adapters)}: error {self.ratio:.3f} of the adapter's effect over "
            f"{len(self.layers)} layers, measured on {self.measured}"
        )
        return "\n".join([head, *(f"  {one.ratio:.3f}  {one.name}  ({one.scheme})" for one in self.worst)])


@torch.no_grad()
def merge_report(model: nn.Module, calibration: Any = None) -> MergeReport:
    """What `merge_adapter` would do to a model, without doing it.

    Args:
        model: A `PeftModel` with LoRA adapters; see `merge_adapter`.
        calibration: Data to measure on, or None to compare weights.

    Raises:
        MergeError, UnsupportedModelError, CalibrationError, BackendError: See `merge_adapter`.
    """
    return _measured(model, calibration)[1]


@torch.no_grad()
def merge_adapter(model: nn.Module, calibration: Any = None, limit: float = 0.5) -> nn.Module:
    """Merge the active LoRA adapters into a compressed model, if that keeps what they have learned.

    For each adapted layer, W + BA (or what DoRA and others make of W) is put back onto the layer's grid: with new
    scales by the method's own rounding, or with the scales that it has, whichever is nearer. With X the layer's
    inputs, the error is ‖(Q(W + BA) - (W + BA)) X‖, the effect ‖BA X‖; without data both are Frobenius norms of the
    weights. The result stays packed, and is saved and proven like any compressed model.

    Layers of bitsandbytes and torchao are merged by PEFT, and measured and judged alike; so are dense ones, whose
    error is the rounding of their data type. Copies in `modules_to_save` take the place of the originals. Adapters
    that are not active are dropped.

    Args:
        model: A `PeftModel`. On success it must not be used any more.
        calibration: Data to measure on, as for calibrated methods; None compares weights.
        limit: Largest error of the whole model, as a fraction of the adapters' effect.

    Returns:
        The base model with merged weights, packed as before.

    Raises:
        MergeError: The merge would lose more than `limit`, or can't be done. Nothing is changed.
        UnsupportedModelError: It is no `PeftModel`, or its base has changed since it was compressed.
        ConfigError: `limit` is no positive number.
        CalibrationError: The data doesn't fit the model, or never reaches a layer.
        BackendError: PEFT is not installed.
    """
    if type(limit) not in (int, float) or not 0 < limit < math.inf:
        raise ConfigError(f"limit={limit!r} is no positive number.", "limit=0.5")
    found, report = _measured(model, calibration)
    if not report.ratio <= limit:
        worst = ", ".join(f"{one.name} {one.ratio:.2f}" for one in report.worst[:3])
        raise MergeError(
            f"Merging would lose what the adapter has learned: rounding to {report.worst[0].scheme} changes the "
            f"layers by {report.ratio:.2f} of the adapter's effect, more than limit={limit:g} (measured on "
            f"{report.measured}; worst: {worst}). Nothing was changed.",
            WAYS_OUT,
        )
    logger.info("%s", report)
    return _carried_out(model, found, report)


def _carried_out(model: Any, found: Sequence[Merging], report: MergeReport) -> nn.Module:
    """Put merged weights in place and take the adapters off."""
    plan = plan_of(model.get_base_model())
    for one in found:
        if one.packed is None:
            merge(one.layer, one.told.name)
            continue
        for suffix, value in one.packed.parts().items():
            one.base._buffers[f"weight_{suffix}"] = value
        if one.bias is not None:
            one.base.get_parameter("bias").data = one.bias
    base: nn.Module = model.base_model.unload()
    if plan is not None:
        hand_over(base, _with_merge(plan, found, report))
    return base


def _with_merge(plan: Plan, found: Sequence[Merging], report: MergeReport) -> Plan:
    """The plan of a merged model: new noise, and a note on where its weights come from."""
    noise = {one.told.name: one.noise for one in found if one.packed is not None}
    rows = tuple(
        row.model_copy(update={"sqnr_db": noise[row.module]}) if row.module in noise else row for row in plan.rows
    )
    note = str(report).partition("\n")[0].replace("merging", "merged", 1)
    return plan.model_copy(update={"rows": rows, "notes": (*plan.notes, note)})


def _measured(model: nn.Module, calibration: Any) -> tuple[list[Merging], MergeReport]:
    """All layers merged on trial, and what that does."""
    base = _base_of(model)
    layers = _adapted(base)
    ours = any(isinstance(layer.get_base_layer(), PackedModule) for layer in layers.values())
    plan = current_plan(base) if ours else None
    rows = {} if plan is None else {row.module: row for row in plan.quantized}
    ties = {} if plan is None else plan.followers
    _refuse_tied(base, layers, {path for path, row in rows.items() if row.tied_to or row.name in ties})
    inputs = {} if calibration is None else _inputs(base, layers, calibration)
    settle(base)
    found = []
    for path, layer in layers.items():
        module, seen = layer.get_base_layer(), inputs.get(path)
        foreign = foreign_of(module, "weight")
        if isinstance(module, PackedModule) and plan is not None:
            found.append(merge_packed(rows[path], layer, module, seen, plan.method))
        elif foreign is not None:
            found.append(merge_by_library(path, layer, foreign, seen))
        else:
            found.append(merge_dense(path, layer, seen))
    names = tuple(sorted({name for layer in layers.values() for name in active(layer)}))
    measured: Literal["weights", "data"] = "weights" if calibration is None else "data"
    return found, MergeReport(tuple(one.told for one in found), measured, names)


def _base_of(model: object) -> nn.Module:
    """The model below PEFT's.

    Raises:
        UnsupportedModelError: It is something else.
        BackendError: PEFT is not installed.
    """
    if not isinstance(model, require("peft").PeftModel):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is no PeftModel.", 'merge_adapter(PeftModel.from_pretrained(model, "adapter"))'
        )
    base: nn.Module = model.get_base_model()
    return base


def _adapted(base: nn.Module) -> dict[str, Any]:
    """PEFT's layers with an active adapter, by their paths in the base model.

    Raises:
        MergeError: There are none, or one can't be merged.
    """
    kind = require("peft.tuners.tuners_utils").BaseTunerLayer
    layers = {path: module for path, module in base.named_modules() if isinstance(module, kind)}
    for path, layer in layers.items():
        reason = _refusal(layer)
        if reason is not None:
            raise MergeError(f"{path} can't be merged: {reason}. Nothing was changed.", WAYS_OUT)
    chosen = {path: layer for path, layer in layers.items() if active(layer)}
    if not chosen:
        raise MergeError("The model has no active LoRA adapter.", 'model.set_adapter("default")')
    return chosen


def _refusal(layer: Any) -> str | None:
    """Why an adapted layer can't be merged, or None."""
    lora = require("peft.tuners.lora")
    module = layer.get_base_layer()
    if not isinstance(layer, lora.LoraLayer):
        return f"{type(layer).__name__} is no LoRA layer"
    if isinstance(layer, lora.ParamWrapper) or not isinstance(
        module, (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
    ):
        return f"merging into {type(module).__name__} is not supported"
    if layer.merged:
        return f"{listed(layer.merged_adapters)} is merged already, call model.unmerge_adapter() before"
    if layer.disable_adapters:
        return "adapters are disabled, call model.base_model.enable_adapter_layers() before"
    foreign = foreign_of(module, "weight")
    odd = [name for name in active(layer) if name in layer.lora_variant or layer.lora_bias.get(name)]
    if foreign is not None and odd:
        return f"{odd[0]} is more than plain LoRA (such as DoRA, or with biases), on {foreign.label}"
    return None


def _refuse_tied(base: nn.Module, layers: dict[str, Any], tied: set[str]) -> None:
    """Refuse to merge into a weight that another module uses without the adapter.

    Raises:
        MergeError: Names the layer.
    """
    owners: dict[int, int] = {}
    for _, value in base.named_parameters(remove_duplicate=False):
        owners[id(value)] = owners.get(id(value), 0) + 1
    for path, layer in layers.items():
        value = layer.get_base_layer()._parameters.get("weight")
        if path in tied or (value is not None and owners.get(id(value), 0) > 1):
            raise MergeError(
                f"The weight of {path} is tied to another module's, which would change too. Nothing was changed.",
                WAYS_OUT,
            )


def _inputs(base: nn.Module, layers: dict[str, Any], calibration: Any) -> dict[str, Tensor]:
    """Inputs of all adapted layers, with their adapters at work; padding left out.

    Raises:
        CalibrationError: The data doesn't fit the model, or never reaches a layer.
    """
    request = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    batches = prepare(request, base).batches
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    device = next(base.parameters()).device
    with evaluating(base), reference_kernels(base):
        for number, batch in enumerate(batches):
            masks = [mask for name in mask_names(base, batch) if (mask := padding_of(batch, name)) is not None]
            count = math.ceil(INPUTS / len(batches))
            handles = [
                layer.register_forward_pre_hook(_reader(found[path], masks, count), with_kwargs=True)
                for path, layer in layers.items()
            ]
            try:
                run_on(base, {name: value.to(device) for name, value in batch.items()}, number)
            finally:
                for handle in handles:
                    handle.remove()
    missed = [path for path, parts in found.items() if not any(part.numel() for part in parts)]
    if missed:
        raise CalibrationError(
            f"The data never reaches {listed(missed)}.", "give more data, or calibration=None to compare weights"
        )
    return {path: torch.cat(parts, dim=-2 if parts[0].ndim == 3 else 0) for path, parts in found.items()}


def _reader(found: list[Tensor], masks: Sequence[Tensor], count: int) -> Callable[..., None]:
    """A hook that keeps some of a layer's inputs."""

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_some(layer.get_base_layer(), input_of(args, kwargs), masks, count))

    return hook


def _some(module: nn.Module, value: Tensor, masks: Sequence[Tensor], count: int) -> Tensor:
    """Evenly spaced inputs out of one call, as `_norm` takes them."""
    if isinstance(module, _CONVOLUTIONS):
        flat = patches(module, value.float())
    else:
        table = isinstance(module, nn.Embedding)
        leading = value.shape if table else value.shape[:-1]
        flat = value.reshape(-1) if table else value.reshape(-1, value.shape[-1]).float()
        spreads = (spread(mask, leading) for mask in masks)
        kept = next((one for one in spreads if one is not None), None)
        flat = flat if kept is None else flat[kept.to(flat.device)]
    dim = -2 if flat.ndim == 3 else 0
    index = torch.linspace(0, flat.shape[dim] - 1, min(count, flat.shape[dim]), dtype=torch.float64)
    return flat.index_select(dim, index.round().long().to(flat.device))
