"""The chunked divergence, against what it says in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_compress.training.distillation import DistillationConfig
from hf_compress.training.distillation.losses import Divergence

ROWS, VOCABULARY = 21, 50

SETTINGS: dict[str, dict[str, Any]] = {
    "forward": {"loss": "forward_kl"},
    "reverse": {"loss": "reverse_kl"},
    "jsd": {"loss": "jsd", "beta": 0.3},
}


def logits(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    draw = functools.partial(torch.randn, (rows, VOCABULARY), generator=torch.Generator().manual_seed(3))
    return (2 * draw()).to(dtype), (2 * draw()).to(dtype)


def written_out(own: Tensor, other: Tensor, loss: str, temperature: float, beta: float = 0.5) -> Tensor:
    """The definitions, with probabilities instead of their logarithms."""
    q, p = torch.softmax(own.double() / temperature, -1), torch.softmax(other.double() / temperature, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * q
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[loss]
    return temperature**2 * value


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_the_definition(name: str, temperature: float) -> None:
    settings = SETTINGS[name]
    own, other = logits()
    rows = torch.tensor([0, 3, 4, 11, 20])
    weights = torch.linspace(0.5, 2.0, len(rows), dtype=torch.float64)
    own.requires_grad_()
    expected = written_out(own[rows], other[rows], temperature=temperature, **settings)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), own)
    # float32: a sum of 50 terms, each with a relative error of 2^-24 in its logarithm of size up to 10
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        cast = own.detach().to(dtype).requires_grad_()
        kind = Divergence.of(DistillationConfig(temperature=temperature, chunk=2, **settings))
        found = kind(cast, other.to(dtype), rows)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        (weights.to(dtype) * found).sum().backward()
        assert cast.grad is not None
        torch.testing.assert_close(cast.grad.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradcheck(name: str) -> None:
    own, other = logits(rows=5)
    kind = Divergence.of(DistillationConfig(temperature=1.7, chunk=2, **SETTINGS[name]), size=41)
    rows = torch.tensor([0, 1, 3, 4])
    assert torch.autograd.gradcheck(lambda value: kind(value, other, rows), own.requires_grad_())


@pytest.mark.parametrize("name", SETTINGS)
def test_low_precision_logits_are_computed_in_float32(name: str) -> None:
    own, other = logits(torch.bfloat16)
    rows = torch.arange(ROWS)
    found = Divergence.of(DistillationConfig(**SETTINGS[name]))(own.requires_grad_(), other, rows)
    assert found.dtype == torch.float32
    expected = written_out(own, other, temperature=2.0, **SETTINGS[name])
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    found.sum().backward()
    assert own.grad is not None
    assert own.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SETTINGS)
def test_chunks_change_nothing(name: str) -> None:
    own, other = logits(torch.float32)
    rows = torch.arange(ROWS)
    results = []
    for chunk in (1, 7, 1000):
        value = own.clone().requires_grad_()
        made = Divergence.of(DistillationConfig(chunk=chunk, **SETTINGS[name]))(value, other, rows)
        made.sum().backward()
        results.append((made.detach(), value.grad))
    for made, gradient in results[1:]:
        torch.testing.assert_close(made, results[0][0], rtol=1e-6, atol=1e-6)  # vectorised sums may differ by order
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-7)


def test_end_points_of_jsd_are_both_kl() -> None:
    own, other = logits(torch.float32)
    rows = torch.arange(ROWS)
    for beta, loss in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        values = []
        for config in (DistillationConfig(loss="jsd", beta=beta), DistillationConfig(loss=loss)):
            value = own.clone().requires_grad_()
            made = Divergence.of(config)(value, other, rows)
            made.sum().backward()
            values.append((made.detach(), value.grad))
        assert torch.equal(values[0][0], values[1][0])
        assert torch.equal(values[0][1], values[1][1])
        assert float(values[0][0].min()) > 0


def test_squared_temperature_keeps_the_size_of_gradients() -> None:
    """Hot distributions are nearly linear in the logits: then only the factor T² keeps gradients from fading."""
    own, other = logits()
    sizes = []
    for temperature in (50.0, 100.0):
        value = own.clone().requires_grad_()
        Divergence.of(DistillationConfig(temperature=temperature))(value, other, torch.arange(ROWS)).sum().backward()
        assert value.grad is not None
        sizes.append(float(value.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_classes_that_both_rule_out_add_nothing(name: str) -> None:
    own, other = logits()
    kind = Divergence.of(DistillationConfig(**SETTINGS[name]))
    rows = torch.arange(ROWS)
    expected = Divergence.of(DistillationConfig(**SETTINGS[name]), size=VOCABULARY - 5)(own, other, rows)
    own[:, -5:] = -torch.inf
    other[:, -5:] = -torch.inf
    value = own.clone().requires_grad_()
    found = kind(value, other, rows)
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert value.grad is not None
    assert bool(value.grad.isfinite().all())


def test_what_does_not_count_gets_no_gradient() -> None:
    own, other = logits(torch.float32)
    own.requires_grad_()
    other.requires_grad_()
    rows = torch.tensor([2, 5])
    Divergence.of(DistillationConfig(), size=40)(own, other, rows).sum().backward()
    assert other.grad is None
    assert own.grad is not None
    assert bool((own.grad[rows, :40] != 0).all())
    assert int((own.grad != 0).sum()) == 2 * 40


def test_no_rows_give_a_loss_without_gradient() -> None:
    own, other = logits(torch.float32)
    own.requires_grad_()
    total = Divergence.of(DistillationConfig())(own, other, torch.arange(0)).sum()
    total.backward()
    assert float(total.detach()) == 0
    assert own.grad is not None
    assert float(own.grad.abs().max()) == 0


def test_nan_stays_nan() -> None:
    own, other = logits(torch.float32)
    other[1, 1] = torch.nan
    found = Divergence.of(DistillationConfig())(own, other, torch.arange(ROWS))
    assert found.isnan().nonzero().flatten().tolist() == [1]


class Allocations(TorchDispatchMode):
    """Counts memory of at least some size that operations make."""

    def __init__(self, least: int, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.least = least
        self.found: set[int] = set()
        self.keep: list[Tensor] = list(known)
        self.known = {value.untyped_storage().data_ptr() for value in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.least:
                self.keep.append(value)  # so that no address is used again
                self.found.add(value.untyped_storage().data_ptr())
        return made

    @property
    def count(self) -> int:
        return len(self.found - self.known)


def _plain(own: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    q, p = (torch.log_softmax(value.float() / 2, -1) for value in (own, other))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("name", [*SETTINGS, "plain"])
def test_memory(name: str) -> None:
    """Forward, nothing as large as the logits is made; backward, their gradient alone. The usual way makes several."""
    draw = functools.partial(torch.randn, (64, 500), generator=torch.Generator().manual_seed(3))
    own, other = draw().requires_grad_(), draw()
    size = own.numel() * own.element_size()
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    loss = _plain if name == "plain" else Divergence.of(DistillationConfig(chunk=8, **SETTINGS[name]))
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in {one.untyped_storage().data_ptr() for one in (own, other)}:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), Allocations(size, (own, other)) as seen:
        total = loss(own, other, torch.arange(64)).sum()
    forward, kept = seen.count, sum(saved.values())
    with Allocations(size, (own, other)) as seen:
        torch.autograd.grad(total, own)
    if name == "plain":
        assert forward >= 4
        assert kept >= 2 * size
    else:
        assert (forward, seen.count) == (0, 1)
        assert kept <= 64 * 8  # the indices of the rows
