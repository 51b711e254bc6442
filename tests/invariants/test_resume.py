"""SIGKILL in the middle of a real `hfc.compress`, and the same call again: the same bytes as without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.checkpoint.proof import file_hashes
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import OutputExistsError, UnsupportedModelError, WeightValueError
from hf_compress.core.registry import METHODS
from hf_compress.pipeline.compress import compress, partial_directory
from tests._utils.tiny import FAMILIES, tiny_dir

REPOSITORY = Path(__file__).parents[2]

# One process imports, then forks a child per run. An audit hook in the child counts its file operations below the
# directory of unfinished results, and kills it with the one that it is told: during any of the blocks, before or after
# it is safe, or while they are deleted, when the output has got its name. A run that goes on says how many results it
# wrote. One thread: forking is safe without a pool.
KILLER = '''
import hashlib, json, os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import hf_compress as hfc
from hf_compress.core.errors import OutputExistsError
from hf_compress.core.registry import METHODS
from hf_compress.pipeline.compress import compress

source, folder, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
generator = torch.Generator().manual_seed(1)
ids = torch.randint(3, 120, (16, 32), generator=generator)
data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
options = {"calibration": hfc.Calibration(data)} if METHODS.get(method).needs_data else {}


def child(out, kill_at, told):
    seen = {"operations": 0, "written": 0, "named": None, "refused": False}
    def hook(event, arguments):
        if event == "os.rename" and str(arguments[1]) == str(out):
            seen["named"] = seen["operations"]
        if not event.startswith(("open", "os.")) or ".partial" not in str(arguments):
            return
        if seen["operations"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen["operations"] += 1
        seen["written"] += event == "os.rename" and str(arguments[1]).endswith(".safetensors")
    sys.addaudithook(hook)
    try:
        compress(source, METHODS.get(method).config(bits=4, group_size=32, **options), out)
    except OutputExistsError:
        seen["refused"] = True
    os.write(told, json.dumps(seen).encode())
    os._exit(0)


def run(out, kill_at=None):
    """Compresses in a child; what it says, or None when it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(out, kill_at, write)
    os.close(write)
    said = b""
    while part := os.read(read, 1000):
        said += part
    _, status = os.waitpid(pid, 0)
    os.close(read)
    if not said and not os.WIFSIGNALED(status):
        raise RuntimeError("the child failed")
    return json.loads(said) if said else None


def hashes(out):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())}


whole = run(folder / "whole")
report = {"whole": whole, "runs": [], "late": [], "left": []}
points = sorted(random.Random(20).sample(range(3, whole["named"]), int(sys.argv[4])))
for point in points:
    out = folder / f"killed-{point}"
    killed = run(out, point)
    kept = len(list((folder / f".{out.name}.partial").glob("*.safetensors")))
    again = run(out)
    same = hashes(out) == hashes(folder / "whole")
    report["runs"].append({"point": point, "killed": killed is None, "kept": kept, "again": again, "same": same})
for point in (whole["named"] + 3, whole["operations"] - 1):
    out = folder / f"late-{point}"
    killed = run(out, point)
    left = (folder / f".{out.name}.partial").exists()
    again = run(out)
    same = hashes(out) == hashes(folder / "whole")
    report["late"].append({"point": point, "killed": killed is None, "left": left, "again": again, "same": same})
