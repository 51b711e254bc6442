"""Quantization-aware training in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .runs import MIDDLE, late_scales, same

REPOSITORY = Path(__file__).resolve().parents[4]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}

pytestmark = [
    pytest.mark.touches_rng,  # Trainer seeds and draws
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def test_scales_that_are_learned_later_with_gradient_checkpointing(tmp_path: Path) -> None:
    """DDP, which then looks for no unused parameters, waits for a gradient of each of them in every step."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("runs.py")), str(tmp_path)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    learned = [value for name, value in first.items() if name.endswith("hfc_scale_bias")]
    assert learned
    assert all(bool(value.any()) for value in learned)


def test_scales_that_are_not_in_use_are_not_in_the_optimizer(tmp_path: Path) -> None:
    """Adam would count steps with gradients of zero, and take larger ones later."""
    trainer = late_scales(tmp_path, batch=2)
    trainer.train()
    steps = {
        name: int(trainer.optimizer.state[value]["step"])
        for name, value in trainer.model.named_parameters()
        if name.endswith("hfc_scale_bias")
    }
    assert steps
    assert set(steps.values()) == {trainer.state.max_steps - MIDDLE}
