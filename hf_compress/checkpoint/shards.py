"""A checkpoint on disk as a source of weights: blocks of a model that as a whole is never in memory.

Names, conversions, data types and ties are those that transformers' loader would give; see `WeightSource`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.hub import cached_file

from ..core.errors import CorruptCheckpointError, IncompleteLoadError, listed
from .record import open_weights
from .stock import load_source


def safetensors_files(source: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in the order of their names; none if they have another format.

    Args:
        source: Directory or Hub id.

    Raises:
        CorruptCheckpointError: The index is damaged.
    """
    index = _file(source, "model.safetensors.index.json")
    if index is None:
        single = _file(source, "model.safetensors")
        return [] if single is None else [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{index} is no index of weights: {error!r}.", "download it again") from None
    found = [(name, _file(source, str(name))) for name in names]
    lost = [str(name) for name, file in found if file is None]
    if lost:
        raise CorruptCheckpointError(f"{index} lists {listed(lost)}, which is not there.", "download it again")
    return [file for _, file in found if file is not None]


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a directory or of a Hub id, or None."""
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


@dataclass(frozen=True)
class _Group:
    """Tensors on disk that become one or more tensors of the model.

    Attributes:
        target: Name in the model, of the first of them.
        converter: How transformers converts them; None for one tensor that is only renamed.
        parts: Names on disk, with the converter's pattern that each matched.
    """

    target: str
    converter: WeightConverter | None
    parts: list[tuple[str, str]] = field(default_factory=list)


class Shards:
    """Tensors of safetensors files under the names of a model.

    Args:
        files: The files.
        model: A skeleton of the model on meta, with the shapes and data types wanted.

    Raises:
        CorruptCheckpointError: A file is damaged.
    """

    def __init__(self, files: Iterable[Path], model: PreTrainedModel) -> None:
        self._model = model
        self._types = {name: value.dtype for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        self._files: dict[str, Path] = {}
        for file in files:
            with open_weights(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        self._groups = self._grouped()
        self._targets: dict[str, str] = {}
        for group in self._groups.values():
            made = [group.target] if group.converter is None else self._converted(group, self._shape)
            self._targets |= dict.fromkeys(made, group.target)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor for a name in the model."""
        return name in self._targets

    def read(self, names: Iterable[str], mapped: bool = False) -> dict[str, Tensor]:
        """Tensors by their names in the model, in its data types.

        Args:
            names: Names in the model; those that are made of the same tensors on disk are best asked for together.
            mapped: Whether values that need no conversion may be pages of the file, not to be written to; otherwise
                all are in memory of their own.
        """
        wanted = dict.fromkeys(names)
        found: dict[str, Tensor] = {}
        get = partial(self._value, copy=not mapped)
        for target in dict.fromkeys(self._targets[name] for name in wanted):
            made = self._converted(self._groups[target], get)
            found |= {name: value for name, value in made.items() if name in wanted}
        return found

    def _grouped(self) -> dict[str, _Group]:
        """Tensors on disk by the name in the model of the first tensor that they become, as transformers does it."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state = dict.fromkeys(self._types, True)
        prefix = self._model.base_model_prefix
        groups: dict[str, _Group] = {}
        for name in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target in state:
                converter = None if pattern is None else by_pattern[pattern]
                groups.setdefault(target, _Group(target, converter)).parts.append((name, pattern or name))
        return groups

    def _converted(self, group: _Group, get: Callable[[str, torch.dtype], Tensor]) -> dict[str, Tensor]:
        """What a group becomes, by name in the model.

        Args:
            group: The group.
            get: Gives a tensor for a name on disk and a data type.
        """
        dtype = self._types[group.target]
        if group.converter is None:
            return {group.target: get(group.parts[-1][0], dtype)}
        mapping = deepcopy(group.converter)
        for name, pattern in group.parts:
            mapping.add_tensor(group.target, name, pattern, partial(get, name, dtype))
        made = mapping.convert(group.target, model=self._model, config=self._model.config)
        single = ((name, value[0] if isinstance(value, list) else value) for name, value in made.items())
        return {name: value.contiguous() for name, value in single}

    def _value(self, name: str, dtype: torch.dtype, copy: bool) -> Tensor:
        """A tensor on disk; copied, no page of the file stays in memory."""
        with open_weights(self._files[name]) as opened:
            value: Tensor = opened.get_tensor(name)
            return value.to(dtype, copy=copy)

    def _shape(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor on disk without values."""
        with open_weights(self._files[name]) as opened:
            return torch.empty(opened.get_slice(name).get_shape(), dtype=dtype, device="meta")


class ShardSource:
    """A transformers checkpoint on disk, of which one block at a time is in memory.

    Non-persistent buffers, such as rotary frequencies, have values in the skeleton from the start: they are small, and
    transformers computes them.

    Args:
        architecture: The model's class.
        source: Directory or Hub id, with weights in safetensors files.

    Raises:
        IncompleteLoadError: Weights are missing (they would be random) or have other shapes.
        ModelNotFoundError: There are no such weights.
        CorruptCheckpointError, UnsupportedModelError: As their names say.
    """

    def __init__(self, architecture: type[PreTrainedModel], source: str | Path) -> None:
        self.files = tuple(safetensors_files(source))
        self._model = load_source(architecture, source, device_map={"": "meta"})
        self._shards = Shards(self.files, self._model)
        self._tie()
        self._compute()
        self._names = {name: held for held in _names(self._model) for name in held}
        lost = [held[0] for held in _names(self._model) if self._on_meta(held[0]) and self._stored(held) is None]
        if lost:
            raise IncompleteLoadError(
                f"The weights files of {str(source)!r} have nothing for {listed(lost)}.",
                "load a complete checkpoint of this architecture",
            )

    @property
    def model(self) -> PreTrainedModel:
        """The skeleton on the meta device."""
        return self._model

    def block(self, path: str) -> nn.Module:
        """A dense copy of a submodule in evaluation mode; empty path for the whole model."""
        module = deepcopy(self._model.get_submodule(path))
        head = f"{path}." if path else ""
        self._fill(module, head, list(_state(module)))
        return module.eval().requires_grad_(False)

    @contextmanager
    def outside(self, stacks: Sequence[str], written: bool) -> Iterator[None]:
        """While entered, what lies outside of some submodules has values; afterwards it is on meta again."""
        inside = tuple(f"{stack}." for stack in stacks)
        names = [name for name in _state(self._model) if not name.startswith(inside)]
        before: list[tuple[str, Tensor]] = []
        try:
            before.extend(self._fill(self._model, "", names, mapped=not written))
            yield
        finally:
            for name, value in before:
                _put(self._model, name, value)

    def _fill(
        self, module: nn.Module, head: str, names: Sequence[str], mapped: bool = False
    ) -> list[tuple[str, Tensor]]:
        """Give values to parameters and buffers on meta.

        Args:
            module: The module to change.
            head: What its names have in front in the model.
            names: Names of what to fill, in the module.
            mapped: Whether values may be pages of the files, not to be written to.

        Returns:
            What was there before, by name.
        """
        old = {name: value for name, value in _state(module).items() if name in set(names) and value.is_meta}
        stored = {name: self._stored(self._names[f"{head}{name}"]) for name in old}
        values = self._shards.read(dict.fromkeys(name for name in stored.values() if name is not None), mapped)
        made: dict[int, Tensor] = {}
        for name, value in old.items():
            source = stored[name]
            if source is None:
                continue
            new = made.setdefault(id(value), _like(value, values[source]))
            _put(module, name, new)
        return list(old.items())

    def _stored(self, names: Sequence[str]) -> str | None:
        """Which of the names that share a tensor is in the files."""
        return next((name for name in names if name in self._shards), None)

    def _on_meta(self, name: str) -> bool:
        """Whether a tensor of the skeleton has no values."""
        return _state(self._model)[name].is_meta

    def _tie(self) -> None:
        """Tie what transformers does not on meta: declared ties that are on disk twice, if they have the same values.

        Those that differ are no ties, as in `from_pretrained`.
        """
        for name, source in dict(self._model.all_tied_weights_keys).items():
            if name not in self._shards or source not in self._shards:
                continue
            values = self._shards.read([name, source], mapped=True)
            if not torch.equal(values[name], values[source]):
                del self._model.all_tied_weights_keys[name]
        self._model.tie_weights(recompute_mapping=False)

    def _compute(self) -> None:
        """Let transformers compute what it never stores: rotary frequencies, fixed positions."""
        own = [held for held in _names(self._model, persistent=False) if self._stored(held) is None]
        state = _state(self._model, persistent=False)
        for held in own:
            old = state[held[0]]
            new = _like(old, torch.empty_like(old, device="cpu"))
            for name in held:
                _put(self._model, name, new)
                vars(self._model.get_submodule(name.rpartition(".")[0])).pop("_is_hf_initialized", None)
        if own:
            with torch.random.fork_rng(devices=[]):
                self._model.initialize_weights()


def _state(module: nn.Module, persistent: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers themselves by name, each name of a shared one; buffers that are not saved on request."""
    saved = None if not persistent else module.state_dict(keep_vars=True)
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found |= dict(module.named_buffers(remove_duplicate=False))
    return {name: value for name, value in found.items() if saved is None or name in saved}


def _names(model: nn.Module, persistent: bool = True) -> list[tuple[str, ...]]:
    """The names of each parameter and buffer; several where it is shared."""
    found: dict[int, list[str]] = {}
    for name, value in _state(model, persistent).items():
        found.setdefault(id(value), []).append(name)
    return [tuple(names) for names in found.values()]


def _like(old: Tensor, values: Tensor) -> Tensor:
    """A parameter or buffer with other values."""
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
