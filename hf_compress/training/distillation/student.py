"""A student from a teacher: the same architecture with fewer blocks, of a stock configuration.

Which fields of the configuration hold the number of blocks is found by trying: a field is changed, a model is built on
the meta device, and its names, shapes and the settings of its blocks are compared with those of the blocks that are
kept. So what is returned is a model that transformers builds from its configuration, and reloads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from ...apply.planning import is_quantized
from ...calibration.modes import MISFITS
from ...core.errors import AlreadyQuantizedError, ConfigError, UnsupportedModelError, listed
from .features import block_stacks

Choice: TypeAlias = int | Sequence[int] | Literal["every_other"]
"""Blocks of a stack: how many, which, or every second one from the first on."""

_PLACE = re.compile(r"idx|index|layer_id|layer_number|drop|seed")
"""In names of settings that follow from a block's place, and change with it."""


@dataclass(frozen=True)
class Cut:
    """The blocks that are kept of one stack.

    Attributes:
        path: Path of the stack.
        count: How many blocks it has.
        kept: Their numbers, rising.
    """

    path: str
    count: int
    kept: tuple[int, ...]

    def target(self, name: str) -> str | None:
        """What a name of the teacher is called in the student; None where its block is left out."""
        index, rest = self._divided(name)
        if index is None:
            return name
        return f"{self.path}.{self.kept.index(index)}{rest}" if index in self.kept else None

    def source(self, name: str) -> str:
        """What a name of the student is called in the teacher."""
        index, rest = self._divided(name)
        return name if index is None else f"{self.path}.{self.kept[index]}{rest}"

    def holds(self, name: str) -> bool:
        """Whether a name lies in a block of this stack."""
        return self._divided(name)[0] is not None

    def _divided(self, name: str) -> tuple[int | None, str]:
        """A name's block, and what follows it."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", name)
        return (None, "") if found is None else (int(found[1]), name[found.end() :])


def student_from_teacher(model: PreTrainedModel, layers: Choice | Mapping[str, Choice]) -> PreTrainedModel:
    """A smaller model with some of a model's blocks, and all that lies outside of them (DistilBERT, arXiv:1910.01108).

    Args:
        model: The teacher, dense. It is not changed, and shares no memory with the student.
        layers: How many blocks are kept, evenly spaced, the first and the last one among them; or which, counted from
            0; or `"every_other"`, from the first one on. Of a model with several stacks of blocks, such as an encoder
            and a decoder, it holds for each of them; a dictionary gives it for some, by a part of their path, as in
            `{"encoder": 6, "decoder": [0, 5]}`.

    Returns:
        The student, in evaluation mode, on the device and in the data type of the teacher. Nothing in it is random.

    Raises:
        ConfigError: Blocks are named that the model doesn't have, or none, or not in rising order.
        UnsupportedModelError: It has no stack of blocks, its layers share weights, or no configuration gives a model
            with the blocks that are kept.
        AlreadyQuantizedError: It is quantized.
    """
    _check(model)
    cuts = [cut for cut in _cuts(model, layers) if len(cut.kept) < cut.count]
    config = copy.deepcopy(model.config)
    for done in range(len(cuts)):
        _change(model, config, cuts[: done + 1])
    student = _fill(_build(model, config), model, cuts)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def evenly(count: int, kept: int) -> tuple[int, ...]:
    """Numbers of so many blocks, evenly spaced from the first to the last one.

    Args:
        count: Blocks there are.
        kept: Blocks that are wanted; of one alone, it is the first.
    """
    if kept == 1:
        return (0,)
    return tuple((2 * index * (count - 1) + kept - 1) // (2 * (kept - 1)) for index in range(kept))


def _check(model: PreTrainedModel) -> None:
    """Refuse what no student can be made of."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model, so it has no configuration to change.",
            "pass the model that from_pretrained gives, without adapters and wrappers",
        )
    if is_quantized(model):
        raise AlreadyQuantizedError(f"{type(model).__name__} is quantized.", "start from the original model")
    sizes = _sizes(model)
    fields = [(name, value) for config in _configs(model.config) for name, value in vars(config).items()]
    named = {name: value for name, value in fields if "layer" in name and type(value) is int}
    name = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if name in named and not set(sizes.values()) & set(named.values()):
        raise UnsupportedModelError(
            f"{type(model.config).__name__} says {name}={named[name]}, but {type(model).__name__} has "
            f"{listed(f'{count} blocks at {path}' for path, count in sizes.items())}: its layers share weights, or "
            "lie in stages, and can't be left out one by one.",
            "load a smaller model of this architecture as the student",
        )


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Paths of the stacks of blocks, and how many blocks they have."""
    return {stack.paths[0].rpartition(".")[0]: len(stack.paths) for stack in block_stacks(model)}


def _cuts(model: PreTrainedModel, layers: Choice | Mapping[str, Choice]) -> list[Cut]:
    """The blocks that are kept of each stack.

    Raises:
        ConfigError: Names or numbers don't fit the model.
    """
    sizes = _sizes(model)
    if not isinstance(layers, Mapping):
        return [Cut(path, count, _kept(layers, count, path)) for path, count in sizes.items()]
    chosen: dict[str, Choice] = {}
    for key, choice in layers.items():
        found = [path for path in sizes if key == path or key in path.split(".")]
        if len(found) != 1 or found[0] in chosen:
            raise ConfigError(
                f"layers names {key!r}, which is {'a part of' if found else 'no part of'} {listed(found or sizes)}.",
                f"layers={{{', '.join(f'{path!r}: {max(1, count // 2)}' for path, count in sizes.items())}}}",
            )
        chosen[found[0]] = choice
    return [Cut(path, sizes[path], _kept(choice, sizes[path], path)) for path, choice in chosen.items()]


def _kept(choice: Choice, count: int, path: str) -> tuple[int, ...]:
    """Numbers of blocks that are kept.

    Raises:
        ConfigError: There are no such blocks.
    """
    if choice == "every_other":
        return tuple(range(0, count, 2))
    if type(choice) is int and 1 <= choice <= count:
        return evenly(count, choice)
    if isinstance(choice, Sequence) and not isinstance(choice, str):
        kept = tuple(choice)
        rising = all(type(index) is int for index in kept) and list(kept) == sorted(set(kept))
        if kept and rising and kept[0] >= 0 and kept[-1] < count:
            return kept
    raise ConfigError(
        f"layers={choice!r} is not possible: {path} has {count} blocks, numbered from 0 to {count - 1}.",
        f"layers={max(1, count // 2)}, or rising numbers such as layers={list(evenly(count, max(1, count // 2)))}",
    )


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _change(model: PreTrainedModel, config: PreTrainedConfig, cuts: Sequence[Cut]) -> None:
    """Change a configuration so that it gives a model without the blocks that the last cut leaves out.

    Args:
        model: The teacher.
        config: A configuration that gives a model with all cuts but the last; changed in place.
        cuts: The cuts.

    Raises:
        UnsupportedModelError: No change does.
    """
    cut = cuts[-1]
    said = f"no field of {type(config).__name__} that is {cut.count} gives another number of them"
    for one in _configs(config):
        before = dict(vars(one))
        for name in _fields(one, cut.count):
            for lists in _lists(one, cut):
                _set(one, {name: len(cut.kept), **lists})
                _number_stages(one, cut)
                problem = _problem(model, config, cuts)
                if problem == "":
                    _follow(model, config, one, cuts)
                    return
                said = f"with {name}={len(cut.kept)}, {problem}" if problem is not None else said
                vars(one).update(before)
    raise UnsupportedModelError(
        f"{type(model).__name__} can't be cut at {cut.path} to the blocks {listed(map(str, cut.kept), 24)}: {said}.",
        "keep other blocks, or load a smaller model of this architecture as the student",
    )


def _fields(config: PreTrainedConfig, count: int) -> list[str]:
    """Fields that may be the number of blocks, the likeliest first."""
    found = [name for name, value in vars(config).items() if type(value) is int and value == count and name[0] != "_"]
    return sorted(found, key=lambda name: "layer" not in name)


def _lists(config: PreTrainedConfig, cut: Cut) -> list[dict[str, Any]]:
    """Changes of the lists that a configuration has, to be tried one after the other."""
    known = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple) and name[0] != "_"}
    each = {
        name: type(value)(value[index] for index in cut.kept)
        for name, value in known.items()
        if len(value) == cut.count
    }
    numbers = {
        name: type(value)(cut.kept.index(index) for index in value if index in cut.kept)
        for name, value in known.items()
        if name not in each and "layer" in name and value and all(type(index) is int for index in value)
    }
    named = {name: value for name, value in each.items() if "layer" in name}
    tried: list[dict[str, Any]] = []
    for values in ({**named, **numbers}, {**each, **numbers}, named, {}):
        if values not in tried:
            tried.append(values)
    return tried


def _set(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Set fields."""
    for name, value in values.items():
        setattr(config, name, value)


