"""The client of the clean process that proves checkpoints (see `proof_worker`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

import torch

from hf_compress.core.errors import WorkerError

_SCRIPT = Path(__file__).with_name("proof_worker.py")
_STDERR_LINES = 12


class CleanWorker:
    """A process with stock transformers and without this package, for many requests.

    It starts with the first request, and anew after it died. Use it as a context manager, or call `close`.

    Args:
        blocked: Packages to hide in it as if they were not installed, such as `compressed_tensors`.
        threads: Threads of its forward passes; by default as many as torch uses in this process.
        timeout: Seconds a request may take.
    """

    def __init__(self, blocked: Sequence[str] = (), threads: int | None = None, timeout: float = 1800.0) -> None:
        self.blocked = tuple(blocked)
        self.threads = threads
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self._closed = False

    def __enter__(self) -> CleanWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id, or None while it does not run."""
        return None if self._process is None else self._process.pid

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            op: `ping`, `forward`, `raises`, `keys`, `has` or `modules`; see `proof_worker`.
            **arguments: JSON values or paths. `forward` gets `threads` unless it is given.

        Returns:
            The answer. A request that failed inside the worker has the keys `error`, `message`, `traceback`.

        Raises:
            WorkerError: The worker can't start, died, took longer than the timeout, or answered nonsense.
        """
        if op == "forward":
            arguments.setdefault("threads", self.threads or torch.get_num_threads())
        line = json.dumps({"op": op, **arguments}, default=os.fspath)
        process = self._running()
        expired = threading.Event()
        timer = threading.Timer(self.timeout, _expire, (process, expired))
        timer.start()
        try:
            reply = _exchange(process, line)
        except BaseException:
            # An answer may still come, and would be taken for the answer to the next request.
            self._stop()
            raise
        finally:
            timer.cancel()
        answer = self._parsed(op, reply, expired.is_set())
        if expired.is_set():
            self._stop()  # killed just after it answered
        return answer

    def close(self) -> None:
        """End the process. Further requests raise `WorkerError`."""
        self._closed = True
        self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._closed:
            raise WorkerError("The clean worker is closed.", "make a new CleanWorker.")
        if self._process is not None:
            return self._process
        command = [sys.executable, "-I", str(_SCRIPT)]
        for package in self.blocked:
            command += ["--block", package]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._errors = TemporaryFile()  # noqa: SIM115 - lives as long as the process; closed in `_stop`
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                encoding="utf-8",
            )
        except OSError as error:
            self._stop()
            raise WorkerError(f"The clean worker can't start: {error}.", f"try: {' '.join(command)}") from error
        return self._process

    def _parsed(self, op: str, reply: str, expired: bool) -> dict[str, Any]:
        if not reply:
            raise self._failure(op, f"took longer than {self.timeout:g} s" if expired else "died")
        try:
            answer = json.loads(reply)
        except ValueError as error:
            raise self._failure(op, f"answered {reply[:200]!r}") from error
        if not isinstance(answer, dict):
            raise self._failure(op, f"answered {reply[:200]!r}")
        return answer

    def _failure(self, op: str, what: str) -> WorkerError:
        process, said = self._process, self._last_errors()
        self._stop()
        code = process.returncode if process is not None else None
        fix = "free memory or raise the timeout, then try again." if code == -9 else "see the lines above."
        return WorkerError(f"The clean worker {what} during {op!r} (exit code {code}). Its last lines:\n{said}\n", fix)

    def _last_errors(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_STDERR_LINES:]) or "(none)"

    def _stop(self) -> None:
        process, self._process = self._process, None
        errors, self._errors = self._errors, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
        if errors is not None:
            errors.close()


def _expire(process: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    process.kill()


def _exchange(process: subprocess.Popen[str], line: str) -> str:
    """One line to the process and one back; empty when it died."""
    if process.stdin is None or process.stdout is None:
        return ""
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return ""


def _close(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # what was not flushed to a dead process is lost by design
