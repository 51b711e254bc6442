"""One sequential pass over the blocks of a model: calibrate, compress, go on with what the compressed block gives.

It runs over a live model or over shards on disk. Only one block is dense at a time; what a finished block became is in
the results, from which a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError, listed
from ..core.plan import Plan, PlanRow
from .block import Block, Call, Compressor, Finished
from .capture import (
    Batch,
    NotSequentialError,
    Recording,
    Stack,
    check_finite,
    find_stacks,
    record_next,
    with_first,
)
from .modes import evaluating
from .padding import MASKS, padding_of
from .results import Results, State
from .shared import Sharing
from .sources import LiveSource, WeightSource
from .whole import WholeCall

REST = "(outside of blocks)"
"""Key of the result of what lies outside of all stacks."""


@dataclass
class Pass:
    """One pass over a model.

    Attributes:
        source: Where dense weights come from.
        plan: What to do.
        compressor: What does it.
        batches: Forward arguments, some rows of calibration data each.
        results: Where results are kept.
        seed: Seed of the pass.
        progress: Called with the number of weights done and the number planned.
        done: Names of finished rows.
        steps: Number of weights done, for the progress.
        sharing: Which parameters of the model are one tensor.
    """

    source: WeightSource
    plan: Plan
    compressor: Compressor
    batches: Sequence[Batch]
    results: Results
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    done: set[str] = field(default_factory=set)
    steps: int = 0
    sharing: Sharing = field(init=False)

    def __post_init__(self) -> None:
        self.sharing = Sharing(self.source.model, self.plan.rows)

    @torch.no_grad()
    def run(self) -> Finished:
        """Compress every planned weight; ties after the first are left to the caller.

        Returns:
            Everything that became of the model.

        Raises:
            CalibrationError: Data does not reach a planned weight, or is not finite on the way.
            HFCompressError: A method's own. The source's model is unchanged.
        """
        finished = Finished()
        with evaluating(self.source.model):
            stacks = self._stacks()
            for one in chain(self._all_stacks(stacks), self._rest(stacks)):
                finished.packed |= one.packed
                finished.sqnr |= one.sqnr
                finished.changed |= one.changed
        return finished

    @property
    def rows(self) -> list[PlanRow]:
        """The rows to compress."""
        return [row for row in self.plan.quantized if row.tied_to is None]

    def _stacks(self) -> list[Stack]:
        """The stacks to walk; none where a live model needs no order."""
        if not self.compressor.sequential and isinstance(self.source, LiveSource):
            return []
        return find_stacks(self.source.model, [row.module for row in self.rows])

    def _all_stacks(self, stacks: list[Stack]) -> Iterator[Finished]:
        """Results of all stacks, block by block; stacks that are none are taken out of the list."""
        while stacks:
            try:
                recording = self._record(stacks)
            except NotSequentialError as error:
                stacks.remove(error.stack)
                continue
            if recording is None:
                return
            followed = any(not stack.outputs and stack is not recording.stack for stack in stacks)
            yield from self._walk(recording, followed)

    def _record(self, stacks: Sequence[Stack]) -> Recording | None:
        """What the next stack is called with."""
        blocks = [path for stack in stacks for path in stack.paths]
        firsts = {stack.paths[0]: self.source.block(stack.paths[0]) for stack in stacks if not stack.outputs}
        with self.source.outside(blocks, written=False):
            return record_next(self.source.model, stacks, firsts, self.batches) if firsts else None

    def _walk(self, recording: Recording, followed: bool) -> Iterator[Finished]:
        """Compress the blocks of a stack; `followed` says whether there are other stacks to do."""
        paths = recording.stack.paths
        inside = tuple(f"{path}." for path in paths)
        needed = followed or any(not row.module.startswith(inside) and row.name not in self.done for row in self.rows)
        start = self._resume(recording)
        for path in paths[:start]:
            stored = self.results.get(path)
            if stored is not None:
                self._count(stored)
                yield stored
        for number in range(start, len(paths)):
            last = number == len(paths) - 1
            yield self._block(recording, number, last, needed=needed or not last)
        last_calls = zip(recording.outputs, recording.calls[-1], strict=True)
        pairs = ((output, call.hidden if needed else None) for output, call in last_calls)
        recording.stack.outputs = [with_first(one, torch.empty(0) if value is None else value) for one, value in pairs]

    def _resume(self, recording: Recording) -> int:
        """The number of the first block to compress, its calls carrying the activations before it."""
        paths = recording.stack.paths
        for number in reversed(range(len(paths))):
            state = self.results.state(paths[number])
            if state is not None and all(self.results.get(path) is not None for path in paths[: number + 1]):
                # Nothing was kept where nothing follows.
                for index, call in enumerate(recording.calls[min(number + 1, len(paths) - 1)] if state else ()):
                    call.hidden = state[f"hidden.{index}"]
                    call.reference = state.get(f"reference.{index}")
                return number + 1
        if self.compressor.reference:
            for call in recording.calls[0]:
                call.reference = call.hidden
        return 0

    def _block(self, recording: Recording, number: int, last: bool, needed: bool) -> Finished:
        """Compress one block and hand its activations to the next; `needed` says whether anything reads them."""
        paths, calls = recording.stack.paths, recording.calls[number]
        path = paths[number]
        block = Block(
            index=number,
            path=path,
            module=self.source.block(path),
            rows=tuple(row for row in self.rows if row.module.startswith(f"{path}.")),
            calls=calls,
            seed=self.seed * 1_000_003 + number,
            progress=self._step,
            shared=self.sharing.of_block(path),
            advanced=not needed,
        )
        self._targets(block)
        self._compress(block)
        if not block.advanced:
            block.advance()
        for call in calls:
            check_finite(_hidden(call), f"what {path} makes of the calibration data once it is compressed")
            call.reference, call.target = call.target, None
        state = _state(calls) if needed else {}
        kept = self.results.put(path, block.finished, state, paths[number - 1] if number else None)
        if not last:
            for before, after in zip(calls, recording.calls[number + 1], strict=True):
                after.hidden, after.reference = before.hidden, before.reference
                before.hidden = before.reference = None
        return kept

    def _targets(self, block: Block) -> None:
        """What the uncompressed block makes of the uncompressed model's activations."""
        if self.compressor.reference:
            for call in block.calls:
                call.target = call.run(block.module, call.reference)

    def _compress(self, block: Block) -> None:
        """Let the method work, and check that it has done everything.

        Raises:
            CalibrationError: Data did not reach a weight.
        """
        self.compressor.compress(block)
        missing = [row.name for row in block.rows if row.name not in block.finished.packed]
        if missing:
            raise unreached(missing)
        self.done |= set(block.finished.packed)

    def _rest(self, stacks: Sequence[Stack]) -> Iterator[Finished]:
        """Compress what lies outside of the finished stacks, as one block: the whole model."""
        rows = tuple(row for row in self.rows if row.name not in self.done)
        if not rows:
            return
        stored = self.results.get(REST)
        if stored is not None:
            self._count(stored)
            yield stored
            return
        over = [stack for stack in stacks if stack.outputs]
        model = self.source.model
        ordered = self.compressor.sequential
        outside = self.source.outside([path for stack in over for path in stack.paths], written=True)
        with outside, _unchanged(model, rows if ordered else ()) as journal:
            calls = [WholeCall(model, batch, index, over) for index, batch in enumerate(self.batches)]
            block = _WholeBlock(
                index=0,
                path="",
                module=model,
                rows=rows,
                calls=list(calls),
                seed=self.seed,
                progress=self._step,
                writes=ordered,
                shared=self.sharing.outside([path for stack in over for path in stack.paths]),
                journal=journal,
            )
            if self.compressor.reference:
                for call in block.calls:
                    call.target = call.run(model)
            self._compress(block)
        yield self.results.put(REST, block.finished, {})

    def _count(self, stored: Finished) -> None:
        """Take a stored result into account."""
        self.done |= set(stored.packed)
        for _ in stored.packed:
            self._step()

    def _step(self) -> None:
        """Report one more weight."""
        self.steps += 1
        if self.progress is not None:
            self.progress(self.steps, len(self.rows))


