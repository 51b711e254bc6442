"""Shared by the tests of training."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """accelerate collects garbage whenever training starts, most of the time of a short run: leave out what stays."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
