"""The training loop of the reference models: AdamW, one cycle of the learning rate, batches in a seeded order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Recipe(Protocol):
    """What the loop needs of a model's recipe."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def seed(self) -> int: ...


def train(
    name: str, parameters: Iterable[nn.Parameter], loss_of: Callable[[list[int]], Tensor], count: int, recipe: Recipe
) -> None:
    """Train parameters in place.

    Args:
        name: What is trained, for the log.
        parameters: What is changed.
        loss_of: The mean loss, a scalar, of the rows with the given positions.
        count: Number of rows.
        recipe: Epochs, batches, learning rate and seed.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    total = recipe.epochs * -(-count // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total)
    for step, batch in enumerate(batches(count, recipe), start=1):
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (total // 8 or 1) == 0 or step == total:
            _log.info("%s: step %d of %d, loss %.3f", name, step, total, loss.item())


def batches(count: int, recipe: Recipe) -> Iterator[list[int]]:
    """Positions of the rows of each batch, every epoch in another order; the global generators are not used."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, recipe.batch_size):
            yield order[start : start + recipe.batch_size]
