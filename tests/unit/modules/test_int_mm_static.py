"""The static integer kernel against exact integers, compressed-tensors' arithmetic, and the reference forward."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.core import scheme as schemes
from hf_compress.core.registry import Quantized
from hf_compress.modules.kernels.choose import choose_kernels, kernel_counts, reference_kernels
from hf_compress.modules.kernels.int_mm import IntMatmul, StaticIntMatmul, _exact, static_linear
from hf_compress.modules.packed import Layout, pack
from hf_compress.modules.swap import pack_module
from tests._utils.packing import codes_of

needs_exact = pytest.mark.skipif(not _exact(), reason="torch._int_mm is not exact on this processor (no VNNI)")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001


def zero_of(value: int | None) -> Tensor | None:
    return None if value is None else torch.tensor([value], dtype=torch.int8)


def oracle(
    tokens: Tensor, codes: Tensor, scale: Tensor, step: Tensor, zero: int | None, bias: Tensor | None
) -> Tensor:
    """Exact integers, scaled in float64; float32 decides on which side of a tie an input lies."""
    shifted = torch.clamp(tokens / step + (zero or 0), -128, 127).round().long() - (zero or 0)
    made = (shifted @ codes.long().T).double() * (scale.double() * step.double())
    return made if bias is None else made + bias.double()


def relative(seen: Tensor, expected: Tensor) -> float:
    return float((seen.double() - expected.double()).abs().max() / expected.double().abs().max())


@needs_exact
@pytest.mark.parametrize("zero", [None, 0, -128, 127, 31])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0, 1e6])
def test_exact_integers(zero: int | None, biased: bool, size: float) -> None:
    """float32 scales an exact integer below 2^24: four roundings of 2^-24, relative to the largest output."""
    tokens, codes, bias = random(6, 24) * size, codes_of((16, 24), 8), random(16, seed=4) if biased else None
    step = torch.tensor([0.02])
    seen = static_linear(tokens, codes, scales(16), step, zero_of(zero), bias)
    assert relative(seen, oracle(tokens, codes, scales(16), step, zero, bias)) < 1e-6


@needs_exact
@pytest.mark.parametrize("zero", [None, -128, 127])
def test_extreme_codes(zero: int | None) -> None:
    tokens = torch.tensor([[1e9, -1e9] * 256, [1e9] * 512, [-1e9] * 512])
    for code in (-128, 127):
        codes = torch.full((8, 512), code, dtype=torch.int8)
        found = static_linear(tokens, codes, torch.ones(8), torch.ones(1), zero_of(zero), None)
        assert torch.equal(found.double(), oracle(tokens, codes, torch.ones(8), torch.ones(1), zero, None))


@needs_exact
@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_compressed_tensors(symmetric: bool) -> None:
    """The tolerance that the kernel declares: the reference sums 64 float32 products instead of integers."""
    value, codes, zero = random(2, 7, 64) * 3, codes_of((16, 64), 8), None if symmetric else 12
    step, args = torch.tensor([0.04]), schemes.static_args(symmetric)
    rounded = fake_quantize(value, step, zero_of(zero), args)
    expected = functional.linear(rounded, codes.float() * scales(16).unsqueeze(-1)).view(-1, 16)
    seen = static_linear(value.view(-1, 64), codes, scales(16), step, zero_of(zero), None)
    assert relative(seen, expected) < StaticIntMatmul.tolerance


@needs_exact
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_values_that_are_no_numbers(symmetric: bool, biased: bool) -> None:
    """A token with NaN gives NaN and spoils no other; an infinite input is the end of the grid, as the reference's."""
    tokens, codes, zero = random(5, 64), codes_of((16, 64), 8), None if symmetric else 12
    tokens[1, 5], tokens[2, 0], tokens[3, 63] = float("nan"), float("inf"), float("-inf")
    step, bias = torch.tensor([0.04]), random(16, seed=4) if biased else None
    rounded = fake_quantize(tokens, step, zero_of(zero), schemes.static_args(symmetric))
    expected = functional.linear(rounded, codes.float() * scales(16).unsqueeze(-1), bias)
    seen = static_linear(tokens, codes, scales(16), step, zero_of(zero), bias)
    assert seen.isnan().all(1).tolist() == expected.isnan().all(1).tolist() == [False, True, False, False, False]
    numbers = [0, 2, 3, 4]
    assert relative(seen[numbers], expected[numbers]) < StaticIntMatmul.tolerance


def packed_linear(symmetric: bool, rows: int = 16, columns: int = 24) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(columns, rows)
    made = schemes.scheme(schemes.weight_args(8, "channel", True), schemes.static_args(symmetric))
    zero = None if symmetric else zero_of(-20)
    parts = Quantized(
        codes_of((rows, columns), 8),
        scales(rows).unsqueeze(-1),
        None,
        input_scale=torch.tensor([0.03]),
        input_zero_point=zero,
    )
    pack_module(module, "weight", pack(parts, Layout((rows, columns), made, transposed=False)))
    return module


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 24), (0, 24)])
def test_module_agrees_with_its_reference(symmetric: bool, shape: tuple[int, ...]) -> None:
    module = packed_linear(symmetric)
    module.hfc_kernel = StaticIntMatmul()  # type: ignore[assignment]
    value = random(*shape)
    with torch.no_grad():
        seen = module(value)
        with reference_kernels(module):
            expected = module(value)
    assert seen.shape == expected.shape == (*shape[:-1], 16)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_gradients_pass_straight_through() -> None:
    module, value = packed_linear(True), random(3, 24).requires_grad_()
    module(value).sum().backward()
    assert value.grad is not None
    weight = module.weight.detach() + 0
    torch.testing.assert_close(value.grad, weight.sum(0).expand(3, -1))


def test_what_it_runs() -> None:
    static = packed_linear(True)
    layout = static.hfc_layouts["weight"]  # type: ignore[index]
    assert StaticIntMatmul().refusal(static, layout) is None
    assert "dynamically" in str(IntMatmul().refusal(static, layout))
    small = packed_linear(True, rows=4)
    assert "too small" in str(StaticIntMatmul().refusal(small, small.hfc_layouts["weight"]))  # type: ignore[index]
    choose_kernels(static)
    chosen = "reference" if StaticIntMatmul().probe() else "int8-matmul-static"
    assert kernel_counts(static) == {chosen: 1}
