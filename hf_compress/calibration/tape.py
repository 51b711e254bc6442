"""What one call of a block computes, as a list of operations that can be run again piece by piece for other calls.

The list is recorded by running the block once under a dispatch mode; nothing is traced symbolically, and no
architecture is known. It holds for all calls with the same signature, provided that nothing in it depends on values: a
block that reads numbers out of tensors, draws random ones or changes its arguments is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.plan import PlanRow
from ..core.weights import WeightKind
from .block import Block, Call, first_tensor
from .experts import routing_of
from .gram import input_of
from .held import Held

HIDDEN = "hidden"
"""Slot of a call's activations."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class UnsuitableBlockError(Exception):
    """A block that can't be recorded; says why."""


@dataclass(frozen=True)
class Ref:
    """A value of a tape, by its number."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        target: What is called: an operator, or a module that is not looked into.
        args: Its arguments, values as `Ref`; parameters, buffers and constants as they are.
        kwargs: Likewise.
        outs: Numbers of the tensors that it returns.
        done: Values that nothing reads afterwards.
    """

    target: Callable[..., Any]
    args: Any
    kwargs: Any
    outs: tuple[int, ...]
    done: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """A module with planned weights is about to run.

    Attributes:
        path: The module's path in the model.
        position: Number of nodes before it.
        values: Numbers of its input, and of experts' routing.
    """

    path: str
    position: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Pause:
    """Where to stop: before the first of some modules whose inputs are all there.

    Attributes:
        position: Number of nodes before it.
        reads: The modules.
    """

    position: int
    reads: tuple[Read, ...]

    @property
    def shared(self) -> list[list[Read]]:
        """The modules, those with the same input together."""
        groups: dict[tuple[int, ...], list[Read]] = {}
        for read in self.reads:
            groups.setdefault(read.values, []).append(read)
        return list(groups.values())


@dataclass
class Tape:
    """What calls of one signature compute.

    Attributes:
        nodes: Operations in order.
        slots: Number of the value of each tensor among the arguments, by slot.
        pauses: Where to stop.
        output: Number of the block's output.
    """

    nodes: list[Node]
    slots: dict[str, int]
    pauses: list[Pause]
    output: int

    @property
    def structure(self) -> tuple[Any, ...]:
        """Which modules are met at each pause and which of them share inputs; the same for all calls of a block."""
        return tuple(tuple(tuple(read.path for read in group) for group in pause.shared) for pause in self.pauses)

    def start(self, call: Call) -> dict[int, Tensor | Held]:
        """The values of a call before the first node; those that are read, that is."""
        given = {name: value for name, value in slots(call) if isinstance(value, Tensor)}
        used = {ref.index for node in self.nodes for ref in _leaves((node.args, node.kwargs), Ref)} | {self.output}
        used |= {index for pause in self.pauses for read in pause.reads for index in read.values}
        return {index: given[name] for name, index in self.slots.items() if index in used}

    def run(self, values: dict[int, Tensor | Held], start: int, stop: int) -> None:
        """Run some nodes.

        Args:
            values: Values that are still needed, by number; changed in place.
            start: First node.
            stop: Node to stop before.
        """
        restored: dict[int, Tensor] = {}

        def value(ref: Ref) -> Tensor:
            held = values[ref.index]
            if isinstance(held, Tensor):
                return held
            if ref.index not in restored:
                restored[ref.index] = held.restore()
            return restored[ref.index]

        for node in self.nodes[start:stop]:
            result = node.target(*_mapped(node.args, Ref, value), **_mapped(node.kwargs, Ref, value))
            values.update(zip(node.outs, _leaves(result, Tensor), strict=True))
            for index in node.done:
                values.pop(index, None)
                restored.pop(index, None)


def slots(call: Call) -> Iterator[tuple[str, Any]]:
    """The arguments of a call, tuples, lists and dictionaries taken apart."""
    yield HIDDEN, call.hidden
    yield from _named("args", call.args)
    yield from _named("kwargs", call.kwargs)


def signature(call: Call) -> tuple[Any, ...]:
    """What calls have in common that do the same operations: shapes, types, and everything that is no tensor."""
    first: dict[int, int] = {}
    made: list[tuple[Any, ...]] = []
    for number, (name, value) in enumerate(slots(call)):
        if isinstance(value, Tensor):
            same = first.setdefault(id(value), number)
            made.append((name, tuple(value.shape), value.stride(), value.dtype, same))
        else:
            made.append((name, type(value), value if isinstance(value, _PLAIN) else id(value)))
    return tuple(made)


