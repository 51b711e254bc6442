"""Hidden states, queries, keys and values of chosen blocks, collected by hooks while a model runs as usual.

No `output_hidden_states` and no `output_attentions`, so sdpa and flash attention stay on, and only what is asked for
is kept. Blocks are found from structure, as calibration does; queries, keys and values by the names of the layers that
make them, or, where one layer makes all three, by a trial which of its outputs are the values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibration.block import first_tensor
from ...calibration.capture import Stack, find_stacks
from ...core.errors import TeacherError, TrainerError, UnsupportedModelError, listed
from ..callback import bare
from .fused import Split, find_split

Place = tuple[int, int]
"""A stack of blocks, and a layer of it: 0 is what its first block reads, L what block L returns, counted from 1."""

_ROLES = ("q", "k", "v")
_ROLE = re.compile(r"(q|k|v)(?:uery|ey|alue)?(?:_?(?:proj|lin|linear|layer|head))?")
_FUSED = re.compile(r".*(?:qkv|query_key_value|c_attn).*", re.IGNORECASE)


@dataclass(frozen=True)
class Attention:
    """The module of a block that makes queries, keys and values.

    Attributes:
        path: Its path in the model.
        layers: Names of its children that make them: three, in this order, or one that makes all.
    """

    path: str
    layers: tuple[str, ...]


class Layers:
    """Where the blocks of a model are.

    Args:
        model: The model, or what DDP has made of it.

    Attributes:
        model: The model.
        stacks: Its stacks of blocks.
        owners: The innermost transformers model around each of them.
        decodes: Whether each of them belongs to the decoder of an encoder-decoder.
        splits: How layers that make queries, keys and values divide their outputs, by the path of the module around
            them; each is found out once.

    Raises:
        UnsupportedModelError: It has no stack of blocks.
        TrainerError: It is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_compiled(model)
        self.model = bare(model)
        self.stacks = block_stacks(self.model)
        self.owners = [_owner(self.model, stack) for stack in self.stacks]
        self.decodes = [_decodes(self.model, stack) for stack in self.stacks]
        self.splits: dict[str, Split] = {}

    def count(self, stack: int) -> int:
        """Blocks of a stack."""
        return len(self.stacks[stack].paths)

    def block(self, place: Place) -> str:
        """Path of the block that returns a layer."""
        return self.stacks[place[0]].paths[place[1] - 1]

    def attention(self, place: Place) -> Attention:
        """What makes the queries, keys and values of a block.

        Raises:
            UnsupportedModelError: Nothing in it looks like that.
        """
        path = self.block(place)
        block = self.model.get_submodule(path)
        found = find_attention(block)
        if found is None:
            kind = type(block).__name__
            names = listed((name for name, _ in block.named_modules() if name), 12)
            raise UnsupportedModelError(
                f"No layers for queries, keys and values in {path} ({kind}), which has {names}.",
                "leave the relations out, or name another layer",
            )
        return Attention(f"{path}.{found.path}" if found.path else path, found.layers)


def block_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model's blocks: those with attention, or all where there is none.

    Args:
        model: The model, dense or packed, on any device.

    Raises:
        UnsupportedModelError: There are none.
    """
    leaves = [path for path, module in model.named_modules() if path and next(module.children(), None) is None]
    found = find_stacks(model, leaves)
    chosen = [stack for stack in found if find_attention(model.get_submodule(stack.paths[0])) is not None] or found
    if not chosen:
        lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks of one class ({listed(lists) or 'no ModuleList at all'}).",
            "distil its logits only",
        )
    return chosen


def find_attention(block: nn.Module) -> Attention | None:
    """The first module of a block that makes queries, keys and values, with a path inside of the block; or None.

    Attention to the block's own input comes first in all decoders, attention to an encoder's output after it.
    """
    for path, module in block.named_modules():
        names = [name for name, _ in module.named_children()]
        roles = {match[1]: name for name in names if (match := _ROLE.fullmatch(name))}
        if len(roles) == len(_ROLES):
            return Attention(path, tuple(roles[role] for role in _ROLES))
        fused = [name for name in names if _FUSED.fullmatch(name)]
        if len(fused) == 1:
            return Attention(path, (fused[0],))
    return None


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a compiled model, whose hooks run once, when it is traced.

    Raises:
        TrainerError: It is compiled.
    """
    inner: nn.Module | None = model
    while inner is not None:
        if "_orig_mod" in inner._modules or inner._compiled_call_impl is not None:
            raise TrainerError(
                f"{type(model).__name__} is compiled, and layers inside of compiled code can't be observed.",
                "train with torch_compile=False, or with the logits loss only: hidden=None, relations=None",
            )
        inner = inner._modules.get("module") if isinstance(inner, nn.parallel.DistributedDataParallel) else None


