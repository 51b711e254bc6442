"""AWQ on the weights of a block: scales group by group, then clipped ranges weight by weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...calibration.block import Block
from ...calibration.experts import SECOND, ExpertInputs, collect_experts
from ...calibration.gram import Inputs, collect
from ...calibration.runner import unreached
from ...calibration.scaling import Part, ScaleGroup, apply, find_groups
from ...core.config import QuantFields
from ...core.errors import ConfigError
from ...core.plan import PlanRow
from ...core.registry import Quantized
from ...core.weights import WeightKind
from ...modules.packed import layout_of
from ...modules.results import check_values, combined
from ..rtn.method import quantize, quantize_scheme
from .config import AWQFields
from .search import Consumer, best_scales, clipped_ranges, quantize_ranges

SEARCHED = (WeightKind.LINEAR, WeightKind.CONV1D, WeightKind.CONV)
"""Kinds of weights whose inputs are known; embedding tables and recurrent layers are rounded to nearest."""

logger = logging.getLogger(__name__)


def compressor(fields: QuantFields) -> AWQ:
    """What compresses the blocks of a model.

    Raises:
        ConfigError: The fields are another method's.
    """
    if not isinstance(fields, AWQFields):
        raise ConfigError(f"{type(fields).__name__} has no scale grid.")
    return AWQ(fields)


class AWQ:
    """Scales and quantizes one block after the other (Lin et al. 2023, arXiv:2306.00978, §3.2).

    The function of a block does not change while it is scaled, so its inputs are gathered once, before: errors are
    divided by the scales instead.

    Args:
        fields: The configuration's fields.
    """

    reference = False
    sequential = True
    call_tokens = 2048

    def __init__(self, fields: AWQFields) -> None:
        self.fields = fields

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Install all rows of a block.

        Raises:
            CalibrationError: Inputs are not finite or never reach a weight, or too few tokens reach an expert.
            WeightValueError: A weight is not finite.
        """
        for row in block.rows:
            check_values(row.name, block.weight(row))
        found = find_groups(block)  # before statistics are there, since it copies 16-bit blocks to float32
        inputs, experts = collect(block), collect_experts(block, block.rows)
        missing = [name for name, one in inputs.items() if not one.tokens]
        if missing:
            raise unreached(missing)
        work = _Work(block, self.fields, inputs, experts)
        self._report(block, found)
        # Experts first: what their second projection reads is recomputed from the first as it is.
        for group in sorted(found, key=lambda group: len(group.shape), reverse=True):
            work.scale(group)
        for row in block.rows:
            if row.name not in block.finished.packed:
                work.finish(row)

    def _report(self, block: Block, groups: Sequence[ScaleGroup]) -> None:
        """Say how many weights can't be scaled."""
        scaled = {part.name for group in groups for part in group.consumers}
        rest = [row.name for row in block.rows if block.local(row.key) not in scaled]
        if rest:
            logger.info(
                "%s: no layer before %d of %d weights can take scales, they are only clipped: %s.",
                block.path or "the model",
                len(rest),
                len(block.rows),
                ", ".join(rest),
            )


