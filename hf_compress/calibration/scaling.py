"""Which channels of a block can be scaled without changing its function: found by running it on a few rows.

A candidate is a norm and the weights that read its output, or rows of a layer that reach the columns of a later one
through attention or element by element. What reads what is told by the tensors' memory; which row feeds which column,
by scaling rows with powers of two and looking at the columns. A candidate becomes a group if the block's output stays
as it is under random scales. They are powers of two, so in floating point nothing but a real leak changes anything;
only norms that multiply by 1 + weight round, so 16-bit blocks are run in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import listed
from ..core.plan import PlanRow
from ..core.weights import WeightKind
from .block import Block, Call, first_tensor
from .scale_group import Part, Rejected, ScaleGroup, Survey, apply, trial
from .widen import in_float32, wide_call

__all__ = ["Part", "Rejected", "ScaleGroup", "Survey", "apply", "find_groups", "survey", "trial"]

LOOK_BACK = 4
"""Layers before a reader that are tried as producers of its input: more than query, key and value, or gate and up."""

DIGITS = 16
"""Powers of two that tell rows apart in one run: 2^0 … 2^-15, within float16's range for inputs around 1."""

TOLERANCE = 1e-4
"""Largest relative change of a channel that counts as none: what float32 leaves where 1 + weight is rounded."""

SMALL = 0.1
"""Channels whose values are smaller than the middle channel's times this are compared with those."""

HEAD = 8
"""Smallest width of a head that is tried where query, key and value rows alternate head by head."""

UNEXPLAINED = "its output is proportional neither to its weight nor to 1 + weight, as far as its data type can tell"
"""Why a norm is rejected before its readers are tried."""


@dataclass
class _Reader:
    """A module whose weights multiply a tensor, as it was first called.

    Attributes:
        name: Its name in the block.
        module: The module.
        args: What it was called with.
        kwargs: Likewise.
        output: What it gave.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """Its first tensor."""
        return first_tensor((*self.args, *self.kwargs.values()))

    def parts(self, block: Block) -> list[Part]:
        """Its weights with as many columns as its input, in canonical orientation."""
        planned = {block.local(row.key): row for row in block.rows}
        found = []
        for leaf, value in self.module.named_parameters(recurse=False):
            name = f"{self.name}.{leaf}" if self.name else leaf
            row = planned.get(name)
            if row is None and (value.ndim != 2 or not block.path):
                continue
            transposed = isinstance(self.module, Conv1D) if row is None else row.transposed
            shape = tuple(value.shape)
            if (shape[-2] if transposed else shape[-1]) == self.input.shape[-1]:
                found.append(Part(name, transposed))
        return found


@dataclass
class _Norm(_Reader):
    """A module with a weight per channel."""

    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class _Search:
    """The search in one block.

    Attributes:
        block: The block.
        call: The rows it is run on.
        generator: Of random scales.
        norms: Norms in order of execution.
        readers: Modules with weights in order of execution.
        base: The output of the unchanged block.
        found: The result.
    """

    block: Block
    call: Call
    generator: torch.Generator
    norms: list[_Norm] = field(default_factory=list)
    readers: list[_Reader] = field(default_factory=list)
    base: Tensor = field(default_factory=lambda: torch.empty(0))
    found: Survey = field(default_factory=Survey)

    @property
    def planned(self) -> set[str]:
        """Names in the block of the parameters that are to be quantized."""
        return {self.block.local(row.key) for row in self.block.rows}

    def random(self, shape: Sequence[int]) -> Tensor:
        """Random powers of two from 1/4 to 4."""
        return torch.randint(-2, 3, tuple(shape), generator=self.generator).float().exp2()

    def leak(self, scaled: Sequence[tuple[ScaleGroup, Tensor]]) -> float:
        """How much the block's output changes; see `_difference`."""
        with trial(self.block.module, scaled):
            return _difference(self.call.run(self.block.module), self.base)

    def try_group(self, group: ScaleGroup) -> bool:
        """Take a candidate in if it passes."""
        reason = self.objection(group)
        if not reason:
            self.found.groups.append(group)
            return True
        names = tuple(part.name for part in group.consumers)
        self.found.rejected.append(Rejected(group.producer.name, names, reason))
        return False

    def objection(self, group: ScaleGroup) -> str:
        """Why a candidate can't be a group, or empty."""
        shared = sorted(set(group.parameters) & {self.block.local(name) for name in self.block.shared})
        if shared:
            return f"modules outside of the block own {listed(shared)} too"
        change = self.leak([(group, self.random(group.shape))])
        return "" if change <= TOLERANCE else self.reason(group, change)

    def reason(self, group: ScaleGroup, change: float) -> str:
        """Why a candidate failed: whether its consumers notice, or only something else."""
        names = {part.name.rpartition(".")[0] for part in group.consumers}
        readers = [reader for reader in self.readers if reader.name in names and reader.output is not None]
        with trial(self.block.module, [(group, self.random(group.shape))]), _first_calls(readers) as seen:
            self.call.run(self.block.module)
        same = all(
            _difference(seen[reader.name][1], reader.output) <= TOLERANCE
            for reader in readers
            if reader.output is not None and reader.name in seen
        )
        what = "something else reads it too, such as a residual" if same else "a reader is not proportional to it"
        return f"{what}: the block's output changes by {change:.1%}"


