"""How much memory of its own quantizing takes, told from shapes: mapped files of weights and results don't count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from ..calibration.capture import find_stacks
from ..calibration.widen import HALF
from ..core.config import Calibration, QuantConfig
from ..core.plan import Plan, PlanRow
from ..core.registry import Method
from ..core.weights import WeightKind

WORKING_COPIES = 3
"""Copies of the largest weight that quantizing needs for a moment: the weight, its rounding, its codes."""

SEQUENCE = 512
"""Tokens per row where the request does not say."""

INNER_VALUES = 3
"""Values per token as wide as the widest weight's input that a block keeps at once, in 16 bits: a gated MLP has both
factors and their product."""

FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes beyond what the process has before it starts.

    Attributes:
        loaded: For a model that stays in memory, packed.
        streamed: From disk to disk.
    """

    loaded: int
    streamed: int


def footprint(model: nn.Module, plan: Plan, config: QuantConfig) -> Footprint:
    """The most memory that carrying out a plan needs; of a live model, beyond the model.

    Args:
        model: The model, or its skeleton on meta.
        plan: Its plan.
        config: The request.
    """
    rows = [row for row in plan.quantized if row.tied_to is None]
    packed = sum(row.planned_bytes for row in rows)
    if config.spec.needs_data:
        working = _calibrated(model, rows, config)
    else:
        working = WORKING_COPIES * max((row.dense_bytes for row in rows), default=0)
    return Footprint(packed + working, working)


def _calibrated(model: nn.Module, rows: Sequence[PlanRow], config: QuantConfig) -> int:
    """The largest of three moments: the first block is recorded, a block is searched, the widest weight is solved.

    Recorded are the activations between blocks, with everything outside of the blocks in memory. While a block is
    searched for channels that can be scaled, it and its inputs are there, and float32 copies of it; a whole model is
    not copied. While a weight is solved, the block and its inputs are there, its second moments, and float32 copies
    of the weight.
    """
    paths = [path for stack in find_stacks(model, [row.module for row in rows]) for path in stack.paths]
    blocks = {path: _bytes(model.get_submodule(path)) for path in paths} or {"": _bytes(model)}
    outside = _bytes(model) - sum(blocks.values())
    block = max(blocks.values())
    tokens = _tokens(config.calibration, model)
    first = next((row for row in rows if row.kind is not WeightKind.EMBEDDING), rows[0])
    itemsize = first.dense_bytes // max(1, first.parameters)
    between = tokens * first.shape[-1] * itemsize
    widest = max(row.shape[-1] for row in rows)
    largest = max(prod(row.shape[-2:]) for row in rows)
    solving = FLOAT32 * (config.spec.gram_copies * widest**2 + WORKING_COPIES * largest)
    inner = INNER_VALUES * tokens * widest * 2
    searching = max((_float32_bytes(model.get_submodule(path), config.spec) for path in paths), default=0)
    return max(outside + block + between, block + between + searching, block + 2 * between + inner + solving)


def _tokens(calibration: Calibration | None, model: nn.Module) -> int:
    """Tokens of calibration data at most; of ready batches, those there are."""
    given = calibration or Calibration()
    batches = given.data if isinstance(given.data, list) else []
    if batches and all(isinstance(batch, dict) for batch in batches):
        shapes = [next((v.shape[:2] for v in batch.values() if isinstance(v, Tensor)), (0, 0)) for batch in batches]
        return sum(prod(shape) for shape in shapes)
    return given.rows * (given.sequence_length or SEQUENCE)


def _float32_bytes(block: nn.Module, method: Method) -> int:
    """Bytes of the float32 copies of a block that a method looks for scales in."""
    copies = max(0, method.float32_copies - all(value.dtype not in HALF for value in block.parameters()))
    return FLOAT32 * copies * sum(value.numel() for value in block.parameters())


def _bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(value.numel() * value.element_size() for value in module.parameters())