report["left"] = sorted(name for name in os.listdir(folder) if name.startswith("."))
print(json.dumps(report))
'''


def _killed(folder: Path, method: str, kills: int) -> dict[str, Any]:
    (folder / "outputs").mkdir()
    source = tiny_dir("llama", folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(folder / "outputs"), method, str(kills)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_sigkill_and_the_same_call_again(method: str, tmp_path: Path) -> None:
    report = _killed(tmp_path, method, 3)
    results = report["whole"]["written"]
    assert results == (14 if method == "rtn" else 2)
    assert report["left"] == []
    assert len(report["runs"]) == 3
    for run in report["runs"]:
        assert run["killed"], run
        assert run["same"], run
        # Finished results are taken over, not made again.
        assert run["again"]["written"] == results - run["kept"], run
    assert any(run["kept"] for run in report["runs"])
    # Killed while the results were being deleted: the output is there, and the rest goes with the next call.
    for run in report["late"]:
        assert run["killed"], run
        assert run["left"], run
        assert run["again"]["refused"], run
        assert run["same"], run


def _batches(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 120, (16, 32), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 120, (16, 16), generator=generator)
    return [{key: value[start : start + 4] for key, value in batch.items()} for start in range(0, 16, 4)]


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "qwen3-moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_streamed_is_what_a_model_in_memory_gives(method: str, name: str, tmp_path: Path, worker: CleanWorker) -> None:
    path = tiny_dir(name, tmp_path)
    spec = METHODS.get(method)
    options = {"calibration": hfc.Calibration(_batches(name))} if spec.needs_data else {}
    seen: list[tuple[int, int]] = []
    compress(
        path,
        spec.config(bits=4, group_size=32, **options),
        tmp_path / "streamed",
        progress=lambda done, total: seen.append((done, total)),
        worker=worker,
    )
    live = getattr(transformers, FAMILIES[name][0]).from_pretrained(path)
    hfc.save(hfc.quantize(live, spec.config(bits=4, group_size=32, **options)), tmp_path / "live", worker=worker)
    assert file_hashes(tmp_path / "streamed") == file_hashes(tmp_path / "live")
    assert seen[-1][0] == seen[-1][1]
    assert not partial_directory(tmp_path / "streamed").exists()


class Interrupts:
    """A tokenizer that can't be saved: the model is quantized and written by then, and not proven."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Stop."""
        raise KeyboardInterrupt


@pytest.mark.parametrize(("method", "name"), [("rtn", "llama"), ("gptq", "llama"), ("gptq", "t5")])
def test_nothing_is_made_again_once_all_is_finished(
    method: str, name: str, tmp_path: Path, worker: CleanWorker
) -> None:
    path, out = tiny_dir(name, tmp_path), tmp_path / "out"
    spec = METHODS.get(method)

    def request() -> hfc.QuantConfig:
        options = {"calibration": hfc.Calibration(_batches(name))} if spec.needs_data else {}
        return spec.config(bits=4, group_size=32, **options)

    compress(path, request(), tmp_path / "whole", worker=worker)
    kept = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(path, request(), out, tokenizer=Interrupts(), worker=worker)
        kept.append({file.name: file.stat().st_ino for file in partial_directory(out).glob("*.safetensors")})
    assert kept[0] == kept[1]
    assert kept[0]
    compress(path, request(), out, worker=worker)
    assert file_hashes(out) == file_hashes(tmp_path / "whole")


FULL = """
import os, resource, sys
from pathlib import Path
import hf_compress as hfc
from hf_compress.core.errors import WriteError
from hf_compress.pipeline.compress import compress
source, out = Path(sys.argv[1]), Path(sys.argv[2])
free = resource.getrlimit(resource.RLIMIT_FSIZE)
done = []
def progress(count, total):
    done.append(count)
    if count == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, free[1]))
try:
    compress(source, hfc.RTNQuantConfig(bits=4), out, progress=progress)
except WriteError as error:
    print(error.code, error)
resource.setrlimit(resource.RLIMIT_FSIZE, free)
kept = list((out.parent / f".{out.name}.partial").glob("*.safetensors"))
print(len(kept), out.exists())
print(compress(source, hfc.RTNQuantConfig(bits=4), out).level, sorted(os.listdir(out.parent)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    source = tiny_dir("llama", tmp_path)
    (tmp_path / "outputs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(source), str(tmp_path / "outputs" / "model")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, kept, finished = [line for line in done.stdout.splitlines() if line.strip()]
    assert refused.startswith("HFC704")
    assert "What is finished stays there" in refused
    assert kept == "5 False"
    assert finished == "full ['model']"


def test_a_refused_call_leaves_nothing_but_what_was_there_before(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    store = partial_directory(tmp_path / "out")
    with pytest.raises(WeightValueError, match="1 NaN"):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out")
    assert not store.exists()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out", progress=stop)
    before = {file.name for file in store.glob("*.safetensors")}
    assert before
    with pytest.raises(WeightValueError, match="1 NaN"):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out")
    assert before <= {file.name for file in store.glob("*.safetensors")}


def test_another_request_does_not_take_over(tmp_path: Path, worker: CleanWorker) -> None:
    path = tiny_dir("llama", tmp_path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out", progress=stop)
    assert list(partial_directory(tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(OutputExistsError, match=r"unfinished results of another request.*bits 4 there, 8 now"):
        compress(path, hfc.RTNQuantConfig(bits=8), tmp_path / "out")
    proof = compress(path, hfc.RTNQuantConfig(bits=8), tmp_path / "out", overwrite=True, worker=worker)
    assert proof.level == "full"
    assert not partial_directory(tmp_path / "out").exists()


def test_only_the_results_behind_an_output_are_left_over(tmp_path: Path, worker: CleanWorker) -> None:
    path, out = tiny_dir("llama", tmp_path), tmp_path / "out"
    compress(path, hfc.RTNQuantConfig(bits=4), out, worker=worker)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for bits in (4, 8):  # what is to replace it
        with pytest.raises(KeyboardInterrupt):
            compress(path, hfc.RTNQuantConfig(bits=bits), out, overwrite=True, progress=stop)
        kept = sorted(partial_directory(out).iterdir())
        with pytest.raises(OutputExistsError, match="exists already"):
            compress(path, hfc.RTNQuantConfig(bits=bits), out)
        assert sorted(partial_directory(out).iterdir()) == kept
    for file in kept:  # of another request, though older than the output
        os.utime(file, ns=(0, 0))
    with pytest.raises(OutputExistsError, match="exists already"):
        compress(path, hfc.RTNQuantConfig(bits=8), out)
    assert sorted(partial_directory(out).iterdir()) == kept


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_a_source_that_changed_is_not_gone_on_with(changed: str, tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out", progress=stop)
    if changed == "weights":
        weights = path / "model.safetensors"
        before, content = weights.stat(), bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(OutputExistsError, match=f"another request: {changed} differ"):
        compress(path, hfc.RTNQuantConfig(bits=4), tmp_path / "out")


def test_live_models_are_refused_and_recipes_taken(tmp_path: Path, worker: CleanWorker) -> None:
    path = tiny_dir("llama", tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(UnsupportedModelError, match="disk to disk"):
        compress(model, hfc.RTNQuantConfig(bits=4), tmp_path / "out")
    compress(path, "rtn-int8", tmp_path / "int8", worker=worker)
    assert hfc.inspect(tmp_path / "int8").plan.method == "rtn"
    compress(path, "cast-bf16", tmp_path / "bf16", worker=worker)
    assert hfc.inspect(tmp_path / "bf16").plan.method == "cast"
