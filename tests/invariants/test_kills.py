"""SIGKILL in the middle of a real `hfc.save(overwrite=True)`: old, new, or recoverable; never torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._utils.tiny import tiny_dir

REPOSITORY = Path(__file__).parents[2]

# One process imports and compresses, then forks one saving child per kill. An audit hook in the child reports
# every file operation below the output's parent and waits for leave to do it, so each kill falls exactly between two
# of them. Nothing is audited while the child waits for the clean worker, so a kill never splits a request to it.
# One thread: forking is safe without a pool.
KILLER = '''
import hashlib, json, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker

source, out = Path(sys.argv[1]), Path(sys.argv[2])
kind = transformers.LlamaForCausalLM
models = {
    "old": kind.from_pretrained(source, quantization_config=hfc.RTNQuantConfig(bits=4, group_size=32)),
    "new": kind.from_pretrained(source, quantization_config=hfc.RTNQuantConfig(bits=8, group_size=32)),
}


def child(worker, steps, leave):
    def hook(event, arguments):
        if event.startswith(("open", "os.", "shutil.")) and any(str(out.parent) in str(one) for one in arguments):
            os.write(steps, b"s")
            os.read(leave, 1)
    sys.addaudithook(hook)
    hfc.save(models["new"], out, overwrite=True, worker=worker)
    os.write(steps, b"d")
    os._exit(0)


def run(worker, kill_at):
    """Overwrites in a child, killed before its operation `kill_at`; the number of operations done."""
    step_read, step_write = os.pipe()
    leave_read, leave_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(worker, step_write, leave_read)
    os.close(step_write)
    done = 0
    while os.read(step_read, 1) == b"s":
        if done == kill_at:
            os.kill(pid, signal.SIGKILL)
            break
        done += 1
        os.write(leave_write, b"g")
    os.waitpid(pid, 0)
    for descriptor in (step_read, leave_read, leave_write):
        os.close(descriptor)
    return done


def state():
    """Which model the output is, whole and as it was proven; None when it is torn."""
    proof = hfc.inspect(out).proof
    actual = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in out.iterdir() if file.name != "hf_compress.json"
    }
    if proof.level != "full" or proof.files != actual:
        return None
    found = hfc.load(out).state_dict()
    for name, model in models.items():
        wanted = model.state_dict()
        if wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted):
            return name
    return None


report = {"kills": 0, "absent": 0, "states": [], "left": [], "torn": []}
with CleanWorker(threads=1) as worker:
    hfc.save(models["old"], out, worker=worker)
    operations = run(worker, None)
    report["operations"] = operations
    report["finished"] = state()
    generator = random.Random(20)
    points = sorted({*generator.sample(range(operations), min(8, operations)), *range(operations - 10, operations)})
    for point in points:
        hfc.save(models["old"], out, overwrite=True, worker=worker)
        run(worker, point)
        report["kills"] += 1
        report["absent"] += not out.exists()
        hfc.load(out)  # restores `.NAME.old`
        found = state()
        report["states"].append(found)
        report["torn"] += [point] if found is None else []
        report["left"] += [f"{point} {name}" for name in os.listdir(out.parent) if name != out.name]
print(json.dumps(report))
'''


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_sigkill_during_a_real_save(tmp_path: Path) -> None:
    source = tiny_dir("llama", tmp_path)
    (tmp_path / "outputs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path / "outputs" / "model")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["finished"] == "new"
    assert report["kills"] >= 12, report
    assert report["torn"] == [], report
    assert report["left"] == [], report
    assert report["absent"] >= 1, report
    assert {"old", "new"} == set(report["states"]), report
