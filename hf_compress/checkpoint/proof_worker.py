"""The clean process that proves checkpoints: stock transformers, nothing of ours.

Run as `python -I proof_worker.py [--block PACKAGE ...]`. It hides this package and the blocked ones as if
they were not installed, then answers requests: one JSON object per line on stdin, one per line on stdout.
What else is printed goes to stderr. This file must not import the package it belongs to; the parent process
imports `float_outputs` and `run_inputs` from here, so that both sides of a proof run the same lines.

Requests (`op` and its arguments) and answers:

- `ping` -> `pid`
- `forward`: `path, architecture, inputs, output, dtype="auto", attn_implementation=None, threads=None,
  device_map=None` ->
  `missing_keys, unexpected_keys, mismatched_keys, outputs, peak_bytes, resident_bytes_before,
  resident_bytes_after, seconds_load, seconds_forward, versions`. A checkpoint with an unknown `quant_method`
  does load in stock transformers, with random weights: its `missing_keys` are the sign.
- `dense`: `path, architecture, names, output` -> the three key lists; loads, dequantizes, and writes the weights
  of the named modules, in the form that stock has them then
- `raises`: `path, architecture` -> `exception, message`, both null when stock `from_pretrained` succeeds
- `keys`: `path, architecture, device="meta"` -> the three key lists, with all weights on that device
- `has`: `package` -> `importable`
- `modules` -> `hidden`: modules in `sys.modules` that should not be there

A request that fails is answered with `error, message, traceback`, and the worker lives on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

OWN_PACKAGE = "hf_compress"
Answer = dict[str, Any]
Sets = dict[str, dict[str, "torch.Tensor"]]


class HidingFinder:
    """A finder of `sys.meta_path` that does not find some packages.

    Wrapping each finder, instead of raising from one put in front, makes `importlib.util.find_spec` say None
    and `importlib.metadata` find nothing, which is how transformers asks whether a package is installed.

    Args:
        finder: The finder to ask for everything else.
        hidden: Names of top-level packages.
    """

    def __init__(self, finder: Any, hidden: frozenset[str]) -> None:
        self.finder = finder
        self.hidden = hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of a module, or None for a hidden one."""
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        """The installed distributions except the hidden ones."""
        # Optional in the finder protocol; importlib.metadata asks the same way.
        find = getattr(self.finder, "find_distributions", None)
        for found in () if find is None else find(*arguments, **keywords):
            if str(found.metadata["Name"]).replace("-", "_").lower() not in self.hidden:
                yield found

    def invalidate_caches(self) -> None:
        """Pass `importlib.invalidate_caches` on."""
        invalidate = getattr(self.finder, "invalidate_caches", None)
        if invalidate is not None:
            invalidate()


class Captured:
    """Keeps the exception that ends its block. At a process boundary every failure must become an answer."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Captured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


def float_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors at the top level of a model's output: `logits`, `last_hidden_state`, ...

    Args:
        outputs: What `model(**inputs)` gave: a `ModelOutput`, a tuple or a tensor.

    Returns:
        Detached tensors on the CPU, by field name, or by position for a tuple.
    """
    import torch

    if isinstance(outputs, torch.Tensor):
        outputs = {"output": outputs}
    elif not isinstance(outputs, Mapping):
        outputs = {str(index): value for index, value in enumerate(outputs)}
    return {
        name: value.detach().cpu().contiguous()
        for name, value in outputs.items()
        if type(value) is torch.Tensor and value.is_floating_point()
    }


def run_inputs(
    model: torch.nn.Module,
    sets: Iterable[Mapping[str, torch.Tensor]],
    pick: Callable[[Any], dict[str, torch.Tensor]] = float_outputs,
) -> dict[str, torch.Tensor]:
    """Run a model over input sets.

    Args:
        model: A model in evaluation mode.
        sets: One mapping of forward arguments per call.
        pick: What to take of the outputs.

    Returns:
        What `pick` took of every call, their names prefixed with the position of the set: `0.logits`.
    """
    import torch

    results = {}
    with torch.inference_mode():
        for index, inputs in enumerate(sets):
            for name, value in pick(model(**inputs)).items():
                results[f"{index}.{name}"] = value.clone()
    return results


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of the storages behind all parameters and buffers, each counted once."""
    tensors = [tensor for module in model.modules() for tensor in held_tensors(module)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The plain tensors that a module itself holds.

    Those inside wrapper tensors, as torchao's, and those that bitsandbytes keeps beside its weights, too.
    """
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield from inner_tensors(value)
        yield from _beside(value)
    if type(module).__module__.startswith("bitsandbytes."):
        yield from _beside(vars(module).get("state"))  # where INT8 weights move on their first forward


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a wrapper tensor, or the tensor itself."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)  # the protocol's own way: it lists its attributes by name
        if isinstance(inner, torch.Tensor):
            yield from inner_tensors(inner)


