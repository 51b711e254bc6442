"""One cell of the matrix: a tool's process, watched from outside, and what its checkpoint is worth."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.common import QUIET_PERCENT
from benchmarks.peers.environments import child_environment, python_of
from benchmarks.peers.protocol import Job

INTERVAL_S = 0.01
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TAIL = 1500
"""Characters of a failed tool's output that are kept."""


@dataclass(frozen=True)
class Tool:
    """A tool of the matrix.

    Args:
        name: Its name.
        environment: Where it lives, a key of `ENVIRONMENTS`; None is this one.
        script: Its program in this folder.
        patched: By method, what had to be changed for it to run here.
    """

    name: str
    environment: str | None
    script: str
    patched: tuple[tuple[str, str], ...] = ()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Path(sys.executable) if self.environment is None else python_of(self.environment)


OURS = Tool("hf_compress", None, "run_ours.py")
LLM_COMPRESSOR = Tool(
    "llm-compressor",
    "llm-compressor",
    "run_llm_compressor.py",
    patched=(("awq", "IntermediatesCache.pin_memory does nothing: it raises where there is no accelerator"),),
)
GPTQMODEL = Tool("gptqmodel", "gptqmodel", "run_gptqmodel.py")
AUTO_ROUND = Tool("auto-round", "llm-compressor", "run_auto_round.py")


class ToolFailed(RuntimeError):
    """A tool's process ended before it had answered; the message is the end of its output."""


@dataclass
class Watched:
    """A process and the highest memory that was seen, in bytes."""

    process: psutil.Process
    peak_anonymous: int = 0

    def memory(self) -> dict[str, int]:
        """Resident and anonymous memory now, and the highest resident memory since `forget`, in bytes.

        Raises:
            ToolFailed: The process has ended, and waits to be asked for its status.
        """
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
        if len(found) < 3:
            raise ToolFailed("the process has ended")
        values = {key: int(text.split()[0]) * 1024 for key, text in found.items()}
        self.peak_anonymous = max(self.peak_anonymous, values["RssAnon"])
        return {"rss": values["VmRSS"], "peak_rss": values["VmHWM"], "anonymous": values["RssAnon"]}

    def forget(self) -> None:
        """Begin new peaks. The kernel keeps the resident one; the anonymous one is sampled."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="utf-8")
        self.peak_anonymous = 0

    def cpu_seconds(self) -> float:
        """Of all threads and ended children."""
        times = self.process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)


def run_cell(tool: Tool, job: Job, test_ids: Path, threads: int) -> dict[str, Any]:
    """Quantize with a tool and measure what it wrote.

    Args:
        tool: The tool.
        job: What to do; `out` is chosen here.
        test_ids: File of the test windows, windows × tokens.
        threads: Of the tool's process.

    Returns:
        Seconds, memory and company of loading and quantizing (`quantize`) and of saving (`save`), versions, and the
        perplexity with the negative log-likelihood of each window.

    Raises:
        ToolFailed: The tool or the evaluation failed.
    """
    with tempfile.TemporaryDirectory(prefix="ptq-peers-") as folder:
        out = Path(folder) / "out"
        job = Job(**{**asdict(job), "out": str(out)})
        measured = quantize(tool, job, Path(folder), threads)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        quality = perplexity_of(Path(job.model), out, tool is OURS, test_ids, threads)
    patched = dict(tool.patched).get(job.method)
    return {**measured, "weight_bytes": written, **quality, **({"patched": patched} if patched else {})}


def perplexity_of(original: Path, checkpoint: Path | None, ours: bool, test_ids: Path, threads: int) -> dict[str, Any]:
    """Perplexity of a checkpoint in a process of its own, see `benchmarks.peers.perplexity_of`.

    Raises:
        ToolFailed: It failed.
    """
    request = {
        "original": str(original),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "ours": ours,
        "ids": str(test_ids),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.perplexity_of", json.dumps(request)],
        cwd=ROOT,
        env=child_environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ToolFailed(f"evaluation: {done.stderr[-TAIL:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def quantize(tool: Tool, job: Job, folder: Path, threads: int) -> dict[str, Any]:
    """Run a tool's process through its stages, and measure each.

    Args:
        tool: The tool.
        job: What to do.
        folder: An existing folder to work in.
        threads: Of the process.

    Returns:
        Versions, memory after the imports, and `quantize` and `save`, see `run_cell`.

    Raises:
        ToolFailed: The process ended before it had answered.
    """
    log = folder / "log"
    receiver, sender = os.pipe()
    command = [str(tool.python), str(HERE / tool.script), json.dumps(asdict(job)), str(sender)]
    with (
        log.open("w", encoding="utf-8") as output,
        os.fdopen(receiver, encoding="utf-8") as answers,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=child_environment(threads, ROOT if tool.environment is None else None),
            pass_fds=(sender,),
        ) as child,
    ):
        os.close(sender)
        ready = _answer(answers, log)["ready"]
        watched = Watched(psutil.Process(child.pid))
        baseline = watched.memory()
        stages = {}
        for stage in ("quantize", "save"):
            with _stage(watched, baseline) as found:
                _tell(child)
                while not select.select([answers], [], [], INTERVAL_S)[0]:
                    with suppress(ToolFailed):  # what it said last is read below
                        watched.memory()
                found |= _answer(answers, log)
            stages[stage] = found
        _tell(child)
    return {"versions": ready, "baseline_bytes": baseline, **stages}


@contextmanager
def _stage(watched: Watched, baseline: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Measure what a process does inside: filled in at the end."""
    found: dict[str, Any] = {}
    watched.forget()
    load, started, used, busy = list(os.getloadavg()), time.perf_counter(), watched.cpu_seconds(), _busy_seconds()
    yield found
    wall, cpu = time.perf_counter() - started, watched.cpu_seconds() - used
    memory = watched.memory()
    others = 100 * max(0.0, _busy_seconds() - busy - cpu) / (wall * (os.cpu_count() or 1))
    found |= {
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_rss_growth": memory["peak_rss"] - baseline["rss"],
        "peak_anonymous_growth": watched.peak_anonymous - baseline["anonymous"],
        "load_before": load,
        "load_after": list(os.getloadavg()),
        "others_percent": others,
        "busy": others > QUIET_PERCENT,
    }


def _busy_seconds() -> float:
    """Processor seconds that all programs together have used since the machine started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest)


def _tell(child: subprocess.Popen[str]) -> None:
    """Let the child go on."""
    if child.stdin is None:
        raise ToolFailed("the process has no pipe")
    print("go", file=child.stdin, flush=True)


def _answer(answers: IO[str], log: Path) -> dict[str, Any]:
    """The child's next message."""
    text = answers.readline()
    if not text:
        raise ToolFailed(log.read_text(encoding="utf-8", errors="replace")[-TAIL:])
    message: dict[str, Any] = json.loads(text)
    return message
