from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.lazy import LazyWeight, dense
from hf_compress.modules.packed import PackedTensor
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import packed_of
from tests._utils.tiny import tiny


@dataclass(frozen=True)
class Counting(PackedTensor):
    """Counts how often the whole weight is dequantized."""

    dequantized: ClassVar[list[int]] = [0]

    def dense(self) -> Tensor:
        self.dequantized[0] += 1
        return super().dense()


class CountingOps(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def counted(shape: tuple[int, ...] = (6, 16), **options: Any) -> tuple[LazyWeight, Tensor]:
    packed = packed_of(shape, **options)
    value = packed.dense()
    Counting.dequantized[0] = 0
    return LazyWeight(Counting(packed.layout, packed.codes, packed.scale, packed.zero_point)), value


def calls() -> int:
    return Counting.dequantized[0]


FORM: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda weight: weight.shape,
    "size": lambda weight: weight.size(),
    "size of a dimension": lambda weight: weight.size(1),
    "dtype": lambda weight: weight.dtype,
    "device": lambda weight: weight.device,
    "ndim": lambda weight: weight.ndim,
    "dim": lambda weight: weight.dim(),
    "numel": lambda weight: weight.numel(),
    "len": len,
    "element_size": lambda weight: weight.element_size(),
    "itemsize": lambda weight: weight.itemsize,
    "nbytes": lambda weight: weight.nbytes,
    "is_floating_point": lambda weight: weight.is_floating_point(),
    "torch.is_floating_point": torch.is_floating_point,
    "is_complex": lambda weight: weight.is_complex(),
    "requires_grad": lambda weight: weight.requires_grad,
    "grad_fn": lambda weight: weight.grad_fn,
    "is_leaf": lambda weight: weight.is_leaf,
    "is_meta": lambda weight: weight.is_meta,
    "is_cuda": lambda weight: weight.is_cuda,
    "layout": lambda weight: weight.layout,
    "is_quantized": lambda weight: weight.is_quantized,
    "is_tensor": torch.is_tensor,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("question", FORM)
def test_questions_about_the_form_cost_nothing(question: str, transposed: bool, dtype: torch.dtype) -> None:
    lazy, value = counted(transposed=transposed, dtype=dtype)
    assert FORM[question](lazy) == FORM[question](value)
    assert calls() == 0


def test_a_model_s_weight_answers_without_any_operation() -> None:
    layer = quantize(tiny("llama"), RTNQuantConfig()).model.layers[0].self_attn.q_proj
    with CountingOps() as counter:
        assert (layer.weight.dtype, tuple(layer.weight.shape)) == (torch.float32, (64, 64))
        assert layer.weight.device.type == "cpu"
    assert counter.seen == []
    with CountingOps() as counter:
        layer.weight.sum()
    assert counter.seen


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda weight: weight + 1,
    "right add": lambda weight: torch.ones(16) + weight,
    "sum": lambda weight: weight.sum(),
    "matmul": lambda weight: torch.ones(2, 6) @ weight,
    "linear": lambda weight: functional.linear(torch.ones(2, 16), weight),
    "transpose": lambda weight: weight.t(),
    "T": lambda weight: weight.T,
    "slice": lambda weight: weight[1:3],
    "row": lambda weight: weight[2],
    "mask": lambda weight: weight[weight > 0],
    "cat": lambda weight: torch.cat([weight, weight]),
    "stack": lambda weight: torch.stack((weight, weight)),
    "clone": lambda weight: weight.clone(),
    "to": lambda weight: weight.to(torch.float64),
    "float": lambda weight: weight.float(),
    "view": lambda weight: weight.view(-1),
    "norm": lambda weight: torch.linalg.norm(weight),
    "contiguous": lambda weight: weight.contiguous(),
    "iter": lambda weight: next(iter(weight)),
    "addmm": lambda weight: torch.addmm(torch.zeros(16), torch.ones(2, 6), weight),
    "where": lambda weight: torch.where(weight > 0, weight, 0.0),
    "einsum": lambda weight: torch.einsum("ij,kj->ik", torch.ones(2, 16), weight),
    "numpy": lambda weight: torch.from_numpy(weight.numpy()),
    "as keyword": lambda weight: torch.add(input=torch.ones(16), other=weight),
}


