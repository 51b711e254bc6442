"""Pruning, quantization-aware training and distillation in one run: alone, resumed, and in two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Trainer

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.modules.packed import unpack_codes
from hf_compress.training.state import FILE
from tests._utils.tiny import output, tiny_inputs
from tests._utils.training_runs import INT4, SPARSITY, W8A8, in_step, moving, trainer_of
from tests.conformance.helpers import packed_weights, plan_of, same_states

pytestmark = pytest.mark.touches_rng  # Trainer seeds, dropout draws

REPOSITORY = Path(__file__).parents[2]
CASES = {"int4-prune-first": (INT4, True), "w8a8-quantize-first": (W8A8, False)}


@pytest.fixture(scope="module", params=CASES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Trainer]:
    """An uninterrupted run, its model converted at the end."""
    trainer = trainer_of(tmp_path_factory.mktemp("runs") / "run", *CASES[request.param])
    trainer.train()
    return request.param, trainer


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference; NaN, which says that nothing was seen yet, equals NaN."""
    assert left.keys() == right.keys()
    pairs = [(left[name].double().nan_to_num(9e9), right[name].double().nan_to_num(9e9)) for name in left]
    return max(float((one - other).abs().max()) for one, other in pairs if one.numel())


def test_zeros_stay_zeros_in_the_saved_codes(finished: tuple[str, Trainer]) -> None:
    _, trainer = finished
    last = stored(Path(trainer.args.output_dir) / "checkpoint-6")
    pruned = 0
    for name, packed in packed_weights(trainer.model):
        zeros = last[name] == 0
        codes = unpack_codes(packed.codes, packed.layout.weights.num_bits, packed.layout.shape[-1])
        assert codes.shape == zeros.shape
        assert not codes[zeros].any()
        assert not packed.dense()[zeros].any()
        if bool(zeros.any()):
            assert int(zeros.sum()) == round(SPARSITY * zeros.numel())
            pruned += 1
    assert pruned >= 12  # six linear layers in each of two blocks


def test_resumed_from_the_middle_equals_the_uninterrupted_run(finished: tuple[str, Trainer], tmp_path: Path) -> None:
    name, trainer = finished
    run, again = Path(trainer.args.output_dir), tmp_path / "run"
    shutil.copytree(run, again)
    for step in (4, 6):
        shutil.rmtree(again / f"checkpoint-{step}")
    resumed = trainer_of(again, *CASES[name])
    resumed.train(resume_from_checkpoint=str(again / "checkpoint-2"))
    for step in (4, 6):
        assert difference(stored(again / f"checkpoint-{step}"), stored(run / f"checkpoint-{step}")) == 0.0
        files = [folder / f"checkpoint-{step}" / FILE for folder in (run, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert same_states(resumed.model, trainer.model)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, resumed)]
    assert losses[0] == losses[1]


def test_checkpoints_between_load_without_us(finished: tuple[str, Trainer], worker: CleanWorker) -> None:
    _, trainer = finished
    for step in (2, 4, 6):
        folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        told = worker.request("keys", path=folder, architecture="BertForSequenceClassification")
        assert told["missing_keys"] == told["mismatched_keys"] == []
        assert all(key.rpartition(".")[2].startswith("hfc_") for key in told["unexpected_keys"])
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    dense = stored(folder)
    assert all(torch.equal(value, dense[name]) for name, value in loaded.state_dict().items())


def test_result_is_saved_and_proven_in_a_clean_process(
    finished: tuple[str, Trainer], worker: CleanWorker, tmp_path: Path
) -> None:
    _, trainer = finished
    model = trainer.model.eval()
    proof = hfc.save(model, tmp_path / "out", worker=worker)
    assert proof.level == "full"
    assert hfc.verify(tmp_path / "out", worker=worker).level == "full"
    assert same_states(hfc.load(tmp_path / "out"), model)
    trainer.save_model(str(tmp_path / "by-trainer"))
    by_trainer = hfc.load(tmp_path / "by-trainer").eval()
    inputs = tiny_inputs(model)
    assert torch.equal(output(by_trainer, inputs), output(model, inputs))
    assert plan_of(model).method == "qat"


def test_callbacks_in_either_order_give_the_same_run(finished: tuple[str, Trainer], tmp_path: Path) -> None:
    """The mask comes before fake quantization, whatever the list says."""
    name, trainer = finished
    quantization, prune_first = CASES[name]
    other = trainer_of(tmp_path / "run", quantization, not prune_first)
    other.train()
    assert same_states(other.model, trainer.model)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}


def launch(script: Path, *arguments: str) -> None:
    """Run a script in two processes; without an accelerator, `--multi_gpu` means processes that talk by gloo."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def check_movement(folder: Path) -> None:
    """Both processes have the masks of one that sees twice the batch, and so have the scores.

    Tolerance: sums of gradients in float32 in another order, 1e-6 of their size, over six steps of 1e-2.
    """
    first, second = (load_file(folder / f"moving-{rank}.safetensors") for rank in (0, 1))
    assert difference(first, second) == 0.0
    alone = moving(folder / "moving-alone", batch=4)
    alone.train()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value == 0, first[name] == 0), name
        assert torch.allclose(value, first[name], rtol=0, atol=1e-6), name
    scores, single = (load_file(folder / run / "checkpoint-5" / FILE) for run in ("moving", "moving-alone"))
    assert len(scores) == 5 * 14  # weights of two blocks
    assert all(torch.allclose(value, single[name], rtol=0, atol=2e-5) for name, value in scores.items())


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Both hold the same weights, zeros and ranges; together they do what one does with twice the batch.

    A sum of 64 float32 products in another order differs by about 1e-6 of its size. Where such a difference moves an
    input over the edge between two of the 255 steps of its grid, one activation changes by 1/127 of the range, of
    thousands that a gradient sums up; after six steps that is below 1e-4 of a weight's size.
    """
    launch(REPOSITORY / "tests" / "_utils" / "training_runs.py", str(tmp_path))
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert difference(first, second) == 0.0
    assert [one["processes"] for one in told] == [2, 2]
    assert [one["saves"] for one in told] == [True, False]
    assert [one["wrapped"] for one in told] == [1, 1]  # not the teacher
    assert all(one["student_wrapped"] for one in told)
    assert all("whole weights; FSDP" in one["refusal"] for one in told)

    check_movement(tmp_path)
    alone = in_step(tmp_path / "alone", batch=8)
    alone.train()
    single = {name: value.detach() for name, value in alone.model.state_dict().items()}
    assert single.keys() == first.keys()
    assert sum("hfc_input_low" in name for name in single) >= 12
    for name, value in single.items():
        assert torch.equal(value == 0, first[name] == 0), name
        if value.is_floating_point():
            close = 1e-4 * max(1e-2, float(value.abs().max()))
            assert torch.allclose(first[name], value, rtol=0, atol=close), name
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert told[0]["losses"] == pytest.approx(losses, rel=1e-3)

    for step in (2, 4, 6):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert (folder / FILE).is_file()
        assert not list(folder.glob("*.partial"))
    assert difference(stored(tmp_path / "run" / "checkpoint-6"), first) == 0.0
