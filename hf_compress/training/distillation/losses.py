"""Divergences between two distributions over a vocabulary, some tokens at a time, forward and backward.

A plain divergence keeps several float32 copies of tokens × vocabulary for its backward pass, often more than all other
activations of a language model. Here nothing is kept but the logits themselves, which exist anyway; the backward pass
computes each chunk anew and writes it straight into the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import DistillationConfig

LOWEST = -1e30
"""Stands for minus infinity: finite, so that a class which both models rule out adds 0 and not NaN."""


@dataclass(frozen=True)
class Divergence:
    """A divergence of a teacher's distribution p and a student's q, both of them softmax(logits / temperature).

    Attributes:
        teacher_share: Weight of p in the mixture m: 0 gives KL(p‖q), 1 gives KL(q‖p), anything between
            share · KL(p‖m) + (1 - share) · KL(q‖m) with m = share · p + (1 - share) · q (arXiv:2306.13649, equation 1,
            whose limits at the end points are 0; these take the KL that its gradient tends to).
        temperature: What the logits are divided by.
        chunk: Tokens at a time.
        size: Leading entries of the vocabulary that count; None for all.
    """

    teacher_share: float
    temperature: float
    chunk: int
    size: int | None = None

    @classmethod
    def of(cls, config: DistillationConfig, size: int | None = None) -> Divergence:
        """The divergence that a configuration asks for."""
        share = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": config.beta}[config.loss]
        return cls(share, config.temperature, config.chunk, size)

    def __call__(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """The divergence of some rows, times the squared temperature.

        Args:
            student: Logits, rows × vocabulary, floating.
            teacher: Logits of the same rows; they get no gradient.
            rows: Indices of the rows that count, int64.

        Returns:
            One value for each of `rows`, float32, or float64 where the logits are.
        """
        made: Tensor = _Chunked.apply(student, teacher.detach(), rows, self)  # type: ignore[no-untyped-call]
        return made

    def value(self, q: Tensor, p: Tensor) -> Tensor:
        """The divergence of rows of log-probabilities of the student (q) and the teacher (p)."""
        if self.teacher_share == 0:
            return (p.exp() * (p - q)).sum(-1)
        if self.teacher_share == 1:
            return (q.exp() * (q - p)).sum(-1)
        own, theirs = q.exp(), p.exp()
        m = self._mixture(own, theirs)
        theirs, own = (theirs * (p - m)).sum(-1), (own * (q - m)).sum(-1)
        return self.teacher_share * theirs + (1 - self.teacher_share) * own

    def slope(self, q: Tensor, p: Tensor) -> Tensor:
        """The derivative of `value` by the student's softened logits.

        With g the derivative by the probabilities, that of a softmax is q · (g - Σ q · g); the parts of g that are the
        same for all classes cancel.
        """
        if self.teacher_share == 0:
            return q.exp().sub_(p.exp())
        probability = q.exp()
        g = q - (p if self.teacher_share == 1 else self._mixture(probability, p.exp()))
        g.sub_((probability * g).sum(-1, keepdim=True)).mul_(probability)
        return g if self.teacher_share == 1 else g.mul_(1 - self.teacher_share)

    def _mixture(self, own: Tensor, theirs: Tensor) -> Tensor:
        """The logarithm of the mixture of two distributions; not of 0, where both are 0."""
        m = (1 - self.teacher_share) * own
        return m.add_(theirs, alpha=self.teacher_share).clamp_(min=torch.finfo(m.dtype).tiny).log_()

    def log_probabilities(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logarithms of the softened distributions of some rows, float32 or float64."""
        chosen = logits.index_select(0, rows)[:, : self.size]
        softened = chosen.to(_precision(logits)).div_(self.temperature)  # in place: `chosen` is a copy
        return softened.clamp_(min=LOWEST).log_softmax(-1)

    def chunks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Where chunks of rows lie, and their indices."""
        for start in range(0, len(rows), self.chunk):
            place = slice(start, start + self.chunk)
            yield place, rows[place]


class _Chunked(torch.autograd.Function):
    """`Divergence`, with a backward pass that computes each chunk anew."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, kind: Divergence) -> Tensor:
        """The values of all rows."""
        ctx.save_for_backward(student, teacher, rows)
        ctx.kind = kind
        values = torch.empty(len(rows), dtype=_precision(student), device=student.device)
        for place, chosen in kind.chunks(rows):
            q, p = kind.log_probabilities(student, chosen), kind.log_probabilities(teacher, chosen)
            values[place] = kind.value(q, p.to(q.dtype))
        return values.mul_(kind.temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the student's logits; zero in rows and columns that don't count."""
        student, teacher, rows = ctx.saved_tensors
        kind: Divergence = ctx.kind
        made = torch.zeros_like(student)
        counted = made[:, : kind.size]
        for place, chosen in kind.chunks(rows):
            q, p = kind.log_probabilities(student, chosen), kind.log_probabilities(teacher, chosen)
            slope = kind.slope(q, p.to(q.dtype))
            slope.mul_((gradient[place] * kind.temperature).unsqueeze(-1))
            counted.index_copy_(0, chosen, slope.to(made.dtype))
        return made, None, None, None


def _precision(logits: Tensor) -> torch.dtype:
    """What the divergence of such logits is computed in."""
    return torch.promote_types(logits.dtype, torch.float32)
