"""What reaches the blocks of a model: found by running it, without a table of architectures.

A stack is a `ModuleList` of blocks of one class that a model runs one after the other. While a model runs on a batch,
its blocks are swapped for a subclass that records what they are called with. The first block of a stack runs for real,
later ones give its output back, so the model passes them all their other arguments, such as masks, rotary embeddings
and T5's position bias. That the second block is called with the very tensor that the first one returned is checked: a
model that does anything in between is handled as one block instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..core.errors import CalibrationError, HFCompressError, first_line
from .block import Call, first_tensor
from .heap import give_back
from .modes import MISFITS
from .padding import all_of, fits, hiding, mask_names, padding_of

Batch = Mapping[str, Tensor]

_SESSION = "hfc_session"


@dataclass(eq=False)
class Stack:
    """Blocks that run one after the other.

    Attributes:
        paths: Their paths in the model, in order.
        outputs: Once it is finished, what the last block returned for each batch.
    """

    paths: tuple[str, ...]
    outputs: list[Any] = field(default_factory=list)


class _Stop(Exception):
    """Ends a forward pass once the last block of a stack was reached."""


class NotSequentialError(Exception):
    """The blocks of a stack don't pass one tensor from each to the next.

    Attributes:
        stack: The stack.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(f"the blocks from {stack.paths[0]} on are not called one after the other")
        self.stack = stack


def find_stacks(model: nn.Module, planned: Collection[str]) -> list[Stack]:
    """Stacks of blocks, the outermost ones, with planned weights in every block.

    Args:
        model: The model; the meta device will do.
        planned: Paths of the modules that own planned weights.
    """
    found: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for stack in found for block in stack.paths)
        if inside or not isinstance(module, nn.ModuleList) or not _alike(module):
            continue
        paths = tuple(f"{path}.{name}" for name, _ in module.named_children())
        if all(any(name.startswith(f"{block}.") for name in planned) for block in paths):
            found.append(Stack(paths))
    return found


def _alike(blocks: nn.ModuleList) -> bool:
    """Whether modules are of one class, each its own, and no mere containers."""
    kinds = {type(block) for block in blocks}
    return len(kinds) == 1 and len(set(map(id, blocks))) == len(blocks) and not kinds & {nn.ModuleList, nn.Sequential}


@dataclass
class Recording:
    """What the blocks of one stack are called with.

    Attributes:
        stack: The stack.
        calls: Of each block, one call per batch; `hidden` is set for the first block only.
        outputs: What the first block returned for each batch, its first tensor left out.
    """

    stack: Stack
    calls: list[list[Call]]
    outputs: list[Any]


