"""Bytes in memory and on disk, against sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_compress.core.errors import CheckpointNotFoundError, CorruptCheckpointError, MeasurementError
from hf_compress.evaluation.size import DiskBytes, dense_bytes, disk_bytes, resident_bytes


@pytest.fixture(autouse=True)
def _own_rng() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


class Packed(torch.Tensor):
    """A wrapper tensor as torchao makes them: shows float32, holds int8 and scales."""

    data8: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, data8: Tensor, scale: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, data8.shape, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, data8: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data8, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: object, stride: object) -> Packed:
        return Packed(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].data8, args[0].scale)
        raise NotImplementedError(func)


class Opaque(torch.Tensor):
    """A wrapper tensor that doesn't tell what is inside."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


def holding(**buffers: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def test_parameters_and_all_buffers_count() -> None:
    module = nn.Linear(8, 4)
    module.register_buffer("saved", torch.zeros(3, dtype=torch.int8))
    module.register_buffer("cache", torch.zeros(5, dtype=torch.float64), persistent=False)
    assert resident_bytes(module) == (8 * 4 + 4) * 4 + 3 + 40
    assert dense_bytes(module) == resident_bytes(module)


def test_tied_weights_count_once() -> None:
    assert resident_bytes(tiny_llama(False)) - resident_bytes(tiny_llama(True)) == 64 * 16 * 4
    assert dense_bytes(tiny_llama(False)) - dense_bytes(tiny_llama(True)) == 64 * 16 * 4


def test_a_real_model_is_the_sum_of_its_tensors() -> None:
    model = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    tensors = [*model.parameters(), *model.buffers()]
    assert dense_bytes(model) == sum(t.numel() * t.element_size() for t in tensors)
    assert resident_bytes(model) == dense_bytes(model)


@given(st.integers(1, 50), st.integers(0, 49), st.sampled_from([torch.float32, torch.int8, torch.float16]))
def test_views_count_as_the_storage_they_keep_alive(count: int, start: int, dtype: torch.dtype) -> None:
    whole = torch.zeros(count, 3, dtype=dtype)
    start = min(start, count - 1)
    module = holding(first=whole[start:], second=whole[:, 1], third=whole.T)
    assert resident_bytes(module) == count * 3 * dtype.itemsize
    assert resident_bytes(holding(only=whole[start:])) == count * 3 * dtype.itemsize


def test_empty_tensors_hold_nothing() -> None:
    assert resident_bytes(holding(a=torch.empty(0), b=torch.empty(0, 4))) == 0


def test_extra_tensors_are_added_and_not_doubled() -> None:
    module = nn.Linear(4, 4, bias=False)
    state = torch.zeros(10, dtype=torch.uint8)
    assert resident_bytes(module, extra_tensors=[state, state[2:], module.weight]) == 64 + 10


def test_wrapper_subclasses_count_as_what_is_inside() -> None:
    packed = Packed(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8))
    module = nn.Module()
    module.weight = nn.Parameter(packed, requires_grad=False)
    assert resident_bytes(module) == 64 + 32
    assert dense_bytes(module) == 256
    nested = Packed(packed, torch.ones(2))
    assert resident_bytes(module, extra_tensors=[nested]) == 64 + 32 + 8


def test_a_tensor_that_hides_its_memory_is_an_error() -> None:
    with pytest.raises(MeasurementError, match=r"Opaque of shape \(4, 4\)"):
        resident_bytes(nn.Module(), extra_tensors=[Opaque()])


def test_lazy_modules_are_an_error() -> None:
    module = nn.Sequential(nn.LazyLinear(4))
    for measure in (resident_bytes, dense_bytes):
        with pytest.raises(MeasurementError, match=r"'0\.weight' belongs to a lazy module"):
            measure(module)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_mkldnn_tensors_count_by_their_elements() -> None:
    opaque = torch.randn(6, 7).to_mkldnn()
    assert resident_bytes(nn.Module(), extra_tensors=[opaque, opaque]) == 6 * 7 * 4


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_count_indices_and_values() -> None:
    pointers, indices, values = torch.arange(5), torch.arange(4), torch.ones(4)
    for build in (torch.sparse_csr_tensor, torch.sparse_csc_tensor):
        sparse = build(pointers, indices, values, (4, 4))
        assert resident_bytes(nn.Module(), extra_tensors=[sparse]) == (5 + 4) * 8 + 4 * 4
    assert resident_bytes(nn.Module(), extra_tensors=[torch.eye(4).to_sparse()]) == 4 * 2 * 8 + 4 * 4


def test_meta_counts_on_request_only() -> None:
    with torch.device("meta"):
        model = tiny_llama(True)
    model.tie_weights()
    real = tiny_llama(True)
    inverse_frequencies = resident_bytes(model)
    assert inverse_frequencies <= sum(b.numel() * b.element_size() for b in real.buffers())
    assert resident_bytes(model, count_meta=True) == resident_bytes(real)
    assert dense_bytes(model) == dense_bytes(real)
    view = torch.empty(4, 4, device="meta")
    assert resident_bytes(nn.Module(), extra_tensors=[view, view[1:]], count_meta=True) == 64


def test_disk_bytes_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "training_args.bin").write_bytes(b"x" * 7)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x" * 10)
    assert disk_bytes(tmp_path) == DiskBytes(total=119, weights=110, files=4)
    assert disk_bytes(str(tmp_path / "config.json")) == DiskBytes(total=2, weights=0, files=1)
    assert DiskBytes.model_validate_json(disk_bytes(tmp_path).model_dump_json()) == disk_bytes(tmp_path)


def test_disk_bytes_of_the_hubs_links(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc123"
    blob.parent.mkdir()
    blob.write_bytes(b"x" * 50)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "same.safetensors").symlink_to(blob)
    assert disk_bytes(snapshot) == DiskBytes(total=50, weights=50, files=1)
    assert disk_bytes(tmp_path) == DiskBytes(total=50, weights=50, files=1)
    blob.unlink()
    with pytest.raises(CorruptCheckpointError, match="a link to a file that is gone"):
        disk_bytes(snapshot)


def test_disk_bytes_of_nothing(tmp_path: Path) -> None:
    assert disk_bytes(tmp_path) == DiskBytes(total=0, weights=0, files=0)
    with pytest.raises(CheckpointNotFoundError, match="missing"):
        disk_bytes(tmp_path / "missing")