@dataclass
class _WholeBlock(Block):
    """A whole model as one block. It is the source's own, so what is changed is put back afterwards."""

    journal: dict[str, Tensor] = field(default_factory=dict)

    def change(self, name: str, value: Tensor) -> None:
        """Change a parameter or buffer until the pass is over."""
        self._note(name)
        super().change(name, value)

    def rewrite(self, row: PlanRow, parameter: Tensor) -> None:
        """Change a weight until the pass is over."""
        self._note(row.key)
        super().rewrite(row, parameter)

    def _note(self, name: str) -> None:
        """Keep a value as it is before it is changed."""
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        before = {**module._parameters, **module._buffers}.get(leaf)
        if before is not None and name not in self.journal:
            self.journal[name] = before.detach().clone()


def split(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Batches of text as smaller ones, so that what a block computes for one at a time stays small.

    Padded batches with as many rows as tokens lose their last row to a batch of its own: otherwise nothing tells their
    rows from their tokens in models that put time first.

    Args:
        batches: Forward arguments.
        tokens: Most tokens of a batch that has more than one row.
    """
    made: list[Batch] = []
    for batch in batches:
        length = max((value.shape[1] for value in batch.values() if _is_text(value)), default=0)
        counts = {len(value) for value in batch.values() if value.ndim}
        whole = max(counts, default=1)
        rows = min(whole, max(1, tokens // length)) if length and len(counts) == 1 else whole
        for start in range(0, whole, rows):
            part = _part(batch, start, start + rows)
            made.extend(_oblong(part, min(rows, whole - start)) if len(counts) == 1 else [part])
    return made


def _oblong(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch, its last rows apart from the others as long as it has as many rows as tokens in a mask of padding."""
    kept = (padding_of(batch, name) for name in MASKS)
    if rows > 1 and any(mask is not None and mask.shape[1] == rows for mask in kept):
        yield from _oblong(_part(batch, 0, rows - 1), rows - 1)
        yield _part(batch, rows - 1, rows)
    else:
        yield batch


def _part(batch: Batch, start: int, end: int) -> Batch:
    """Some rows of a batch."""
    return {name: value[start:end] if value.ndim else value for name, value in batch.items()}


def _is_text(value: Tensor) -> bool:
    """Whether a tensor holds token ids or a mask of them."""
    return value.ndim == 2 and not value.is_floating_point()


def unreached(names: Sequence[str]) -> CalibrationError:
    """The error for weights that calibration data does not reach."""
    return CalibrationError(
        f"The calibration data never reaches {listed(names)} ({len(names)} weights), so nothing is known about their "
        "inputs. Nothing was changed.",
        f'give data that does, such as images for a vision tower, or skip=["{names[0]}"]',
    )


def _hidden(call: Call) -> Tensor:
    """A call's activations."""
    if call.hidden is None:
        raise ValueError("a call between blocks has activations")
    return call.hidden


def _state(calls: Sequence[Call]) -> State:
    """The activations behind a block, by name."""
    state = {f"hidden.{index}": _hidden(call) for index, call in enumerate(calls)}
    for index, call in enumerate(calls):
        if call.reference is not None:
            state[f"reference.{index}"] = call.reference
    return state


@contextmanager
def _unchanged(model: nn.Module, rows: Sequence[PlanRow]) -> Iterator[dict[str, Tensor]]:
    """Put planned weights, and everything in the journal, back afterwards."""
    journal: dict[str, Any] = {row.key: model.get_parameter(row.key).detach().clone() for row in rows}
    try:
        yield journal
    finally:
        for name, value in journal.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            {**module._parameters, **module._buffers}[leaf].data.copy_(value)  # type: ignore[union-attr]