@pytest.mark.parametrize("use", USES)
def test_values_are_those_of_the_dense_weight(use: str) -> None:
    lazy, value = counted()
    seen, expected = USES[use](lazy), USES[use](value)
    assert type(seen) is Tensor
    assert torch.equal(seen, expected)
    assert seen.dtype == expected.dtype
    assert calls() >= 1


@pytest.mark.parametrize("same", [lambda weight: weight.detach(), lambda weight: weight.data])
def test_detached_it_stays_lazy_and_read_only(same: Callable[[Tensor], Tensor]) -> None:
    lazy, value = counted()
    seen = same(lazy)
    assert isinstance(seen, LazyWeight)
    assert calls() == 0
    assert torch.equal(seen, value)


def test_used_once_dequantized_once() -> None:
    lazy, _ = counted()
    functional.linear(torch.ones(2, 16), lazy)
    assert calls() == 1


def test_nothing_is_cached() -> None:
    lazy, _ = counted()
    first = lazy.clone()
    lazy.packed.scale.mul_(2)
    assert torch.equal(lazy.clone(), first * 2)


def test_dense_helper() -> None:
    lazy, value = counted()
    assert torch.equal(dense(lazy), value)
    assert dense(3) == 3
    assert "tensor(" in repr(lazy)


@pytest.mark.parametrize("group_size", [8, "channel"])
@pytest.mark.parametrize("index", [torch.tensor([[0, 5], [3, 3]]), torch.tensor(2), torch.empty(0, dtype=torch.long)])
def test_embedding_looks_up_packed_rows(index: Tensor, group_size: int | str) -> None:
    lazy, value = counted(bits=8, group_size=group_size)
    assert torch.equal(functional.embedding(index, lazy), functional.embedding(index, value))
    assert calls() == 0


@pytest.mark.parametrize(("group_size", "transposed"), [("tensor", False), (8, True)])
def test_embedding_of_any_layout(group_size: int | str, transposed: bool) -> None:
    """A linear weight may be used as a table too (`F.embedding(ids, lm_head.weight)`)."""
    lazy, value = counted(bits=8, group_size=group_size, transposed=transposed)
    index = torch.tensor([0, 5, 3])
    assert torch.equal(functional.embedding(index, lazy), functional.embedding(index, value))


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"max_norm": 0.1}, {"max_norm": 0.1, "norm_type": 1.0}])
def test_embedding_options(options: dict[str, Any]) -> None:
    lazy, value = counted(bits=8)
    index = torch.tensor([0, 5, 3])
    expected = functional.embedding(index, value.clone(), **options)
    assert torch.equal(functional.embedding(index, lazy, **options), expected)


def single(packed: tuple[int, ...] = (3, 6, 16), **options: Any) -> tuple[LazyWeight, Tensor]:
    return counted(packed, **options)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
@pytest.mark.parametrize("index", [0, 2, -1, torch.tensor(1)])
def test_one_expert(index: int | Tensor, group_size: int | str, symmetric: bool, transposed: bool) -> None:
    lazy, value = single(group_size=group_size, symmetric=symmetric, transposed=transposed)
    seen = lazy[index]
    assert torch.equal(seen, value[index])
    assert seen.shape == value[index].shape


def test_one_expert_does_not_dequantize_all() -> None:
    lazy, value = single()
    with CountingOps() as counter:
        one = lazy[1].numel()
    assert calls() == 0
    assert one == value[1].numel()
    assert counter.seen


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 3),
        (1, 2),
        (0, slice(None), 3),
        torch.tensor([2, 0]),
        torch.tensor([True, False, True]),
        ...,
        None,
        True,
        torch.tensor(True),
    ],
    ids=str,
)
def test_other_indices_of_experts(index: Any) -> None:
    lazy, value = single()
    seen = lazy[index]
    assert seen.shape == value[index].shape
    assert torch.equal(seen, value[index])


def test_expert_out_of_range() -> None:
    lazy, value = single()
    for weight in (lazy, value):
        with pytest.raises(IndexError):
            weight[3]


@pytest.mark.parametrize("index", [torch.tensor([-1]), torch.tensor([6])])
def test_embedding_out_of_range(index: Tensor) -> None:
    """A negative id is an error, as it is for the dense table; not the last row."""
    lazy, value = counted(bits=8)
    for weight in (value, lazy):
        with pytest.raises(IndexError):
            functional.embedding(index, weight)