@torch.no_grad()
def survey(block: Block) -> Survey:
    """Find the groups of a block, and what was rejected.

    Args:
        block: The block, with at least one call; it is run on one row of the first, and unchanged afterwards.

    Returns:
        Groups with at least one planned consumer. In a block that is the whole model, all their weights are planned
        ones, since others may belong to finished blocks; a 16-bit one is run as it is, since a copy of it may be too
        large, and rejects its norms that multiply by 1 + weight.
    """
    if not block.calls:
        return Survey()
    search = _Search(block, block.calls[0], torch.Generator().manual_seed(block.seed))
    with in_float32(block.module) if block.path else nullcontext():
        _start(search)
        _trace(search)
        taken = [_norm_group(search, norm) for norm in search.norms]
        _row_groups(search, {key for keys in taken for key in keys})
        _expert_groups(search)
    return search.found


def _start(search: _Search) -> None:
    """Choose the rows to run the block on, and run it on them."""
    first = search.call
    for call in (_small(first), first):
        search.call = wide_call(call) if search.block.path else call
        try:
            search.base = search.call.run(search.block.module)
        except (RuntimeError, ValueError, IndexError):  # a tensor that looked like one entry per row was none
            if call is first:
                raise
        else:
            return


def find_groups(block: Block) -> list[ScaleGroup]:
    """Groups of channels of a block that can be scaled without changing its function; see `survey`."""
    return survey(block).groups


def _difference(value: Tensor, base: Tensor) -> float:
    """Largest absolute difference of a channel relative to its largest absolute value, the worst of all channels.

    Infinite where something is not finite, or where scales led to another number of values, as routing does. Each
    channel has its own measure, since one with massive activations would hide what leaks into the others.
    """
    if value.shape != base.shape:
        return inf
    if not base.numel():
        return 0.0
    width = base.shape[-1] if base.ndim else 1
    sizes = base.abs().reshape(-1, width).amax(0).float()
    changes = (value - base).abs().reshape(-1, width).amax(0).float()
    least = max(SMALL * float(sizes.median()), torch.finfo(torch.float32).tiny)
    worst = float((changes / sizes.clamp_min(least)).max())
    return worst if isfinite(worst) else inf


def _small(call: Call) -> Call:
    """The first row of a call; the call itself where it is of the whole model."""
    if call.hidden is None or len(call.hidden) < 2:
        return call
    count = len(call.hidden)
    return replace(
        call,
        hidden=call.hidden[:1],
        args=_first_row(call.args, count),
        kwargs=_first_row(call.kwargs, count),
        mask=None,
        memory=None,
        memory_mask=None,
        reference=None,
    )


def _first_row(value: Any, count: int) -> Any:
    """Nested values with tensors of `count` rows cut to the first."""
    if isinstance(value, Tensor):
        return value[:1] if value.ndim and len(value) == count else value
    if type(value) in (tuple, list):
        return type(value)(_first_row(one, count) for one in value)
    return {key: _first_row(one, count) for key, one in value.items()} if type(value) is dict else value


