"""A student's layers against a teacher's: which are compared, what is collected of them, and the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.padding import hiding, key_mask, row_count
from ...core.errors import TeacherError, listed
from .features import Layers, Place, Seen, refuse_compiled, watching
from .hidden import HiddenConfig, hidden_loss, layer_pairs, wide
from .projections import Projections
from .relations import RelationConfig, relation_heads, relation_loss, relation_pair

_IGNORED = -100
"""Label of positions that have none."""


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the one of the teacher that it is compared with."""

    student: Place
    teacher: Place

    @property
    def name(self) -> str:
        """Of its projection."""
        return f"stack{self.student[0]}.layer{self.student[1]}.to{self.teacher[1]}"


@dataclass(frozen=True)
class Watched:
    """What was collected of one forward pass of both."""

    student: Seen
    teacher: Seen


class Matching:
    """Hidden-state and relation losses of a student against a teacher.

    Once for each batch, in this order: enter `watching`, run the student's forward pass and the teacher's, each once,
    leave it, call `losses`, and drop what was watched. Before an optimizer step, `projections.step`.

    Args:
        student: The model that learns, before it is compiled.
        teacher: The model that it learns from, dense or packed.
        hidden: The loss on hidden states, or None.
        relations: The loss on relations, or None.
        seed: Of the projections' initial values.

    Attributes:
        projections: Between hidden states of different width.

    Raises:
        TeacherError: They have different stacks of blocks, or a given layer doesn't exist.
        UnsupportedModelError: One has no blocks, or no queries, keys and values where they are wanted.
        TrainerError: One is compiled.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        hidden: HiddenConfig | None,
        relations: RelationConfig | None,
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.relations = relations
        self.projections = Projections(seed)
        self.student, self.teacher = Layers(student), Layers(teacher)
        self._check_stacks()
        self._hidden_pairs = [] if hidden is None else self._pair_hidden(hidden)
        self._relation_pairs = [] if relations is None else self._pair_relations(relations)

    @contextmanager
    def watching(self, *running: nn.Module) -> Iterator[Watched]:
        """Collect features of one forward pass of each model, run while it is entered.

        Args:
            *running: The models as they are called, with what the Trainer has put around them.

        Raises:
            TrainerError: One is compiled.
        """
        for model in running:
            refuse_compiled(model)
        hidden, relations = self._hidden_pairs, self._relation_pairs
        with (
            watching(self.student, [pair.student for pair in hidden], [pair.student for pair in relations]) as own,
            watching(self.teacher, [pair.teacher for pair in hidden], [pair.teacher for pair in relations]) as other,
        ):
            yield Watched(own, other)

    def losses(self, watched: Watched, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch, multiplied with their weights, for each row.

        A row is a mean over its tokens, padding left out, and over the layers that are compared; so the mean over rows
        depends neither on padding nor on how a batch is split.

        Args:
            watched: What was collected.
            inputs: Forward arguments of the student, labels included where there are any.

        Returns:
            `"hidden"` and `"relations"`, those that are configured: one value for each row, float32.

        Raises:
            TeacherError: The models see different tokens, or a layer did not run.
        """
        rows = row_count({name: value for name, value in inputs.items() if isinstance(value, Tensor)})
        made: dict[str, Tensor] = {}
        if self.hidden is not None:
            parts = [
                _per_row(self._hidden_loss(self.hidden, watched, pair, inputs), rows) for pair in self._hidden_pairs
            ]
            made["hidden"] = self.hidden.weight * torch.stack(parts).mean(dim=0)
        if self.relations is not None:
            parts = [
                _per_row(self._relation_loss(self.relations, watched, pair, inputs), rows)
                for pair in self._relation_pairs
            ]
            made["relations"] = self.relations.weight * torch.stack(parts).mean(dim=0)
        return made

    def _hidden_loss(self, config: HiddenConfig, watched: Watched, pair: Pair, inputs: Mapping[str, Any]) -> Tensor:
        """The hidden-state loss of one pair of layers."""
        own, other = watched.student.hidden_of(pair.student), watched.teacher.hidden_of(pair.teacher)
        mask = self._mask(watched, pair, own, other, inputs)
        if own.shape[-1] != other.shape[-1]:
            project = self.projections.get(pair.name, own.shape[-1], other.shape[-1], own.device)
            own = project(wide(own).to(project.weight.dtype))
        return hidden_loss(config, own, other, mask)

    def _relation_loss(
        self, config: RelationConfig, watched: Watched, pair: Pair, inputs: Mapping[str, Any]
    ) -> Tensor:
        """The relation loss of one pair of blocks: the sum over what is compared."""
        kinds = ("queries", "keys", "values")
        own = dict(zip(kinds, watched.student.attention_of(pair.student), strict=True))
        other = dict(zip(kinds, watched.teacher.attention_of(pair.teacher), strict=True))
        mask = self._mask(watched, pair, own["queries"], other["queries"], inputs)
        parts = []
        for kind in dict.fromkeys(config.of):
            what = f"{kind} ({self.student.attention(pair.student).path}, {self.teacher.attention(pair.teacher).path})"
            heads = relation_heads(config, own[kind].shape[-1], other[kind].shape[-1], what)
            parts.append(relation_loss(own[kind], other[kind], heads, mask))
        return torch.stack(parts).sum(dim=0)

    def _mask(
        self, watched: Watched, pair: Pair, own: Tensor, other: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Which tokens of a pair count.

        Raises:
            TeacherError: The student and the teacher have different ones.
        """
        if own.shape[:2] != other.shape[:2]:
            raise TeacherError(
                f"{self.student.block((pair.student[0], 1))} of the student sees {list(own.shape[:2])} rows and "
                f"tokens, {self.teacher.block((pair.teacher[0], 1))} of the teacher {list(other.shape[:2])}.",
                "take a teacher that reads the same inputs: tokenizer, image size and patch size",
            )
        return token_mask(self.student, pair.student[0], own, inputs, watched.student.masks.get(pair.student[0]))

    def _check_stacks(self) -> None:
        """Refuse models of other structure.

        Raises:
            TeacherError: They have different numbers of stacks.
        """
        own, other = ([stack.paths[0] for stack in layers.stacks] for layers in (self.student, self.teacher))
        if len(own) != len(other):
            raise TeacherError(
                f"The student has {len(own)} stacks of blocks, starting with {listed(own)}; the teacher {len(other)}, "
                f"starting with {listed(other)}.",
                "take a teacher of the same kind, or the logits loss only: hidden=None, relations=None",
            )

    def _pair_hidden(self, config: HiddenConfig) -> list[Pair]:
        """Layers whose hidden states are compared, of all stacks."""
        return [
            Pair((stack, own), (stack, other))
            for stack in range(len(self.student.stacks))
            for own, other in layer_pairs(config, *self._counts(stack), self._where(stack))
        ]

    def _pair_relations(self, config: RelationConfig) -> list[Pair]:
        """Blocks whose relations are compared, of all stacks."""
        found = []
        for stack in range(len(self.student.stacks)):
            own, other = relation_pair(config, *self._counts(stack), self._where(stack))
            self.student.attention((stack, own))
            self.teacher.attention((stack, other))
            found.append(Pair((stack, own), (stack, other)))
        return found

    def _counts(self, stack: int) -> tuple[int, int]:
        """Blocks of the student and the teacher."""
        return self.student.count(stack), self.teacher.count(stack)

    def _where(self, stack: int) -> str:
        """Where the student's blocks are."""
        return self.student.stacks[stack].paths[0].rpartition(".")[0]


def token_mask(
    layers: Layers, stack: int, value: Tensor, inputs: Mapping[str, Any], told: Tensor | None
) -> Tensor | None:
    """Which tokens of a stack are no padding.

    Told by the batch's own mask; of a decoder without one, by its labels, of which each stands at the place of the
    token that it follows; of tokens that a model makes itself, such as frames of sound, by the mask that the model
    gives to its blocks.

    Args:
        layers: Where the blocks are.
        stack: The stack.
        value: What it works on, rows × tokens × features.
        inputs: Forward arguments.
        told: The mask that its first block was given, or None.

    Returns:
        Rows × tokens, bool; None where all count.
    """
    owner = layers.owners[stack]
    reads_pixels = owner is not None and owner.main_input_name == "pixel_values"
    mask = None if reads_pixels else _own_mask(layers, stack, inputs)
    for known in (mask, None if told is None else hiding(told, len(value))):
        if known is not None and known.shape == value.shape[:2]:
            return known
    return None


def _own_mask(layers: Layers, stack: int, inputs: Mapping[str, Any]) -> Tensor | None:
    """What a batch tells about the tokens of a stack."""
    given = inputs.get("attention_mask")
    if layers.decodes[stack]:
        given, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if given is None and isinstance(labels, Tensor) and labels.ndim == 2:
            return labels != _IGNORED
    return key_mask(given, len(given)) if isinstance(given, Tensor) and given.ndim else None


def _per_row(values: Tensor, rows: int) -> Tensor:
    """One value for each row of a batch, also where a row has several images."""
    return values if len(values) == rows else values.mean().expand(rows)