@dataclass
class _Work:
    """The work on one block.

    Attributes:
        block: The block.
        fields: The configuration's fields.
        inputs: Statistics of what weights read before anything was scaled, by row.
        experts: Likewise of fused experts, by module.
        scaled: What columns of a weight were multiplied by so far, by row.
    """

    block: Block
    fields: AWQFields
    inputs: dict[str, Inputs]
    experts: dict[str, ExpertInputs]
    scaled: dict[str, Tensor] = field(default_factory=dict)

    def scale(self, group: ScaleGroup) -> None:
        """Search the scales of a group and fold them in."""
        if len(group.shape) == 2:
            self._scale_experts(group)
            return
        consumers, sizes = [], []
        for part in group.consumers:
            row = self._row(part)
            if row is None:
                continue
            gram, tokens = self._shared_gram(row)
            weight = self.block.weight(row)
            sizes.append(_by_channel((gram.diagonal() / max(1, tokens)).sqrt(), part, group.shape[0]))
            consumers += [Consumer(one, gram, _grid(row), part.index) for one in weight.view(-1, *weight.shape[-2:])]
        scales, gain = self._best(consumers, torch.stack(sizes).amax(0))
        if gain < 1.0:
            self._fold(group, scales)

    def _scale_experts(self, group: ScaleGroup) -> None:
        """Scale and quantize the second projection of fused experts, one after the other."""
        row = self._row(group.consumers[0])
        if row is None or _grid(row).strategy == "tensor":
            return
        weight, scales, parts = self.block.weight(row), torch.ones(group.shape), []
        for expert, found in enumerate(self.experts[row.module].each(row, self.fields.experts)):
            if found is None:
                parts.append(quantize(weight[expert], _grid(row)))
                continue
            size = (found.gram.diagonal() / max(1, found.tokens)).sqrt()
            best, gain = self._best([Consumer(weight[expert], found.gram, _grid(row))], size)
            scales[expert] = best if gain < 1.0 else 1.0
            scaled = (weight[expert].float() * scales[expert]).to(weight.dtype)
            parts.append(self._quantized(row, scaled, found.gram, scales[expert]))
        self._fold(group, scales)
        self.block.install(row, combined(parts, torch.stack))

    def finish(self, row: PlanRow) -> None:
        """Clip, quantize and install one weight."""
        weight, columns = self.block.weight(row), self.scaled.get(row.name)
        if row.kind is WeightKind.EXPERTS:
            self.block.install(row, self._finished_experts(row, weight, columns))
        elif row.kind not in SEARCHED or _grid(row).strategy == "tensor":
            self.block.install(row, quantize_scheme(weight, layout_of(row).scheme))
        else:
            gram = self.inputs[row.name].gram
            if gram.ndim == 2:
                self.block.install(row, self._quantized(row, weight, gram, columns))
            else:
                chunks = zip(weight.chunk(len(gram)), gram, strict=True)
                self.block.install(row, combined(self._quantized(row, one, part) for one, part in chunks))

    def _finished_experts(self, row: PlanRow, weight: Tensor, columns: Tensor | None) -> Quantized:
        """Fused experts, clipped and quantized one after the other; to nearest where all share a grid."""
        experts = self.experts[row.module].each(row, self.fields.experts)
        if _grid(row).strategy == "tensor":
            return quantize(weight, _grid(row))
        parts = [
            quantize(one, _grid(row)) if found is None else self._quantized(row, one, found.gram, columns)
            for one, found in zip(weight, experts, strict=True)
        ]
        return combined(parts, torch.stack)

    def _quantized(self, row: PlanRow, weight: Tensor, gram: Tensor, columns: Tensor | None = None) -> Quantized:
        """Rows × columns on their grid, clipped if asked for; `columns` is what they were multiplied by."""
        args = _grid(row)
        if not self.fields.clip:
            return quantize(weight, args)
        return quantize_ranges(weight, *clipped_ranges(weight, gram, args, columns), args)

    def _best(self, consumers: Sequence[Consumer], size: Tensor) -> tuple[Tensor, float]:
        """Scales for weights that share them, and their relative error."""
        return best_scales(consumers, size, self.fields.grid, self.fields.clip)

    def _fold(self, group: ScaleGroup, scales: Tensor) -> None:
        """Fold scales into the block and note what its weights now read."""
        applied = apply(self.block, group, scales)
        for part in group.consumers:
            row, columns = self._row(part), group.columns(part, applied)
            if row is not None:
                self.scaled[row.name] = columns
            owner, _, parameter = part.name.rpartition(".")
            for path, experts in self.experts.items():
                if self.block.local(path) == owner and parameter != SECOND:
                    experts.scales = columns

    def _row(self, part: Part) -> PlanRow | None:
        """The planned row of a consumer, or None where it is kept."""
        return next((row for row in self.block.rows if self.block.local(row.key) == part.name), None)

    def _shared_gram(self, row: PlanRow) -> tuple[Tensor, int]:
        """The Gram matrix and tokens of a weight's input; of fused experts, of all tokens, routed or not."""
        if row.kind is not WeightKind.EXPERTS:
            return self.inputs[row.name].gram, self.inputs[row.name].tokens
        found = self.experts[row.module].inputs(0, row.parameter, row.shape[-1], everything=True)
        found.finish(row.name)
        return found.gram, found.tokens


def _grid(row: PlanRow) -> QuantizationArgs:
    """A row's grid."""
    return layout_of(row).weights


def _by_channel(size: Tensor, part: Part, channels: int) -> Tensor:
    """The root mean square over the columns of each channel."""
    if part.index is None:
        return size
    squares = torch.zeros(channels).index_add_(0, part.index, size.square())
    return (squares / torch.bincount(part.index, minlength=channels).clamp_min(1)).sqrt()