def record_next(
    model: nn.Module, stacks: Sequence[Stack], firsts: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> Recording | None:
    """Run a model on all batches up to the next stack that is not finished.

    Args:
        model: The model. Finished stacks give their outputs; blocks of others are not run, so they need no values.
        stacks: All stacks; those with outputs are finished.
        firsts: Dense copies of the first blocks of the others, by path.
        batches: Forward arguments.

    Returns:
        What it is called with; None where no further stack is reached.

    Raises:
        NotSequentialError: Something happens between its blocks.
        CalibrationError: A value on the way is not finite, or the model can't read a batch.
    """
    _check_order(model, stacks, firsts, batches[0])
    recording: Recording | None = None
    for number, batch in enumerate(batches):
        session = _Recorder(stacks, number, firsts, recording.stack if recording else None)
        with swapped(model, stacks, session), suppress(_Stop):
            run_on(model, batch, number)
        if session.stack is None or len(session.found) != len(session.stack.paths):
            if number == 0 and session.stack is None:
                return None
            raise NotSequentialError(session.stack or (recording.stack if recording else stacks[0]))
        if recording is None:
            recording = Recording(session.stack, [[] for _ in session.stack.paths], [])
        own, other = _masks(model, batch, session)
        for calls, call in zip(recording.calls, session.found, strict=True):
            calls.append(replace(call, mask=own, memory_mask=other))
        recording.outputs.append(with_first(session.output, torch.empty(0)))
        give_back()
    return recording


def _check_order(model: nn.Module, stacks: Sequence[Stack], firsts: Mapping[str, nn.Module], batch: Batch) -> None:
    """Run a model to its end on one row, or to its next stack.

    Blocks that are called a second time, as ALBERT's are, form no stack, nor do those whose output has another shape
    than that of the first.

    Raises:
        NotSequentialError: They are.
        CalibrationError: The model can't read the row.
    """
    short, count = first_row(batch)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        short["logits_to_keep"] = 1  # logits of all tokens can take more memory than anything else in the pass
    given = ([with_first(one, first_tensor(one)[:count]) for one in stack.outputs[:1]] for stack in stacks)
    copies = [replace(stack, outputs=outputs) for stack, outputs in zip(stacks, given, strict=True)]
    session = _Recorder(copies, 0, firsts, None)
    session.to_the_end = True
    try:
        with swapped(model, copies, session), suppress(_Stop):
            run_model(model, short)
    except (HFCompressError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        if session.stack is None and not any(stack.outputs for stack in stacks):  # nothing of ours was in the way
            raise _unreadable(model, batch, 0, error) from error
        # what follows expects another shape, as after the stages of a CNN
        raise NotSequentialError(stacks[copies.index(session.stack)] if session.stack else stacks[0]) from error
    except NotSequentialError as error:
        raise NotSequentialError(stacks[copies.index(error.stack)]) from None


def first_row(batch: Batch) -> tuple[dict[str, Any], int | None]:
    """The first row of a batch, and 1; the whole batch, and None, where a row has several entries, such as images."""
    count = 1 if len({len(value) for value in batch.values() if value.ndim}) == 1 else None
    return {name: value[:count] if value.ndim else value for name, value in batch.items()}, count


def run_on(model: nn.Module, batch: Batch, number: int) -> Any:
    """Run a model on calibration data, without a cache.

    Args:
        model: The model.
        batch: Forward arguments.
        number: The batch's number, for the error.

    Raises:
        CalibrationError: The model can't read it.
    """
    try:
        return run_model(model, batch)
    except (HFCompressError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        raise _unreadable(model, batch, number, error) from error


def _unreadable(model: nn.Module, batch: Batch, number: int, error: Exception) -> CalibrationError:
    """The error for a batch that a model can't read."""
    shapes = ", ".join(f"{name} {list(value.shape)} {str(value.dtype)[6:]}" for name, value in batch.items())
    return CalibrationError(
        f"{type(model).__name__} can't read batch {number} of the calibration data ({shapes}): "
        f"{type(error).__name__}: {first_line(error).rstrip('.')}.",
        "try model(**batch): its shapes, data types and values must be what the model reads",
    )


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch, without a cache."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**{**extra, **batch})


class _Session:
    """What swapped blocks do when they are called."""

    def reached(self, stack: int, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block returns."""
        raise NotImplementedError


class Replay(_Session):
    """Finished stacks give their outputs for one batch.

    Args:
        stacks: All stacks.
        number: The batch's number.
    """

    def __init__(self, stacks: Sequence[Stack], number: int) -> None:
        self.stacks = stacks
        self.number = number

    def reached(self, stack: int, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stack's output, of all its blocks: the last one's is what counts."""
        return self.stacks[stack].outputs[self.number]


class _Recorder(Replay):
    """Records one stack: the given one, or the first unfinished one that is reached."""

    def __init__(
        self, stacks: Sequence[Stack], number: int, firsts: Mapping[str, nn.Module], stack: Stack | None
    ) -> None:
        super().__init__(stacks, number)
        self.firsts = firsts
        self.stack = stack
        self.found: list[Call] = []
        self.given: Mapping[str, Any] = {}
        self.output: Any = None
        self.to_the_end = False

    def reached(self, stack: int, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the first block, for all blocks of the stack."""
        own = self.stacks[stack]
        if own.outputs:
            return super().reached(stack, index, block, args, kwargs)
        self.stack = self.stack or own
        if own is not self.stack and len(self.found) == len(self.stack.paths):
            raise _Stop
        if own is not self.stack or index != len(self.found):
            raise NotSequentialError(self.stack)
        call = _call(block, args, kwargs)
        if index == 0:
            self._start(call, args, kwargs)
        elif call.hidden is not first_tensor(self.output):
            raise NotSequentialError(own)
        self.found.append(call if index == 0 else replace(call, hidden=None))
        if index == len(own.paths) - 1 and not self.to_the_end:
            raise _Stop
        return self.output

    def _start(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the first block, and note by what names it is given what."""
        if self.stack is None or call.hidden is None or not call.hidden.is_floating_point():
            raise NotSequentialError(self.stack or self.stacks[0])
        path = self.stack.paths[0]
        check_finite(call.hidden, f"what reaches {path}")
        self.given = _arguments(self.firsts[path], args, kwargs)
        self.output = self.firsts[path](*args, **kwargs)
        if first_tensor(self.output).shape != call.hidden.shape:
            raise NotSequentialError(self.stack)


def check_finite(value: Tensor, what: str) -> None:
    """Refuse activations that are not finite.

    Raises:
        CalibrationError: There are NaN or infinite values.
    """
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise CalibrationError(
            f"{what} holds {bad} values that are NaN or infinite, of {value.numel()}.",
            "check the model's weights and the calibration data; models of 16 bits may overflow: "
            "load it with dtype=torch.float32",
        )


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A block's call; its first parameter is what it works on. Calls are repeated, so they go without a cache."""
    name = next(iter(list(inspect.signature(_base(type(block)).forward).parameters)[1:]), "")
    memory = _tensor(_arguments(block, args, kwargs).get("encoder_hidden_states"))
    kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    if args:
        others = tuple(None if isinstance(value, Cache) else value for value in args[1:])
        return Call(_tensor(args[0]), None, others, kwargs, memory=memory)
    rest = {key: value for key, value in kwargs.items() if key != name}
    return Call(_tensor(kwargs.get(name)), name, (), rest, memory=memory)


def _arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a block is called with, by name."""
    bound = inspect.signature(_base(type(block)).forward).bind(block, *args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def _tensor(value: Any) -> Tensor | None:
    """A tensor, or None for anything else."""
    return value if isinstance(value, Tensor) else None


def _masks(model: nn.Module, batch: Batch, session: _Recorder) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens count for the blocks of a stack, and which of those that they read of an encoder."""
    call = session.found[0]
    if call.memory is None or call.hidden is None:
        return _fitting(batch, "attention_mask", call.hidden, session, "attention_mask"), None
    own, read = mask_names(model, batch)
    mask = _fitting(batch, own, call.hidden, session, "attention_mask")
    memory_mask = _fitting(batch, read, call.memory, session, "encoder_attention_mask")
    return all_of(call.hidden) if mask is None else mask, memory_mask


def _fitting(batch: Batch, name: str | None, value: Tensor | None, session: _Recorder, argument: str) -> Tensor | None:
    """A mask of the rows and tokens of a value, if the data has padding: the batch's own, or else the block's.

    A model that makes other tokens of its data, such as frames of sound, tells its blocks which of these count.

    Args:
        batch: Forward arguments.
        name: The mask among them.
        value: What the blocks work on, or read of an encoder.
        session: What has recorded them.
        argument: The blocks' own argument for a mask of the value.

    Raises:
        CalibrationError: The blocks have a mask that leaves something out, but it is of other tokens too.
    """
    kept = padding_of(batch, name)
    if kept is None or value is None or fits(kept, value):
        return None if value is None else kept
    told = hiding(_tensor(session.given.get(argument)), len(value))
    if told is None or fits(told, value):
        return told
    path = session.stack.paths[0] if session.stack else ""
    raise CalibrationError(
        f"What {path} reads has {_size(value)} tokens, its {argument} {_size(told)}, {name} of the calibration data "
        f"{_size(kept)}: which of them are padding can't be told.",
        "give rows of equal length, or batches of one row, without padding",
    )


def _size(value: Tensor) -> str:
    """Rows and tokens."""
    return " × ".join(map(str, value.shape[:2]))


def with_first(output: Any, value: Tensor) -> Any:
    """A block's output with another first tensor."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):
        name = next(key for key, entry in output.items() if isinstance(entry, Tensor))
        return type(output)(**{**output, name: value})
    position = next(index for index, entry in enumerate(output) if isinstance(entry, Tensor))
    return (*output[:position], value, *output[position + 1 :])


@contextmanager
def swapped(model: nn.Module, stacks: Sequence[Stack], session: _Session) -> Iterator[None]:
    """While entered, blocks of stacks ask a session instead of running.

    Args:
        model: The model; its blocks have their own class again afterwards.
        stacks: The stacks.
        session: What answers.
    """
    places = [(stack, index) for stack, one in enumerate(stacks) for index in range(len(one.paths))]
    blocks = [model.get_submodule(stacks[stack].paths[index]) for stack, index in places]
    for block, place in zip(blocks, places, strict=True):
        vars(block)[_SESSION] = (session, *place)
        block.__class__ = _swapped_class(type(block))  # type: ignore[arg-type] # nn.Module is hashable
    try:
        yield
    finally:
        for block in blocks:
            object.__setattr__(block, "__class__", _base(type(block)))
            vars(block).pop(_SESSION, None)


class _Swapped(nn.Module):
    """Mixed in front of a block's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the session says."""
        session, stack, index = vars(self)[_SESSION]
        return session.reached(stack, index, self, args, kwargs)


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """The class before swapping."""
    return vars(kind).get("hfc_block", kind)


@functools.cache
def _swapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a block's class that asks a session."""
    return type(base.__name__, (_Swapped, base), {"__module__": base.__module__, "hfc_block": base})