def _number_stages(config: PreTrainedConfig, cut: Cut) -> None:
    """Name the blocks of a vision backbone, such as DINOv2, that gives the last one's output, as its users expect."""
    if isinstance(config, BackboneConfigMixin) and config.out_indices == [cut.count]:
        config.stage_names = config.stage_names[: len(cut.kept) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def _follow(model: PreTrainedModel, config: PreTrainedConfig, one: PreTrainedConfig, cuts: Sequence[Cut]) -> None:
    """Change the other fields that are the same number, as long as the model stays the same (`max_window_layers`)."""
    cut = cuts[-1]
    for name in _fields(one, cut.count):
        if "layer" in name:
            _set(one, {name: len(cut.kept)})
            if _problem(model, config, cuts) != "":
                _set(one, {name: cut.count})


def _build(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values; draws nothing."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _problem(model: PreTrainedModel, config: PreTrainedConfig, cuts: Sequence[Cut]) -> str | None:
    """What keeps a configuration from giving the student.

    Returns:
        Nothing where it gives it; None where it does not give the right number of blocks, or no model at all.
    """
    try:
        built = _build(model, type(config).from_dict(config.to_dict()))  # as a reload makes it
    except (*MISFITS, StrictDataclassError, ZeroDivisionError):
        return None
    blocks = built.get_submodule(cuts[-1].path)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(cuts[-1].kept):
        return None
    own, teacher = _shapes(built), _shapes(model)
    wanted = {target: shape for name, shape in teacher.items() if (target := _target(name, cuts)) is not None}
    borrowed = _borrowed(own, wanted, teacher, cuts)
    differing = {name for name in own.keys() | wanted.keys() if own.get(name) != wanted.get(name)} - borrowed
    if differing:
        return f"the blocks differ from those that are kept: {listed(sorted(differing))}"
    return _other_settings(built, model, cuts, borrowed)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers, tied ones under each of their names."""
    return {name: tuple(value.shape) for name, value in _tensors(model)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _target(name: str, cuts: Sequence[Cut]) -> str | None:
    """What a name of the teacher is called in the student; None where its block is left out."""
    cut = next((cut for cut in cuts if cut.holds(name)), None)
    return name if cut is None else cut.target(name)


def _source(name: str, cuts: Sequence[Cut]) -> str:
    """What a name of the student is called in the teacher."""
    cut = next((cut for cut in cuts if cut.holds(name)), None)
    return name if cut is None else cut.source(name)


def _borrowed(
    own: Mapping[str, Any], wanted: Mapping[str, Any], teacher: Mapping[str, Any], cuts: Sequence[Cut]
) -> set[str]:
    """What only the first block of a stack has, for all of them, when the teacher's first block is left out.

    T5's first block holds the relative positions that all blocks are given.
    """
    heads = tuple(f"{cut.path}.0." for cut in cuts)
    return {name for name in own.keys() - wanted.keys() if name.startswith(heads) and own[name] == teacher.get(name)}


def _other_settings(built: nn.Module, model: nn.Module, cuts: Sequence[Cut], borrowed: set[str]) -> str:
    """How the settings of the student's blocks differ from those of the blocks that are kept; empty where they don't.

    Shapes don't tell whether a block attends to all tokens or to a window of them.
    """
    modules = dict(model.named_modules())
    for path, module in built.named_modules():
        if not any(cut.holds(path) for cut in cuts) or any(name.startswith(f"{path}.") for name in borrowed):
            continue
        if _PLACE.search(path.rpartition(".")[2]):
            continue
        source = _source(path, cuts)
        if source not in modules or type(modules[source]) is not type(module):
            return f"{path} is a {type(module).__name__}, which {source} is not"
        mine, theirs = _settings(module), _settings(modules[source])
        other = next((name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]), None)
        if other is not None:
            return f"{path} has {other}={mine[other]!r}, {source} {other}={theirs[other]!r}"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module that don't follow from its place."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and name != "training"
        and name[0] != "_"
        and not _PLACE.search(name)
    }


def _fill(built: PreTrainedModel, model: PreTrainedModel, cuts: Sequence[Cut]) -> PreTrainedModel:
    """Give copies of a teacher's values to a student; what is tied in the teacher is tied in it.

    Raises:
        UnsupportedModelError: It holds tensors that are neither parameters nor buffers.
    """
    teacher, made = dict(_tensors(model)), dict[int, Tensor]()
    for name, value in list(_tensors(built)):
        source = teacher.get(_source(name, cuts), teacher.get(name))
        if source is None:
            continue
        if id(source) not in made:
            copied = source.detach().clone()
            made[id(source)] = (
                nn.Parameter(copied, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copied
            )
        path, _, attribute = name.rpartition(".")
        setattr(built.get_submodule(path), attribute, made[id(source)])
    empty = [
        f"{path}.{name}"
        for path, module in built.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
        if isinstance(value, Tensor) and value.is_meta
    ]
    if empty:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds tensors that are computed when it is built: {listed(empty)}.",
            "build the student with from_pretrained, and copy the blocks",
        )
    return built