def _beside(holder: object) -> Iterator[torch.Tensor]:
    """Tensors among the attributes of a bitsandbytes weight, its quantization state, or that state's own."""
    import torch

    if not type(holder).__module__.startswith("bitsandbytes."):
        return
    for value in vars(holder).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif not isinstance(value, torch.nn.Module):  # a weight also knows its module
            yield from _beside(value)


def _load(path: str, architecture: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """Load with stock transformers; the model and its missing, unexpected and mismatched keys."""
    transformers = importlib.import_module("transformers")
    given = {name: value for name, value in options.items() if value is not None}
    model, info = getattr(transformers, architecture).from_pretrained(
        path, output_loading_info=True, local_files_only=True, **given
    )
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model, {name: sorted(str(found) for found in info[name]) for name in keys}


def _split(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Input sets from tensors named `0.input_ids`, `1.input_ids`, ..."""
    sets: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, argument = name.partition(".")
        sets.setdefault(int(index), {})[argument] = tensor
    return [sets[index] for index in sorted(sets)]


def _reset_peak() -> None:
    """Start a new peak measurement, where the kernel offers it (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def _peak_bytes() -> int | None:
    """Peak resident set since `_reset_peak`; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "safetensors", "compressed-tensors", "bitsandbytes", "torchao", "gptqmodel"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _ping() -> Answer:
    return {"pid": os.getpid()}


def _forward(
    path: str,
    architecture: str,
    inputs: str,
    output: str,
    dtype: str = "auto",
    attn_implementation: str | Mapping[str, str] | None = None,
    threads: int | None = None,
    device_map: str | None = None,
) -> Answer:
    import torch
    from safetensors.torch import load_file, save_file

    if threads is not None:
        torch.set_num_threads(threads)
    _reset_peak()
    started = time.perf_counter()
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    model, keys = _load(path, architecture, **options)
    loaded, before = time.perf_counter(), resident_bytes(model)
    results = run_inputs(model.eval(), _split(load_file(inputs)))
    finished = time.perf_counter()
    save_file(results, output)
    return {
        **keys,
        "outputs": sorted(results),
        "peak_bytes": _peak_bytes(),
        "resident_bytes_before": before,
        "resident_bytes_after": resident_bytes(model),
        "seconds_load": loaded - started,
        "seconds_forward": finished - loaded,
        "versions": _versions(),
    }


def _dense(path: str, architecture: str, names: Sequence[str], output: str) -> Answer:
    from safetensors.torch import save_file

    model, keys = _load(path, architecture, dtype="auto")
    if model.config.quantization_config.quant_method == "gptq":  # its layers dequantize, its quantizer does not
        weights = {name: model.get_submodule(name).dequantize_weight().detach().t() for name in names}
    else:
        model.dequantize()
        weights = {name: model.get_submodule(name).get_parameter("weight").detach() for name in names}
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, output)
    return {**keys, "versions": _versions()}


def _raises(path: str, architecture: str) -> Answer:
    with Captured() as captured:
        _load(path, architecture)
    if captured.error is None:
        return {"exception": None, "message": None}
    return {"exception": type(captured.error).__name__, "message": str(captured.error)}


def _keys(path: str, architecture: str, device: str = "meta") -> Answer:
    _, keys = _load(path, architecture, device_map=device, ignore_mismatched_sizes=True)
    return {**keys, "versions": _versions()}


def _has(package: str) -> Answer:
    with Captured() as captured:
        importlib.import_module(package)
    return {"importable": captured.error is None}


def _modules(hidden: frozenset[str]) -> Answer:
    return {"hidden": sorted(name for name in sys.modules if name.partition(".")[0] in hidden)}


def _answer(line: str, operations: Mapping[str, Callable[..., Answer]]) -> Answer:
    with Captured() as captured:
        request = json.loads(line)
        operation = request.pop("op")
        if operation not in operations:
            raise ValueError(f"Unknown operation {operation!r}; known: {', '.join(operations)}")
        return operations[operation](**request)
    error = captured.error
    return {"error": type(error).__name__, "message": str(error), "traceback": _trace(error)}


def _trace(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error is not None else ""


def main(arguments: Sequence[str] | None = None) -> Literal[0]:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description="Prove checkpoints with stock transformers.")
    parser.add_argument("--block", action="append", default=[], help="a package to hide")
    hidden = frozenset({OWN_PACKAGE, *(name.replace("-", "_") for name in parser.parse_args(arguments).block)})
    sys.meta_path[:] = [HidingFinder(finder, hidden) for finder in sys.meta_path]
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Libraries and their C code print to descriptor 1; the answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    operations: dict[str, Callable[..., Answer]] = {
        "ping": _ping,
        "forward": _forward,
        "dense": _dense,
        "raises": _raises,
        "keys": _keys,
        "has": _has,
        "modules": lambda: _modules(hidden),
    }
    for line in sys.stdin:
        answers.write(json.dumps(_answer(line, operations)) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