def record(block: Block, rows: Iterable[PlanRow], call: Call) -> Tape:
    """Run a call of a block once and write down what it computes.

    Args:
        block: The block.
        rows: Weights before whose modules to pause.
        call: The call.

    Raises:
        UnsuitableBlockError: It can't be run piece by piece.
    """
    owners = {row.module: row for row in rows}
    recorder = _Recorder(block.module, call)
    handles = []
    for path, row in owners.items():
        module = block.owner(row)
        before, after = recorder.hooks(path, opaque=row.kind is WeightKind.EXPERTS)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if row.kind is WeightKind.EXPERTS:
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with recorder:
            output = first_tensor(recorder.output(call, block.module))
    finally:
        for handle in handles:
            handle.remove()
    made = recorder.tape(output, owners)
    recorder.living.clear()  # whose callbacks would keep the recorder, and with it the block's weights
    return made


class _Recorder(TorchDispatchMode):
    """Writes operations down while they are done. A tensor is told by its identity as long as it lives.

    Args:
        module: The block.
        call: The call.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.reads: list[Read] = []
        self.numbers: dict[int, int] = {}
        self.living: dict[int, weakref.ref[Tensor]] = {}
        self.created: list[int] = []
        self.places: list[int] = []
        self.place_of: dict[int, tuple[int, int]] = {}
        self.written: list[tuple[int, int]] = []
        self.looking = True
        self.constants = {id(value) for value in (*module.parameters(), *module.buffers())}
        given = [(name, value) for name, value in slots(call) if isinstance(value, Tensor)]
        self.slots = {name: self._number(value, -1) for name, value in given}
        owned = (*module.parameters(), *module.buffers(), *(value for _, value in given))
        self.fixed = {value.untyped_storage()._cdata for value in owned}

    def output(self, call: Call, module: nn.Module) -> Tensor:
        """Run the call."""
        return call.run(module)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do one operation and write it down."""
        named = dict(kwargs or {})
        if not self.looking:
            return func(*args, **named)
        _check(func, args, named)
        if func._schema.is_mutable:
            self._written(func, args, named)
        refs = self._refs(args), self._refs(named)
        result = func(*args, **named)
        self._append(func, *refs, result, keep=func._schema.is_mutable)
        return result

    def hooks(self, path: str, opaque: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        """What to do before and after a module with planned weights runs."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = routing_of(args, kwargs) if opaque else (input_of(args, kwargs),)
            if any(id(value) not in self.numbers for value in inputs):
                raise UnsuitableBlockError(f"{path} reads a tensor of unknown origin")
            values = tuple(self.numbers[id(value)] for value in inputs)
            self.reads.append(Read(path, len(self.nodes), values))
            self.looking = not opaque

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            self.looking = True
            self._append(module, self._refs(args), self._refs(kwargs), result, keep=True)

        return before, after

    def tape(self, output: Tensor, owners: Mapping[str, PlanRow]) -> Tape:
        """What was written down.

        Raises:
            UnsuitableBlockError: A module ran not once, or something that has to be kept is written to.
        """
        for path in owners:
            times = sum(read.path == path for read in self.reads)
            if times != 1:
                raise UnsuitableBlockError(f"{path} runs {times} times in a call")
        if id(output) not in self.numbers:
            raise UnsuitableBlockError("its output is a tensor of unknown origin")
        tape = Tape(self.nodes, self.slots, self._pauses(), self.numbers[id(output)])
        since: dict[int, int] = {}
        for place, node in zip(self.places, self.created, strict=True):
            since[place] = min(node, since.get(place, node))
        for place, position in self.written:
            if any(since[place] < pause.position <= position for pause in tape.pauses):
                raise UnsuitableBlockError("it changes a tensor in place that was made before the last pause")
        self._mark_done(tape)
        return tape

    def _pauses(self) -> list[Pause]:
        """Modules in order; one whose input is there already at the last pause joins it."""
        pauses: list[Pause] = []
        for read in self.reads:
            if pauses and all(self.created[index] < pauses[-1].position for index in read.values):
                pauses[-1] = Pause(pauses[-1].position, (*pauses[-1].reads, read))
            else:
                pauses.append(Pause(read.position, (read,)))
        return pauses

    def _mark_done(self, tape: Tape) -> None:
        """Tell each node which values it is the last one to read."""
        last: dict[int, int] = {}
        for number, node in enumerate(tape.nodes):
            last |= dict.fromkeys(node.outs, number)
            last |= {ref.index: number for ref in _leaves((node.args, node.kwargs), Ref)}
        last.pop(tape.output, None)
        for index, number in last.items():
            tape.nodes[number].done.append(index)

    def _append(self, target: Callable[..., Any], args: Any, kwargs: Any, result: Any, keep: bool) -> None:
        """Write one operation down; those that give no tensor and change none are left out."""
        outs = tuple(self._number(value, len(self.nodes)) for value in _leaves(result, Tensor))
        if outs or keep:
            self.nodes.append(Node(target, args, kwargs, outs))

    def _number(self, value: Tensor, node: int) -> int:
        """The number of a value; a new one where it was not seen before."""
        name = id(value)
        if name not in self.numbers:
            self.numbers[name] = len(self.created)
            self.created.append(node)
            memory = value.untyped_storage()._cdata
            place, users = self.place_of.get(memory, (len(self.places), 0))
            self.places.append(place)
            self.place_of[memory] = place, users + 1
            self.living[name] = weakref.ref(value, lambda _: self._gone(name, memory))
        return self.numbers[name]

    def _gone(self, name: int, memory: int) -> None:
        """A tensor is no more: its identity, and that of its memory, may come again."""
        del self.numbers[name], self.living[name]
        place, users = self.place_of.pop(memory)
        if users > 1:
            self.place_of[memory] = place, users - 1

    def _refs(self, arguments: Any) -> Any:
        """Arguments with `Ref` for values."""
        return _mapped(arguments, Tensor, self._ref)

    def _ref(self, value: Tensor) -> Ref | Tensor:
        """How a tensor among the arguments of an operation is written down."""
        if id(value) in self.numbers:
            return Ref(self.numbers[id(value)])
        if id(value) not in self.constants and value.numel() > 1:
            raise UnsuitableBlockError(
                f"it reads a tensor of shape {tuple(value.shape)} that is no argument or parameter"
            )
        return value

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember what an operation writes to.

        Raises:
            UnsuitableBlockError: To an argument of the block, a parameter or a buffer.
        """
        for argument, value in _arguments(func, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for one in _leaves(value, Tensor):
                    memory = one.untyped_storage()._cdata
                    if memory in self.fixed:
                        raise UnsuitableBlockError(f"{func} writes to what it was given")
                    if memory in self.place_of:
                        self.written.append((self.place_of[memory][0], len(self.nodes)))


def _check(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse operations whose result, or its shape, is not a function of shapes alone.

    Raises:
        UnsuitableBlockError: It is one of these.
    """
    given = {argument.name: value for argument, value in _arguments(func, args, kwargs)}
    if torch.Tag.data_dependent_output in func.tags:
        raise UnsuitableBlockError(f"{func} reads values")
    if torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p", 1.0) != 0.0:
        raise UnsuitableBlockError(f"{func} draws random numbers")
    if torch.Tag.dynamic_output_shape in func.tags:
        indices = list(_leaves(given.get("indices"), Tensor))
        if not indices or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise UnsuitableBlockError(f"the shape of {func} depends on values")


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operator's schema with their values, defaults included."""
    for number, argument in enumerate(func._schema.arguments):
        if number < len(args) and not argument.kwarg_only:
            yield argument, args[number]
        else:
            yield argument, kwargs.get(argument.name, argument.default_value)


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of nested arguments, with their places."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _named(f"{name}.{key}", one)
    elif isinstance(value, tuple | list):
        yield f"{name}#", len(value)
        for number, one in enumerate(value):
            yield from _named(f"{name}.{number}", one)
    else:
        yield name, value


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """Everything of a type in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one, kind)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _leaves(one, kind)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dictionaries with everything of a type replaced."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(one, kind, change) for name, one in value.items()}
    if isinstance(value, tuple | list):
        made = [_mapped(one, kind, change) for one in value]
        return made if isinstance(value, list) else tuple(made)
    return value