@contextmanager
def _first_calls(readers: Sequence[_Reader]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the first call of some modules, by their names."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.setdefault(name, (first_tensor((*args, *kwargs.values())), first_tensor(output)))

        return note

    handles = [reader.module.register_forward_hook(hook(reader.name), with_kwargs=True) for reader in readers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _trace(search: _Search) -> None:
    """Run the block once and note norms and readers in the order in which they run."""
    norms: dict[str, _Norm] = {}
    readers: dict[str, _Reader] = {}

    def hook(name: str, ndim: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            floating = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
            if not floating:
                return
            result = first_tensor(output)
            if ndim == 1:
                norms.setdefault(name, _Norm(name, module, args, kwargs)).outputs.append(result)
            else:
                readers.setdefault(name, _Reader(name, module, args, kwargs, result))

        return note

    handles = []
    for name, module in search.block.module.named_modules():
        sizes = {leaf: value.ndim for leaf, value in module.named_parameters(recurse=False)}
        if sizes.get("weight") == 1 or any(size > 1 for size in sizes.values()):
            kind = 1 if sizes.get("weight") == 1 else 2
            handles.append(module.register_forward_hook(hook(name, kind), with_kwargs=True))
    try:
        search.call.run(search.block.module)
    finally:
        for handle in handles:
            handle.remove()
    search.norms, search.readers = list(norms.values()), list(readers.values())


def _key(value: Tensor) -> tuple[int, int]:
    """What tells a tensor, reshaped or not, from others that are alive."""
    return value.untyped_storage().data_ptr(), value.shape[-1]


def _biases(module: nn.Module, path: str, weight: str, count: int) -> tuple[str, ...]:
    """Names of the parameters that belong to the rows of a weight: `bias`, or `NAME_bias` of fused experts."""
    leaf = "bias" if weight == "weight" else f"{weight}_bias"
    value = module._parameters.get(leaf)
    return () if value is None or value.shape[-1] != count else (f"{path}.{leaf}" if path else leaf,)


def _norm_group(search: _Search, norm: _Norm) -> set[tuple[int, int]]:
    """Try a norm and everything that reads its output; returns the keys of these tensors."""
    keys = {_key(output) for output in norm.outputs}
    channels = norm.module.get_parameter("weight").numel()
    readers = [reader for reader in search.readers if _key(reader.input) in keys]
    choices = [parts for reader in readers if (parts := reader.parts(search.block))]
    if not choices or norm.outputs[0].shape[-1] != channels:
        return keys
    name = f"{norm.name}.weight" if norm.name else "weight"
    biases = _biases(norm.module, norm.name, "weight", channels)
    offset = _offset(search, norm, ScaleGroup(Part(name), 0.0, biases, (), (channels,)))
    if offset is None:
        names = tuple(part.name for parts in choices for part in parts)
        if search.planned & set(names):
            search.found.rejected.append(Rejected(name, names, UNEXPLAINED))
        return keys
    for consumers in product(*choices):
        group = ScaleGroup(Part(name), offset, biases, consumers, (channels,))
        if search.planned & {part.name for part in consumers} and search.try_group(group):
            search.found.rejected = [one for one in search.found.rejected if one.producer != name]
            break
    return keys


def _offset(search: _Search, norm: _Norm, group: ScaleGroup) -> float | None:
    """What a norm adds to its weight before it multiplies by it: 0 or 1; None where neither explains its output."""
    scales = search.random(group.shape)
    base = first_tensor(norm.module(*norm.args, **norm.kwargs)).float()
    for offset in (0.0, 1.0):
        with trial(search.block.module, [(replace(group, offset=offset), scales)]):
            output = first_tensor(norm.module(*norm.args, **norm.kwargs))
        if _difference(output.float() * scales, base) <= TOLERANCE:
            return offset
    return None


def _row_groups(search: _Search, taken: set[tuple[int, int]]) -> None:
    """Try rows of layers and what reads them, tensor by tensor."""
    sets: dict[tuple[int, int], list[int]] = {}
    for number, reader in enumerate(search.readers):
        if _key(reader.input) not in taken:
            sets.setdefault(_key(reader.input), []).append(number)
    for numbers in sets.values():
        readers = [search.readers[number] for number in numbers]
        choices = [parts[0] for reader in readers if len(parts := reader.parts(search.block)) == 1]
        if not search.planned & {part.name for part in choices}:
            continue
        before = search.readers[max(0, numbers[0] - LOOK_BACK) : numbers[0]]
        for producer in reversed(before):
            if _linear(producer.module) and _rows_feed(search, producer, readers[0], tuple(choices)):
                break


def _linear(module: nn.Module) -> bool:
    """Whether a module has one weight, rows × columns or transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def _rows_feed(search: _Search, producer: _Reader, reader: _Reader, consumers: tuple[Part, ...]) -> bool:
    """Try the rows of one layer as the producer of what a later one reads."""
    name = f"{producer.name}.weight" if producer.name else "weight"
    if not search.block.path and name not in search.planned:
        return False
    transposed = isinstance(producer.module, Conv1D)
    count = Part(name, transposed).view(search.block.module).shape[0]
    biases = _biases(producer.module, producer.name, "weight", count)
    for rows in _windows(count, reader.input.shape[-1]):
        size = count if rows is None else len(rows)
        group = ScaleGroup(Part(name, transposed, rows), None, biases, (), (size,))
        feeds, columns = _feeds(search, group, reader)
        if feeds:
            parts = tuple(replace(part, index=columns) for part in consumers)
            return search.try_group(replace(group, consumers=parts))
    return False


def _windows(count: int, columns: int) -> Iterator[Tensor | None]:
    """Rows of a layer that may feed a number of columns; None for all of them."""
    if count <= columns:
        if columns % count == 0:
            yield None
        return
    values = (count - columns) // 2  # fused query, key and value rows: columns + 2 × values
    if count == columns + 2 * values and values and columns % values == 0:
        yield torch.arange(count - values, count)
    if count == 2 * columns:  # fused gate and up rows, either first
        yield torch.arange(columns, count)
        yield torch.arange(columns)
    if count == 3 * columns:  # query, key and value rows of each head
        for width in (size for size in range(HEAD, columns) if columns % size == 0):
            yield torch.arange(count).view(-1, 3, width)[:, 2].flatten()


def _feeds(search: _Search, group: ScaleGroup, reader: _Reader) -> tuple[bool, Tensor | None]:
    """Whether a reader's input is proportional to some rows, and the row of each column (None: the same)."""
    base = reader.input.reshape(-1, reader.input.shape[-1]).float()
    halved = _input_of(search, group, torch.full(group.shape, 2.0), reader)
    if halved is None or not bool(base.any()) or _difference(halved * 2, base) > TOLERANCE:
        return False, None
    channels, place = torch.zeros(base.shape[1], dtype=torch.long), 1
    alive = base.abs().amax(0) > 0
    while place < group.shape[0]:
        digits = torch.arange(group.shape[0]) // place % DIGITS
        scaled = _input_of(search, group, digits.float().exp2(), reader)
        if scaled is None:
            return False, None
        ratio = (scaled.double() * base).sum(0) / (base.double() * base).sum(0).clamp_min(1e-300)
        digit = ratio.clamp_min(2.0**-DIGITS).log2().neg().round()
        if _difference(scaled * digit.exp2().float(), base) > TOLERANCE:
            return False, None
        channels += digit.long() * place
        place *= DIGITS
    same = len(channels) == group.shape[0]
    if same and bool((channels == torch.arange(len(channels)))[alive].all()):
        return True, None
    return bool(alive.all()) and int(channels.max()) < group.shape[0], channels


def _input_of(search: _Search, group: ScaleGroup, scales: Tensor, reader: _Reader) -> Tensor | None:
    """What a module reads under scales, tokens × features; None where they route it other tokens, or none."""
    with trial(search.block.module, [(group, scales)]), _first_calls([reader]) as seen:
        search.call.run(search.block.module)
    value = seen[reader.name][0] if reader.name in seen else None
    if value is None or value.shape != reader.input.shape:
        return None
    return value.reshape(-1, value.shape[-1]).float()


def _expert_groups(search: _Search) -> None:
    """Try rows of fused experts' first weights and columns of their second, inside their own module."""
    rows = [row for row in search.block.rows if row.kind is WeightKind.EXPERTS]
    for module in dict.fromkeys(row.module for row in rows):
        mine = [row for row in rows if row.module == module]
        for first, second in product(mine, mine):
            if first is not second and _try_experts(search, first, second):
                break


def _try_experts(search: _Search, first: PlanRow, second: PlanRow) -> bool:
    """Try rows of one fused weight as what the columns of another read, each expert for itself."""
    count, columns = first.shape[-2], second.shape[-1]
    choices: list[Tensor | None] = [None] if count == columns else []
    if count == 2 * columns:
        rows = torch.arange(count)
        choices = [rows[columns:], rows[:columns], rows[1::2], rows[::2]]
    owner, path = search.block.owner(first), search.block.local(first.module)
    reader = next((one for one in search.readers if one.name == path), None)
    if reader is None or reader.output is None:
        return False
    name, other = search.block.local(first.key), search.block.local(second.key)
    biases = _biases(owner, path, first.parameter, count)
    shape = (first.shape[0], columns)
    for chosen in choices:
        group = ScaleGroup(
            Part(name, first.transposed, chosen), None, biases, (Part(other, second.transposed),), shape
        )
        with trial(search.block.module, [(group, search.random(shape))]):
            output = first_tensor(reader.module(*reader.args, **reader.kwargs))
        if _difference(output, reader.output) <= TOLERANCE:
            return search.try_group(group)
    return False
