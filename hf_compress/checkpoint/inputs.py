"""Inputs that prove a checkpoint, made from the model's own signature and config.

optimum's dummy input generators are not used: they draw from the global random state, pad no single row, and
know no nested configs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.pytorch_utils import Conv1D

from hf_compress.calibration.modes import MISFITS, evaluating
from hf_compress.core.errors import InputError, listed, nearest

InputSet = dict[str, Tensor]
Ranks = dict[str, set[int]]

LENGTH = 16
"""Tokens per row of the first input set; the second one is shorter by a third."""

BATCH = 2
_PADDED = 4
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
)
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "audio_token_id",
    "audio_token_index",
    "video_token_id",
)
_GIVE_INPUTS = "pass inputs=[tokenizer(..., return_tensors='pt')], a list of dicts of tensors for `model.forward`."
_GIVE_TENSORS = (
    "pass inputs=[...] with a tensor, a tuple of tensors or a dict of them for each call; leave `inputs` out if "
    "forward needs anything else: the proof then compares tensors only."
)


def example_inputs(model: PreTrainedModel, seed: int = 0) -> list[InputSet]:
    """Two input sets of different lengths, batch 2, the second row padded where the model takes a mask.

    Covers text, vision, speech, encoder-decoders and CLIP-like models, else the model's own `dummy_inputs`.
    They are tried on the meta device, or through the live model where that is not possible. Models that mark
    images or sound by placeholder tokens get text only.

    Args:
        model: The model; its weights may be on the meta device. It is not changed.
        seed: Seed of a local generator.

    Returns:
        Forward arguments on the CPU: ids and masks in int64, pixels and sound in the model's dtype.

    Raises:
        InputError: No inputs could be made that the model accepts.
    """
    reasons = []
    for sets in _candidates(model, seed):
        problem = _problem(model, sets)
        if problem is None:
            return sets
        reasons.append(f"{listed(sets[0])}: {problem}")
    why = "; ".join(reasons) or "unknown arguments"
    raise InputError(f"No example inputs can be made for {type(model).__name__} ({why}).", _GIVE_INPUTS)


def normalise_inputs(inputs: object, model: nn.Module | None = None) -> list[InputSet]:
    """Check inputs given by the user and bring them to one form.

    Args:
        inputs: A dict or `BatchEncoding` of tensors, or a list of those.
        model: When given, names are checked against its forward signature.

    Returns:
        Detached, contiguous tensors on the CPU, one dict per forward call.

    Raises:
        InputError: Something is not a tensor, or not an argument of the model.
    """
    give = _how_to_give(model)
    if isinstance(inputs, str) or (isinstance(inputs, Sequence) and any(isinstance(one, str) for one in inputs)):
        raise InputError("inputs is text, and must be tensors.", give)
    sets = [inputs] if isinstance(inputs, Mapping) else inputs
    if not isinstance(sets, Sequence) or not sets:
        raise InputError(f"inputs must be a dict or a non-empty list of dicts, got {_shown(inputs)}.", give)
    return [_normal_set(one, f"inputs[{index}]", model) for index, one in enumerate(sets)]


def input_ranks(model: PreTrainedModel, inputs: list[InputSet] | None = None) -> Ranks:
    """The number of dimensions of what each linear layer gets, without computing anything where that is possible.

    A Linear that gets 2-D inputs, like BERT's pooler, has no token dimension of its own. A live model whose path
    depends on values, as that of routed experts does, is run.

    Args:
        model: A model with its weights on the meta device, or a live one, of which first a copy without weights is
            made from its config. No hooks stay behind.
        inputs: Forward arguments to use instead of example inputs.

    Returns:
        Names of all `nn.Linear` and `Conv1D` modules; empty sets for those that were not called.

    Raises:
        InputError: The model can't run without weights, for instance because its path depends on values.
    """
    cause: BaseException | None = None
    for sets in _candidates(model, seed=0) if inputs is None else [inputs]:
        ranks, errors = _first_run(model, sets)
        if ranks is not None:
            return ranks
        cause = cause or errors[-1]
    raise InputError(f"{type(model).__name__} can't run without weights: {cause}", _GIVE_INPUTS) from cause


def _candidates(model: PreTrainedModel, seed: int) -> list[list[InputSet]]:
    return [sets for sets in (_Recipe.of(model, seed).sets(), _own_dummies(model)) if sets]


@dataclass(frozen=True)
class _Recipe:
    """What the forward signature and the config say about a model's inputs."""

    architecture: str
    arguments: frozenset[str]
    config: Mapping[str, Any]
    vocabulary: int
    dtype: torch.dtype
    generator: torch.Generator = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, seed: int) -> _Recipe:
        config = model.config.to_dict()
        return cls(
            architecture=type(model).__name__,
            arguments=frozenset(inspect.signature(model.forward).parameters),
            config=config,
            vocabulary=_int(_find(config, "vocab_size"), 0),
            dtype=model.dtype,
            generator=torch.Generator().manual_seed(seed),
        )

    def sets(self) -> list[InputSet]:
        """The input sets; empty when the signature names nothing that can be made."""
        found = [self._one(index, length) for index, length in enumerate(self._lengths())]
        return found if all(found) else []

    def _one(self, index: int, length: int) -> InputSet:
        makers: dict[str, Callable[[], InputSet]] = {
            "input_ids": lambda: self._text(length),
            "pixel_values": lambda: self._pixels(index),
            "input_features": lambda: self._features(length),
            "input_values": lambda: self._sound(length),
            "decoder_input_ids": lambda: self._text(length, "decoder_"),
        }
        if any(self.config.get(name) is not None for name in _PLACEHOLDERS) and "input_ids" in self.arguments:
            makers = {"input_ids": makers["input_ids"]}
        made: InputSet = {}
        for name, make in makers.items():
            if name in self.arguments:
                made.update(make())
        return made

    def _lengths(self) -> list[int]:
        limits = [found for name in _POSITIONS if isinstance(found := _find(self.config, name), int)]
        # RoBERTa counts its positions from the padding id, 1, on; other models have theirs anywhere.
        room = min(limits, default=LENGTH + 2) - (2 if self._pad() == 1 else 0)
        longer = max(min(LENGTH, room), 2 * _PADDED)
        return [longer, longer * 2 // 3]

    def _pad(self) -> int:
        found = _int(_find(self.config, "pad_token_id"), 0)
        return found if 0 <= found < self.vocabulary else 0

    def _batch(self) -> int:
        # Decoders that classify find the last token by the padding id, and refuse a batch without one.
        classifies = self.architecture.endswith("ForSequenceClassification")
        return 1 if classifies and _find(self.config, "pad_token_id") is None else BATCH

    def _text(self, length: int, prefix: str = "") -> InputSet:
        if self.vocabulary == 0:
            return {}
        special = _special_ids(self.config)
        allowed = [token for token in range(self.vocabulary) if token not in special] or [0]
        drawn = torch.randint(len(allowed), (self._batch(), length), generator=self.generator)
        made = self._masked(f"{prefix}input_ids", torch.tensor(allowed)[drawn], _PADDED, prefix)
        self._pad_and_end(made[f"{prefix}input_ids"], made.get(f"{prefix}attention_mask"))
        if self.architecture.endswith("ForMultipleChoice"):
            return {name: value.unsqueeze(1).repeat(1, 2, 1) for name, value in made.items()}
        return made

    def _pad_and_end(self, ids: Tensor, mask: Tensor | None) -> None:
        """Fill the padding; put the end token last where models pool there: encoder-decoders and CLIP."""
        mask = torch.ones_like(ids) if mask is None else mask
        ids.masked_fill_(mask == 0, self._pad())
        end = _find(self.config, "eos_token_id")
        pools = self.config.get("is_encoder_decoder") or _nested(self.config)
        if pools and isinstance(end, int) and end < self.vocabulary:
            ids[torch.arange(len(ids)), mask.sum(dim=1) - 1] = end

    def _pixels(self, index: int) -> InputSet:
        size = _find(self.config, "image_size")
        if isinstance(size, Mapping):
            size = [size.get("height", 64), size.get("width", 64)]
        height, width = (size, size) if isinstance(size, int) else size or 2 * [(64, 96)[index]]
        shape = [BATCH, _int(_find(self.config, "num_channels"), 3), height, width]
        if isinstance(frames := self.config.get("num_frames"), int):
            shape.insert(1, frames)
        return {"pixel_values": self._noise(shape)}

    def _features(self, length: int) -> InputSet:
        bins, positions = self.config.get("num_mel_bins"), self.config.get("max_source_positions")
        width = self.config.get("input_feat_per_channel") or self.config.get("feature_projection_input_dim")
        if isinstance(width, int):
            return self._masked("input_features", self._noise([BATCH, 4 * length, width]), length)
        if isinstance(bins, int) and isinstance(positions, int):  # Whisper: the encoder halves the time
            return {"input_features": self._noise([BATCH, bins, 2 * positions])}
        return {}

    def _sound(self, length: int) -> InputSet:
        bins, frames = self.config.get("num_mel_bins"), self.config.get("max_length")
        if isinstance(strides := self.config.get("conv_stride"), Sequence):
            samples = (length + 1) * math.prod(strides)
            return self._masked("input_values", self._noise([BATCH, samples]), samples // 4)
        if isinstance(bins, int) and isinstance(frames, int):
            return {"input_values": self._noise([BATCH, frames, bins])}
        return {}

    def _masked(self, name: str, value: Tensor, padded: int, prefix: str = "") -> InputSet:
        """The input, with a mask that pads every row but the first if the model takes one."""
        if f"{prefix}attention_mask" not in self.arguments:
            return {name: value}
        mask = torch.ones(value.shape[:2], dtype=torch.long)
        mask[1:, -padded:] = 0
        return {name: value, f"{prefix}attention_mask": mask}

    def _noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(self.dtype)


def _nested(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in config.values() if isinstance(part, Mapping) and "model_type" in part]


def _find(config: Mapping[str, Any], name: str) -> Any:
    """The value at the top of a config, or else in its nested ones."""
    values = (config.get(name), *(_find(part, name) for part in _nested(config)))
    return next((value for value in values if value is not None), None)


def _special_ids(config: Mapping[str, Any]) -> set[int]:
    """Every token id that a config or a nested one gives a meaning to."""
    suffixes = ("token_id", "token_ids", "token_index")
    values = [value for name, value in config.items() if str(name).endswith(suffixes)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return set().union((one for one in flat if isinstance(one, int)), *map(_special_ids, _nested(config)))


def _int(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def _own_dummies(model: PreTrainedModel) -> list[InputSet]:
    """The model's `dummy_inputs`, if they are tensors of arguments it has."""
    dummies = model.dummy_inputs
    known = inspect.signature(model.forward).parameters
    if not all(name in known and isinstance(value, Tensor) for name, value in dummies.items()):
        return []
    return [dict(dummies), {name: value[:1] for name, value in dummies.items()}]


def _problem(model: PreTrainedModel, sets: Sequence[InputSet]) -> BaseException | None:
    """Why the model refuses the inputs; None when it accepts them."""
    ranks, errors = _first_run(model, sets)
    return None if ranks is not None else errors[-1]


def _first_run(model: PreTrainedModel, sets: Sequence[InputSet]) -> tuple[Ranks | None, list[BaseException]]:
    """Ranks from the first way of running that works, without weights if possible, and why the others did not."""
    plain = [{name: _plain(value) for name, value in one.items()} for one in sets]
    ways: list[Callable[[], Ranks]] = [lambda: _meta_ranks(_copy(model, "meta"), plain)]
    if _on_meta(model):
        ways.insert(0, lambda: _meta_ranks(model, sets))
    ways.append(lambda: _fake_ranks(model, plain))
    if not _on_meta(model):
        ways.append(lambda: _live_ranks(model, sets))
    errors: list[BaseException] = []
    for way in ways:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return way(), errors
        except MISFITS as error:
            errors.append(error)
    return None, errors


def _plain(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _on_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _copy(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A float32 model of the same class and config, without its weights."""
    config = deepcopy(model.config)
    # The fused variants look at values (the mask's, the experts') or have no meta kernel for float32.
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    with torch.device(device), meta_device_safe_creation_ops():
        return type(model)(config).eval()


def _meta_ranks(model: PreTrainedModel, sets: Sequence[InputSet]) -> Ranks:
    # Masks are left out: transformers asks whether they are all ones, and ranks do not depend on them.
    bare = [{name: one[name].to("meta") for name in one if not name.endswith("attention_mask")} for one in sets]
    return _observed(model, bare)


def _fake_ranks(model: PreTrainedModel, sets: Sequence[InputSet]) -> Ranks:
    """For models that need a real device name, or values of constants: run with fake tensors."""
    with FakeTensorMode() as mode:
        fakes: list[InputSet] = [{name: mode.from_tensor(one[name]) for name in one} for one in sets]
        return _observed(_copy(model, "cpu"), fakes)


def _live_ranks(model: PreTrainedModel, sets: Sequence[InputSet]) -> Ranks:
    """From running the model itself."""
    with torch.inference_mode(), evaluating(model):
        return _observed(model, [{name: value.to(model.device) for name, value in one.items()} for one in sets])


def _observed(model: PreTrainedModel, sets: Sequence[InputSet]) -> Ranks:
    """Run the model and note the rank of each linear layer's input, hooks removed in any case."""
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    ranks: Ranks = {name: set() for name in linears}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ranks[name] |= {one.ndim for one in (*arguments, *keywords.values()) if isinstance(one, Tensor)}

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, module in linears.items()
    ]
    try:
        for one in sets:
            model(**one)
    finally:
        for handle in handles:
            handle.remove()
    return ranks


def _normal_set(given: object, place: str, model: nn.Module | None) -> InputSet:
    give = _how_to_give(model)
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"{place} must be a non-empty dict of tensors, got {_shown(given)}.", give)
    known = None if model is None else _arguments(model)
    made: InputSet = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise InputError(f"{place} has the key {name!r}; keys are argument names.", give)
        if known is not None and name not in known:
            raise InputError(
                f"{place}[{name!r}] is no argument of the model. {nearest(name, known)}", f"drop {name!r}."
            )
        if not isinstance(value, Tensor):
            raise InputError(f"{place}[{name!r}] must be a tensor, got {_shown(value)}.", give)
        made[name] = value.detach().to("cpu").contiguous()
    return made


def _how_to_give(model: nn.Module | None) -> str:
    """How to pass inputs for a model, or for a plain module."""
    return _GIVE_INPUTS if model is None or isinstance(model, PreTrainedModel) else _GIVE_TENSORS


def _arguments(model: nn.Module) -> set[str] | None:
    """Names of the forward's arguments, as the class before packing has them; None where any name may do."""
    kind = vars(type(model)).get("hfc_base", type(model))
    parameters = inspect.signature(kind.forward).parameters
    free = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return None if free and not isinstance(model, PreTrainedModel) else set(parameters) - {"self"}


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
