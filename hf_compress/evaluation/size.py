"""Real bytes: what a model holds in memory and what a checkpoint takes on disk."""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_compress.checkpoint.proof_worker import held_tensors, inner_tensors
from hf_compress.core.errors import CheckpointNotFoundError, CorruptCheckpointError, MeasurementError

# Trainer's optimizer.pt, rng_state.pth and training_args.bin are no weights, hence names and not suffixes.
_WEIGHT_FILES = (
    "*.safetensors",
    "*.gguf",
    "*.onnx",
    "*.onnx_data*",
    "*.onnx.data*",
    "pytorch_model*.bin",
    "adapter_model*.bin",
    "openvino_*.bin",
    "weight.bin",  # inside an .mlpackage
    "*.pte",
    "*.tflite",
    "*.engine",
    "*.h5",
    "*.msgpack",
)
_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


class DiskBytes(BaseModel):
    """What a directory or file takes on disk.

    Args:
        total: Bytes of all files.
        weights: Bytes of the files that hold weights.
        files: Number of files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: int
    weights: int
    files: int


def resident_bytes(model: nn.Module, *, extra_tensors: Iterable[Tensor] = (), count_meta: bool = False) -> int:
    """Bytes of the memory that the model's tensors really hold.

    Every storage counts once and whole: tied weights once, a view as the storage it keeps alive. Wrapper
    tensors (torchao, DTensor, ...) count as the tensors inside, bitsandbytes' weights with the scales and tables that
    it keeps beside them. oneDNN's opaque tensors don't tell their padding and count as `numel * itemsize`.

    Args:
        model: Its parameters and buffers, persistent or not, are walked.
        extra_tensors: Tensors that modules hold elsewhere, such as the state of a packed kernel.
        count_meta: Whether meta tensors count as what they would take; else they count 0.

    Returns:
        Bytes, on all devices together.

    Raises:
        MeasurementError: A tensor of an unknown kind that hides its memory, or a lazy module that never ran.
    """
    storages: dict[tuple[object, ...], tuple[int, object]] = {}
    for tensor in itertools.chain(_tensors(model), *map(held_tensors, model.modules()), extra_tensors):
        for plain in _plain_tensors(tensor):
            key, size, owner = _storage(plain)
            if key[0] == "meta" and not count_meta:
                continue
            # The owner is kept, so that an identity in a key isn't reused while walking.
            storages[key] = (max(size, storages.get(key, (0, None))[0]), owner)
    return sum(size for size, _ in storages.values())


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers at the shape and dtype that they show, each tensor once.

    The size that a compressed model is compared with: of the original, or of a skeleton of it on the meta
    device. A wrapper tensor counts as what it stands for; weights that a class swap turned into packed
    buffers count as those buffers, so ask the original.

    Raises:
        MeasurementError: A lazy module that never ran.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(model)}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a dense checkpoint of the model holds, each once.

    Unlike `dense_bytes` without buffers that are not saved; tied weights count once. The file's header, some bytes
    per tensor, is not in it.
    """
    stored = model.state_dict(keep_vars=True).values()
    tensors = {id(value): value for value in stored if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def disk_bytes(path: str | os.PathLike[str]) -> DiskBytes:
    """Bytes of a checkpoint on disk, weight files apart.

    Args:
        path: A directory, walked with all sub-directories, or one file. Links to files (the Hub's cache is
            made of them) count as the file, each file once; links to directories inside are not followed.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        CorruptCheckpointError: A link points to nothing.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointNotFoundError(f"There is nothing at {str(root)!r}.", fix="check the path")
    sizes: dict[tuple[int, int], tuple[int, bool]] = {}
    for file in [root] if root.is_file() else _files(root):
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise CorruptCheckpointError(
                f"{str(file)!r} is a link to a file that is gone.", fix="download or save the model again"
            ) from error
        known = sizes.get((status.st_dev, status.st_ino), (0, False))
        sizes[status.st_dev, status.st_ino] = (status.st_size, known[1] or _is_weight_file(file.name))
    return DiskBytes(
        total=sum(size for size, _ in sizes.values()),
        weights=sum(size for size, is_weight in sizes.values() if is_weight),
        files=len(sizes),
    )


def _files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        yield from (Path(directory, name) for name in names)


def _is_weight_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHT_FILES)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise MeasurementError(
                f"{name!r} belongs to a lazy module and has no shape yet.", fix="run the model once first"
            )
        yield tensor


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that really hold memory."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in inner_tensors(tensor):
            yield from _plain_tensors(inner)
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED_ROWS:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _COMPRESSED_COLUMNS:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def _storage(tensor: Tensor) -> tuple[tuple[object, ...], int, object]:
    """A key that equal storages share, the storage's bytes, and what must stay alive with the key."""
    if tensor.is_mkldnn:
        return ("opaque", id(tensor)), tensor.numel() * tensor.dtype.itemsize, tensor
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":  # a fake tensor too, whatever device it claims
        return ("meta", id(storage)), storage.nbytes(), storage
    try:
        return (tensor.device, storage.data_ptr()), storage.nbytes(), storage
    except RuntimeError as error:  # torch's answer for the empty shell of a wrapper tensor
        raise MeasurementError(
            f"A {type(tensor).__name__} of shape {tuple(tensor.shape)} doesn't tell which memory it holds.",
            fix="give the class __tensor_flatten__, or materialise the model before measuring",
        ) from error
