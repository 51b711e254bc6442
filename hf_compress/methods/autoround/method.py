"""Learned rounding of a block: which weights to round up, so that the block's output stays what it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.block import Block, Call
from ...calibration.gram import input_of
from ...calibration.runner import unreached
from ...core.config import QuantFields
from ...core.errors import ConfigError
from ...core.plan import PlanRow
from ...core.registry import Quantized
from ...core.weights import WeightKind
from ...modules.packed import layout_of
from ...modules.results import check_values
from ..rtn.method import quantize_scheme
from .config import AutoRoundFields
from .forward import Forward, leaf_dtype, squared_error
from .rounding import Rounding

LEARNED = (WeightKind.LINEAR, WeightKind.CONV1D, WeightKind.EXPERTS, WeightKind.CONV)
"""Kinds of weights whose rounding is learned; others are rounded to nearest."""

logger = logging.getLogger(__name__)


def compressor(fields: QuantFields) -> AutoRound:
    """What compresses the blocks of a model.

    Raises:
        ConfigError: The fields are another method's.
    """
    if not isinstance(fields, AutoRoundFields):
        raise ConfigError(f"{type(fields).__name__} has no iterations.")
    return AutoRound(fields)


class AutoRound:
    """Learns the rounding of one block after the other (arXiv:2309.05516, section 3).

    Args:
        fields: The configuration's fields.
    """

    sequential = True
    call_tokens = 4096

    def __init__(self, fields: AutoRoundFields) -> None:
        self.fields = fields

    @property
    def reference(self) -> bool:
        """Whether calls carry targets."""
        return self.fields.steps > 0

    def compress(self, block: Block) -> None:
        """Install all rows of a block.

        Raises:
            CalibrationError: Data never reaches a weight, fused experts apart.
            WeightValueError: A weight is not finite.
        """
        for row in block.rows:
            check_values(row.name, block.weight(row))
        kinds = LEARNED if self.fields.steps else ()
        for row in block.rows:
            if row.kind not in kinds:
                block.install(row, _nearest(block, row))
        rows = [row for row in block.rows if row.kind in kinds]
        if rows and not block.calls:
            raise unreached([row.name for row in rows])
        if rows:
            self._learn(block, rows)

    def _learn(self, block: Block, rows: Sequence[PlanRow]) -> None:
        """Install weights with learned rounding, or rounded to nearest where that gives no larger error.

        The outputs that the errors are taken of are also what the next block gets.
        """
        nearest = {row.name: _nearest(block, row) for row in rows}
        dtype = leaf_dtype(rows)
        learned = {row.name: (row, Rounding(block.weight(row), layout_of(row).weights, dtype)) for row in rows}
        forward = Forward(block, learned)
        reached = self._descend(block, forward)
        _check_called(block, [row for row in rows if row.name not in reached])
        _report_experts(learned, self.fields.steps)
        results = {name: learned[name][1].result() if name in reached else nearest[name] for name in nearest}
        outputs, loss = _evaluated(block, forward, results)
        others, _ = _evaluated(block, forward, nearest, loss)
        better = len(others) < len(outputs)
        for row in rows:
            block.install(row, results[row.name] if better else nearest[row.name])
        for call, output in zip(block.calls, outputs if better else others, strict=True):
            if call.hidden is not None:
                call.hidden = output.to(call.hidden.dtype)
        block.advanced = True

    def _descend(self, block: Block, forward: Forward) -> set[str]:
        """Take all steps, the step size falling linearly to zero.

        Returns:
            Names of the weights that the block's output depends on.
        """
        batches = _batches(block.calls, self.fields.batch_rows, block.seed)
        steps, reached = self.fields.steps, set()
        for step in range(steps):
            for call in next(batches):
                forward.backward(call)
            reached |= forward.step((1 - step / steps) / steps)
        return reached


@torch.no_grad()
def _check_called(block: Block, rows: Sequence[PlanRow]) -> None:
    """Refuse weights that no data reaches, among those that the block's output does not depend on.

    These may also belong to a layer whose output goes elsewhere, such as a pooler. Fused experts are only reported.

    Raises:
        CalibrationError: The module of one is never called, or with nothing.
    """
    called: set[str] = set()
    waiting = {row.module: row.name for row in rows if row.kind is not WeightKind.EXPERTS}

    def hook(path: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if input_of(args, kwargs).numel():
                called.add(path)

        return read

    handles = [
        block.module.get_submodule(block.local(path)).register_forward_pre_hook(hook(path), with_kwargs=True)
        for path in waiting
    ]
    try:
        for call in block.calls:
            if waiting.keys() <= called:
                break
            call.run(block.module)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for path, name in waiting.items() if path not in called]
    if missing:
        raise unreached(missing)


def _report_experts(learned: Mapping[str, tuple[PlanRow, Rounding]], steps: int) -> None:
    """Say which fused experts have learned nothing."""
    for name, (row, rounding) in learned.items():
        still = rounding.still() if row.kind is WeightKind.EXPERTS else []
        if still:
            logger.warning(
                "No token reaches experts %s of %s in %d steps: they are rounded to nearest.",
                ", ".join(map(str, still)),
                name,
                steps,
            )


def _batches(calls: Sequence[Call], rows: int, seed: int) -> Iterator[list[Call]]:
    """Calls of at least so many rows together, drawn without replacement until all were seen, then anew, for ever."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[Call] = []
    while True:
        for index in torch.randperm(len(calls), generator=generator).tolist():
            batch.append(calls[index])
            if sum(map(_rows, batch)) >= rows:
                yield batch
                batch = []


def _rows(call: Call) -> int:
    """Rows of data in a call."""
    value = call.mask if call.mask is not None else call.target
    return 1 if value is None else max(1, len(value))


@torch.no_grad()
def _evaluated(
    block: Block, forward: Forward, results: Mapping[str, Quantized], enough: float = inf
) -> tuple[list[Tensor], float]:
    """A block's outputs with the given weights, and their squared error; cut short where that exceeds `enough`."""
    outputs: list[Tensor] = []
    loss = 0.0
    for name, rounding in forward.roundings.items():
        rounding.show(results[name])
    for call in block.calls:
        output = forward.output(call)
        loss += float(squared_error(call, output))
        if loss > enough:
            break
        outputs.append(output)
    return outputs, loss


def _nearest(block: Block, row: PlanRow) -> Quantized:
    """A weight rounded to nearest."""
    return quantize_scheme(block.weight(row), layout_of(row).scheme)
