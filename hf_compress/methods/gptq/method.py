"""GPTQ on the weights of a block: which share a Hessian, what to do without one, experts, grouped convolutions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...calibration.block import Block
from ...calibration.experts import ExpertInputs, ExpertPolicy, collect_experts
from ...calibration.gram import Inputs, collect
from ...calibration.runner import unreached
from ...calibration.single_pass import Stage, UnsuitableBlockError, single_pass
from ...core import scheme as schemes
from ...core.config import QuantFields
from ...core.errors import ConfigError
from ...core.plan import PlanRow
from ...core.registry import Quantized
from ...core.weights import WeightKind
from ...modules.packed import layout_of
from ...modules.results import check_values, combined
from ..rtn.method import quantize_scheme, uniform_grid
from .config import GPTQFields
from .solver import Grids, factor, gptq

SOLVED = (WeightKind.LINEAR, WeightKind.CONV1D, WeightKind.CONV, WeightKind.EXPERTS)
"""Kinds of weights whose inputs are known; embedding tables and recurrent layers are rounded to nearest."""

logger = logging.getLogger(__name__)


def compressor(fields: QuantFields) -> GPTQ:
    """What compresses the blocks of a model.

    Raises:
        ConfigError: The fields are another method's.
    """
    if not isinstance(fields, GPTQFields):
        raise ConfigError(f"{type(fields).__name__} has no damping.")
    return GPTQ(fields)


class GPTQ:
    """Quantizes one block after the other, and within a block in the order of execution.

    Args:
        fields: The configuration's fields.
    """

    reference = False
    sequential = True
    call_tokens = 1024

    def __init__(self, fields: GPTQFields) -> None:
        self.fields = fields

    def compress(self, block: Block) -> None:
        """Install all rows of a block, and advance it where it could be walked in one pass.

        Raises:
            CalibrationError: Inputs are not finite or never reach a weight, a Hessian is singular, or too few tokens
                reach an expert.
            WeightValueError: A weight is not finite.
        """
        for row in block.rows:
            check_values(row.name, block.weight(row))
        known = [row for row in block.rows if row.kind in SOLVED]
        for row in block.rows:
            if row.kind not in SOLVED:
                logger.info("%s (%s) is rounded to nearest.", row.name, row.kind)
                block.install(row, quantize_scheme(block.weight(row), _scheme(row)))
        if not known:
            return
        if block.calls and block.calls[0].hidden is not None:
            try:
                single_pass(block, known, lambda stage: self._solve(block, stage))
                return
            except UnsuitableBlockError as error:
                logger.info("%s takes two passes: %s.", block.path, error)
        stage = Stage(tuple(known), collect(block, known), collect_experts(block, known))
        missing = [name for name, inputs in stage.inputs.items() if not inputs.tokens]
        if missing:
            raise unreached(missing)
        self._solve(block, stage)

    def _solve(self, block: Block, stage: Stage) -> None:
        """Quantize the weights of a stage."""
        for rows in _sharing(stage):
            if rows[0].kind is WeightKind.EXPERTS:
                block.install(rows[0], self._experts(block, rows[0], stage.experts[rows[0].module]))
                continue
            inputs = stage.inputs[rows[0].name]
            if inputs.gram.ndim == 3:
                block.install(rows[0], self._parts(block, rows[0], inputs.gram.unbind(0)))
                continue
            for row, quantized in zip(rows, self._joined(block, rows, inputs), strict=True):
                block.install(row, quantized)

    def _joined(self, block: Block, rows: Sequence[PlanRow], inputs: Inputs) -> list[Quantized]:
        """Weights that read the same input and have the same grid, solved as one."""
        args = _grid(rows[0])
        weights = [block.weight(row) for row in rows]
        factored = factor(inputs.gram, self.fields.damping, self.fields.act_order, rows[0].name)
        whole = gptq(torch.cat(weights) if len(rows) > 1 else weights[0], factored, args, self.fields.block_size)
        if len(rows) == 1:
            return [whole]
        sizes = [len(weight) for weight in weights]
        zeros = [None] * len(rows) if whole.zero_point is None else whole.zero_point.split(sizes)
        return [
            Quantized(codes, scale, zero)
            for codes, scale, zero in zip(whole.codes.split(sizes), whole.scale.split(sizes), zeros, strict=True)
        ]

    def _parts(self, block: Block, row: PlanRow, grams: Iterable[Tensor]) -> Quantized:
        """A grouped convolution: some rows for each Hessian."""
        weight, args, grams = block.weight(row), _grid(row), list(grams)
        parts = weight.chunk(len(grams))
        shared = _whole_grid(weight, args)
        return combined(self._one(part, gram, args, row.name, shared) for part, gram in zip(parts, grams, strict=True))

    def _experts(self, block: Block, row: PlanRow, inputs: ExpertInputs) -> Quantized:
        """Fused experts, one after the other."""
        weight, args = block.weight(row), _grid(row)
        shared = _whole_grid(weight, args)
        nearest = quantize_scheme(weight, _scheme(row)) if self.fields.experts is ExpertPolicy.ROUND else None
        made = []
        for expert, found in enumerate(inputs.each(row, self.fields.experts)):
            if found is not None:
                made.append(self._one(weight[expert], found.gram, args, f"{row.name}, expert {expert}", shared))
            elif nearest is not None:
                made.append(_part(nearest, expert))
        return combined(made, torch.stack)

    def _one(self, weight: Tensor, gram: Tensor, args: QuantizationArgs, name: str, shared: Grids | None) -> Quantized:
        """One weight with a Hessian of its own."""
        factored = factor(gram, self.fields.damping, self.fields.act_order, name)
        return gptq(weight, factored, args, self.fields.block_size, shared)


def _sharing(stage: Stage) -> Iterator[list[PlanRow]]:
    """Rows that read the same input and have the same grid; others alone."""
    together: dict[object, list[PlanRow]] = {}
    for row in stage.rows:
        args = _grid(row)
        alone = row.kind is WeightKind.EXPERTS or args.strategy == "tensor"
        key = row.name if alone else (id(stage.inputs[row.name]), args.model_dump_json(), row.dtype)
        together.setdefault(key, []).append(row)
    yield from together.values()


def _whole_grid(weight: Tensor, args: QuantizationArgs) -> Grids | None:
    """The one grid of a weight that is solved in parts, or None where each row has its own."""
    if args.strategy != "tensor":
        return None
    scale, zero = uniform_grid(*torch.aminmax(weight), args, weight.dtype)
    return Grids(scale.reshape(1), None if zero is None else zero.reshape(1))


def _part(whole: Quantized, expert: int) -> Quantized:
    """The result of one expert."""
    if whole.scale.ndim == 1:
        return Quantized(whole.codes[expert], whole.scale, whole.zero_point)
    zeros = None if whole.zero_point is None else whole.zero_point[expert]
    return Quantized(whole.codes[expert], whole.scale[expert], zeros)


def _scheme(row: PlanRow) -> schemes.Scheme:
    """A row's scheme."""
    return layout_of(row).scheme


def _grid(row: PlanRow) -> QuantizationArgs:
    """A row's grid."""
    return layout_of(row).weights
