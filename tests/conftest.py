"""Shared by all tests: offline, two threads, no side effects on torch's random state."""

from __future__ import annotations

import os

# Before torch is imported: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "passive"  # spinning threads starve each other on a busy machine

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_compress.checkpoint.worker import CleanWorker
from tests._utils.tiny import tiny as build_tiny

_SEEDED = ("unit/evaluation", "unit/checkpoint/test_inputs.py")
"""Places whose tests build models from torch's global state; new tests take `fork_rng` or the marker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).as_posix().startswith(_SEEDED):
            item.add_marker(pytest.mark.touches_rng)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "touches_rng: may change torch's global random state")
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def worker() -> Iterator[CleanWorker]:
    """One clean process for the whole session; starting one takes seconds."""
    with CleanWorker(threads=torch.get_num_threads()) as clean:
        yield clean


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny("llama", num_hidden_layers=1)`: a small model with random weights, see `tests/_utils/tiny.py`."""
    return build_tiny


@pytest.fixture(autouse=True)
def _same_rng(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that changed torch's global random state: the package never may, and a test needs to say so."""
    before = torch.random.get_rng_state()
    yield
    if request.node.get_closest_marker("touches_rng") is None and not torch.equal(
        before, torch.random.get_rng_state()
    ):
        pytest.fail(
            "The test changed torch's global random state. Use torch.Generator or torch.random.fork_rng, or mark the "
            "test with @pytest.mark.touches_rng if it must."
        )