@dataclass
class Seen:
    """What was collected of one forward pass.

    Attributes:
        layers: Where the blocks are.
        hidden: Hidden states, rows × tokens × features.
        projected: Outputs of the layers that make queries, keys and values, by place and name.
        masks: The mask that the model gives to the blocks of each stack.
    """

    layers: Layers
    hidden: dict[Place, Tensor] = field(default_factory=dict)
    projected: dict[tuple[Place, str], Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    def hidden_of(self, place: Place) -> Tensor:
        """The hidden states of a layer, rows × tokens × features.

        Raises:
            TeacherError: It did not run, or returned no such thing.
        """
        value = self._found(self.hidden, place, place)
        if value.ndim != 3:
            raise UnsupportedModelError(
                f"{self._name(place)} returns {list(value.shape)}, not rows × tokens × features.",
                "distil the logits only: hidden=None",
            )
        return value

    def attention_of(self, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, rows × tokens × features of all heads.

        Raises:
            TeacherError: It did not run.
        """
        found = self.layers.attention(place)
        parts = [self._found(self.projected, (place, name), place) for name in found.layers]
        queries, keys, values = parts if len(parts) == len(_ROLES) else self.layers.splits[found.path].cut(parts[0])
        return queries, keys, values

    def _found(self, known: Mapping[Any, Tensor], key: Any, place: Place) -> Tensor:
        """What was collected under a key."""
        if key not in known:
            raise TeacherError(
                f"{self._name(place)} of {type(self.layers.model).__name__} did not run in this step, so it can't be "
                "compared; layers that are left out at random do so.",
                "set layerdrop (encoder_layerdrop, decoder_layerdrop) to 0.0 in the model's config",
            )
        return known[key]

    def _name(self, place: Place) -> str:
        """A layer for messages."""
        return f"Layer {place[1]} ({self.layers.block((place[0], max(1, place[1])))})"


@contextmanager
def watching(layers: Layers, hidden: Collection[Place], attention: Collection[Place]) -> Iterator[Seen]:
    """Collect features of the forward pass that is run while entered; one of the model's, no more.

    Args:
        layers: Where the blocks are.
        hidden: Layers whose hidden states are wanted.
        attention: Blocks whose queries, keys and values are wanted.

    Returns:
        What is collected. The hooks are gone when it is left, so that the backward pass, in which gradient
        checkpointing runs blocks again, sees none.
    """
    session = _Session(layers, torch.is_grad_enabled() and layers.model.training)
    try:
        for stack in {place[0] for place in (*hidden, *attention)}:
            session.watch_entry(stack, (stack, 0) in hidden)
        for place in dict.fromkeys(hidden):
            session.watch_hidden(place)
        for place in dict.fromkeys(attention):
            session.watch_attention(place)
        yield session.seen
    finally:
        session.remove()


class _Session:
    """The hooks of one forward pass.

    Args:
        layers: Where the blocks are.
        trains: Whether gradients are wanted.
    """

    def __init__(self, layers: Layers, trains: bool) -> None:
        self.layers = layers
        self.trains = trains
        self.seen = Seen(layers)
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()

    def module(self, path: str) -> nn.Module:
        """A module of the model."""
        return self.layers.model.get_submodule(path)

    def watch_entry(self, stack: int, wanted: bool) -> None:
        """Note the mask that the first block of a stack is given and, where wanted, its input."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
            value = next((one for one in given.values() if isinstance(one, Tensor)), None)
            if wanted and value is not None:
                self.put_hidden((stack, 0), value)
            mask = given.get("attention_mask")
            self.seen.masks[stack] = mask if isinstance(mask, Tensor) else None

        first = self.module(self.layers.stacks[stack].paths[0])
        self.handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))

    def watch_hidden(self, place: Place) -> None:
        """Collect what a block returns; of the last one, what the model makes of it as `last_hidden_state`."""
        if place[1] == 0:
            return

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.check_gradients(self.layers.block(place))
            self.put_hidden(place, first_tensor(output))

        def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made = output.get("last_hidden_state") if isinstance(output, Mapping) else first_tensor(output)
            if place in self.seen.hidden and made is not None and made.shape == self.seen.hidden[place].shape:
                self.seen.hidden[place] = made

        self.handles.append(self.module(self.layers.block(place)).register_forward_hook(leave))
        owner = self.layers.owners[place[0]]
        if place[1] == self.layers.count(place[0]) and owner is not None:
            self.handles.append(owner.register_forward_hook(finish))

    def check_gradients(self, path: str) -> None:
        """Refuse outputs without gradients where some are wanted.

        Raises:
            TrainerError: A module runs without.
        """
        if self.trains and not torch.is_grad_enabled():
            raise TrainerError(
                f"Gradient checkpointing hides {path}: with use_reentrant=True it runs without gradients.",
                'activation_checkpointing_kwargs={"use_reentrant": False}',
            )

    def put_hidden(self, place: Place, value: Tensor) -> None:
        """Keep hidden states."""
        if place in self.seen.hidden:
            raise _repeated(self.layers.block((place[0], max(1, place[1]))), "hidden")
        self.seen.hidden[place] = value

    def watch_attention(self, place: Place) -> None:
        """Collect what makes queries, keys and values returns."""
        found = self.layers.attention(place)
        path = self.layers.block(place)
        reads: list[torch.Size] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if reads:
                raise _repeated(path, "relations")
            reads.append(first_tensor((*args, *kwargs.values())).shape[:-1])

        def keeper(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if (place, name) in self.seen.projected:
                    return  # DeBERTa makes keys once more, of its relative positions, after those of the tokens
                self.check_gradients(f"{found.path}.{name}")
                value = first_tensor(output)
                if value.shape[:-1] != reads[0]:  # Longformer's has tokens first, Swin's windows
                    raise UnsupportedModelError(
                        f"{found.path}.{name} makes {list(value.shape)} where {path} reads {list(reads[0])} rows and "
                        "tokens, so which is which can't be told.",
                        "leave these losses out: relations=None",
                    )
                self.seen.projected[place, name] = value

            return keep

        self.handles.append(self.module(path).register_forward_pre_hook(enter, with_kwargs=True))
        owner = self.module(found.path)
        for name in found.layers:
            self.handles.append(owner.get_submodule(name).register_forward_hook(keeper(name)))
        if len(found.layers) == 1 and found.path not in self.layers.splits:
            self._watch_trial(owner, found)

    def _watch_trial(self, owner: nn.Module, found: Attention) -> None:
        """Find out how the layer that makes all three divides its outputs, once, right after it has run."""

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            handle.remove()
            self.layers.splits[found.path] = find_split(module, found.path, found.layers[0], args, kwargs)

        handle = owner.register_forward_hook(run, with_kwargs=True)
        self.handles.append(handle)


def _owner(model: nn.Module, stack: Stack) -> PreTrainedModel | None:
    """The innermost transformers model around a stack."""
    parts = stack.paths[0].split(".")
    paths = (".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1))
    return next((one for one in map(model.get_submodule, paths) if isinstance(one, PreTrainedModel)), None)


def _decodes(model: nn.Module, stack: Stack) -> bool:
    """Whether a stack belongs to the decoder of an encoder-decoder, which may lie inside of adapters."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not inner.config.is_encoder_decoder:
        return False
    block = model.get_submodule(stack.paths[0])
    return all(module is not block for module in inner.get_encoder().modules())


def _repeated(path: str, option: str) -> UnsupportedModelError:
    """The error for a block that is several layers."""
    return UnsupportedModelError(
        f"{path} runs more than once in a forward pass, as layers that share weights do, so its layers can't be told.",
        f"leave these losses out: {option}=None",
    )
