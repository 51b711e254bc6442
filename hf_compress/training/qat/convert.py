"""The end of quantization-aware training: fake-quantized values become packed weights."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ...apply.planning import adapter_in, is_quantized
from ...apply.swapping import swap_all
from ...calibration.block import Finished
from ...checkpoint.handover import training_plan_of
from ...core.errors import CalibrationError, UnsupportedModelError, listed
from ...core.plan import Plan, PlanRow
from ...modules.packed import layout_of
from ...modules.results import canonical, check_values, pack_result
from ..callback import bare
from .modules import LOW, quantized, remove_fake_quant


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Pack a model that was trained with fake quantization, in place.

    The model then is what `hf_compress.quantize` makes of one: `save_pretrained`, `Trainer.save_model` and
    `hf_compress.save` write its native format. In evaluation mode its outputs are those that it had with fake
    quantization, to the last bit on the reference path; kernels for INT8 inputs differ by the order of their sums.

    Args:
        model: The model that was prepared, also inside of DDP or `torch.compile`.

    Returns:
        The model itself, out of what it was in, with packed weights and transformers' native quantizer.

    Raises:
        UnsupportedModelError: It has no fake quantization, or an adapter.
        CalibrationError: The range of an input is not known, as no training step has reached it; names the layers.
        WeightValueError: A weight holds NaN or infinite values. The model is unchanged after any of these errors.
    """
    inner = bare(model)
    refuse_adapter(inner)
    plan = training_plan_of(inner)
    if plan is None:
        why = "has been converted or quantized already" if is_quantized(inner) else "has no fake quantization"
        raise UnsupportedModelError(
            f"{type(inner).__name__} {why}: there is nothing to convert.",
            "train it with Trainer(..., callbacks=[hf_compress.QATCallback(hf_compress.QATConfig(bits=4), "
            "convert=False)]) before, or use hf_compress.quantize",
        )
    _check_ranges(inner, plan)
    finished = _packed(inner, plan)
    remove_fake_quant(inner)
    _leave_autocast(inner)
    swap_all(inner, plan, finished)
    return inner


def refuse_adapter(model: nn.Module) -> None:
    """Refuse to train or convert a model that has an adapter of PEFT.

    Raises:
        UnsupportedModelError: It has one; names the place.
    """
    path = adapter_in(model)
    if path is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter at {path}: the weights below it don't change, and what the "
            "adapter learns would not be on their grid.",
            "train adapters on a packed model: hf_compress.quantize(model, RTNQuantConfig(bits=4)), then "
            "peft.get_peft_model; or train without adapters",
        )


def unseen_inputs(model: nn.Module, plan: Plan) -> list[str]:
    """Names of weights whose input has one fixed grid, of which no training step has shown the range so far."""
    return [row.name for row in plan.quantized if _static(row) and not _is_known(model.get_submodule(row.module))]


def _static(row: PlanRow) -> bool:
    """Whether a row fixes the range of its input beforehand."""
    inputs = None if row.quantization is None else row.quantization.input_activations
    return inputs is not None and not inputs.dynamic


def _is_known(module: nn.Module) -> bool:
    """Whether a layer has seen an input in training."""
    return bool(torch.isfinite(module.get_buffer(LOW)).all())


def _check_ranges(model: nn.Module, plan: Plan) -> None:
    """Refuse to convert static inputs without a range.

    Raises:
        CalibrationError: There are some.
    """
    unseen = unseen_inputs(model, plan)
    if unseen:
        raise CalibrationError(
            f"No training step has shown the range of the inputs of {len(unseen)} layers: {listed(unseen)}.",
            f'train with batches that reach them, or skip=["{unseen[0]}"], or activation_strategy="token"',
        )


def _packed(model: nn.Module, plan: Plan) -> Finished:
    """All weights as they will be stored; ties once."""
    finished = Finished()
    for row in plan.quantized:
        if row.tied_to is not None:
            continue
        module = model.get_submodule(row.module)
        weight = canonical(module.get_parameter(row.parameter).detach(), layout_of(row))
        check_values(row.name, weight)
        made = quantized(module, row.parameter)
        finished.packed[row.name], finished.sqnr[row.name] = pack_result(row, weight, made)
    return finished


def _leave_autocast(model: nn.Module) -> None:
    """Take away accelerate's forward of mixed precision: what is saved computes in the data type of its weights.

    accelerate's own `extract_model_from_parallel` would also peel off the decorators of the model's class. A second
    training wraps the forward again, and then takes its own wrapper for the original.
    """
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    vars(model).pop("forward", None)
    plain = original.__func__ if inspect.ismethod(original) else original
    if plain is not type(model).forward and not plain.__module__.startswith("accelerate."):
        vars(model)["forward"] = original
