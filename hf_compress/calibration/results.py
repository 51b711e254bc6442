"""Where the results of blocks are kept until all are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .block import Finished

State = Mapping[str, Tensor]
"""Activations behind a block, by name: what the next block needs to go on."""


class Results(Protocol):
    """What became of blocks, by a key that a run gives each block: its path."""

    def get(self, key: str) -> Finished | None:
        """What a block became, or None where it is still to do."""

    def put(self, key: str, finished: Finished, state: State, forget: str | None = None) -> Finished:
        """Keep a block's result.

        Args:
            key: The block's path.
            finished: Its result.
            state: Activations behind it, empty where nothing follows. A run that is resumed goes on from the last
                finished block with them, so they are kept bit for bit.
            forget: Key of the block before, whose state is not needed once this result is safe; None where there is
                none.

        Returns:
            The same values as they are kept, to go on with instead: a store on disk maps them, so that the memory of
            `finished` can be freed.

        Raises:
            WriteError: The disk is full, or can't be written to.
        """

    def state(self, key: str) -> State | None:
        """The activations behind a finished block; None where they were forgotten or never kept."""


class MemoryResults:
    """Results kept in memory, for a live model. A run of it can't be resumed, so it keeps no states."""

    def __init__(self) -> None:
        self._finished: dict[str, Finished] = {}

    def get(self, key: str) -> Finished | None:
        """What a block became, or None where it is still to do."""
        return self._finished.get(key)

    def put(self, key: str, finished: Finished, state: State, forget: str | None = None) -> Finished:
        """Keep a block's result as it is."""
        self._finished[key] = finished
        return finished

    def state(self, key: str) -> State | None:
        """Never there."""
        return None
