"""Carrying out a plan, one weight at a time: check, quantize, pack, measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..core.errors import IncompleteLoadError, WeightValueError
from ..core.plan import Plan, PlanRow
from ..core.registry import METHODS
from ..modules.packed import PackedTensor, allocate, layout_of
from ..modules.results import canonical, check_values, pack_result

Progress = Callable[[int, int], None]
"""Called with the number of weights done and the number planned."""


def pack_weight(row: PlanRow, parameter: Tensor, method: str) -> tuple[PackedTensor, float | None]:
    """Quantize and pack one weight.

    Args:
        row: Its row of the plan.
        parameter: The dense parameter, in the module's own orientation.
        method: Name of the method.

    Returns:
        The packed weight, and its signal-to-quantization-noise ratio in dB (None when exact).

    Raises:
        WeightValueError: It holds NaN or infinite values, or nothing, or values that the method can't quantize.
        IncompleteLoadError: It has another shape than the model's parameter.
    """
    layout = layout_of(row)
    if tuple(parameter.shape) != layout.parameter_shape:
        raise IncompleteLoadError(
            f"{row.name} has shape {tuple(parameter.shape)} in the checkpoint, {layout.parameter_shape} in the model.",
            "check that the config belongs to the weights",
        )
    weight = canonical(parameter.detach(), layout)
    check_values(row.name, weight)
    run = METHODS.get(method).quantize
    if run is None:
        raise ValueError(f"the method {method!r} packs nothing")
    packed = allocate(layout, weight.dtype, weight.device)
    try:
        quantized = run(weight, layout.scheme)
    except WeightValueError as error:
        raise WeightValueError(f"{row.name}: {error.message}", f'{error.fix}, or skip=["{row.name}"]') from None
    return pack_result(row, weight, quantized, packed)


def with_results(plan: Plan, sqnr: Mapping[str, float | None]) -> Plan:
    """The plan with measured noise per weight."""
    rows = tuple(row.model_copy(update={"sqnr_db": sqnr.get(row.name)}) for row in plan.rows)
    return plan.model_copy(update={"rows": rows})
