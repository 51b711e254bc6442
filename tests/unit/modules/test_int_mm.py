from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hf_compress.core import scheme as schemes
from hf_compress.core.registry import Quantized
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.modules.kernels.choose import KERNELS, choose_kernels, kernel_counts, reference_kernels
from hf_compress.modules.kernels.int_mm import IntMatmul, _exact, int8_linear
from hf_compress.modules.packed import Layout, pack
from hf_compress.modules.swap import pack_module, packed_modules
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import codes_of
from tests._utils.tiny import output, tiny, tiny_inputs

W8A8 = schemes.scheme(schemes.weight_args(8, "channel", True), schemes.token_args())

needs_exact = pytest.mark.skipif(not _exact(), reason="torch._int_mm is not exact on this processor (no VNNI)")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1)) * 0.02 + 0.001
    return codes_of((rows, columns), 8, seed), scale, random(rows, seed=seed + 2)


def oracle(tokens: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Per token in float64, with the codes that float32 gives (its division decides ties)."""
    made = torch.zeros(len(tokens), len(codes), dtype=torch.float64)
    for index, token in enumerate(tokens):
        step = token.abs().max() / 127.5
        if step == 0:
            step = torch.tensor(torch.finfo(torch.float32).eps)
        integers = [max(-128, min(127, round(float(value)))) for value in token / step]
        for row in range(len(codes)):
            total = sum(left * int(right) for left, right in zip(integers, codes[row].tolist(), strict=True))
            made[index, row] = total * float(scale[row]) * float(step)
    return made if bias is None else made + bias.double()


def reference(tokens: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """compressed-tensors' forward: quantize and dequantize the inputs, then a floating product.

    As (batch, tokens, features): its per-token scale of 2-D inputs spans the batch.
    """
    args, value = schemes.token_args(), tokens.unsqueeze(0)
    step, zero = compute_dynamic_scales_and_zp(value=value, args=args, module=nn.Identity())
    made = functional.linear(fake_quantize(value, step, zero, args), codes.float() * scale.unsqueeze(-1), bias)
    return made.squeeze(0)


def relative(seen: Tensor, expected: Tensor) -> float:
    return float((seen.double() - expected.double()).abs().max() / expected.double().abs().max())


TOKENS = {
    "normal": random(5, 24),
    "one": random(1, 24),
    "outlier": random(5, 24) + torch.eye(5, 24) * 1e4,
    "tiny": random(5, 24) * 1e-30,
    "huge": random(5, 24) * 1e30,
    "mixed": random(5, 24) * torch.tensor([1e-20, 1e-3, 1.0, 1e3, 1e20]).unsqueeze(-1),
    "constant": torch.ones(3, 24),
    "one value": torch.eye(5, 24),
    "extremes": torch.tensor([127.0, -127.5, 127.5, -127.0] * 6).view(1, 24),
}


@needs_exact
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", TOKENS)
def test_agrees_with_the_oracle(name: str, biased: bool) -> None:
    codes, scale, bias = parts(16, 24)
    given_bias = bias if biased else None
    seen = int8_linear(TOKENS[name], codes, scale, given_bias)
    expected = oracle(TOKENS[name], codes, scale, given_bias)
    assert seen.dtype == torch.float32
    for row in range(len(expected)):  # each token by itself: a huge one must not hide the others
        assert relative(seen[row], expected[row]) < 1e-5


@needs_exact
@pytest.mark.parametrize("name", TOKENS)
def test_agrees_with_compressed_tensors(name: str) -> None:
    codes, scale, bias = parts(16, 24)
    seen, expected = (run(TOKENS[name], codes, scale, bias) for run in (int8_linear, reference))
    for row in range(len(expected)):
        assert relative(seen[row], expected[row]) <= IntMatmul.tolerance == 1e-4


@needs_exact
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(1, 4).map(lambda count: count * 8),
    columns=st.integers(1, 24).map(lambda count: count * 8),
    seed=st.integers(0, 9999),
    exponent=st.integers(-20, 20),
)
def test_tolerance_holds_for_any_shape(tokens: int, rows: int, columns: int, seed: int, exponent: int) -> None:
    codes, scale, bias = parts(rows, columns, seed)
    value = random(tokens, columns, seed=seed) * 10.0**exponent
    bias = bias * 10.0**exponent
    assert relative(int8_linear(value, codes, scale, bias), reference(value, codes, scale, bias)) <= 1e-4


def test_tokens_of_zeros_give_exactly_the_bias() -> None:
    codes, scale, bias = parts(16, 24)
    tokens = random(4, 24)
    tokens[1] = 0
    tokens[3] = -0.0
    seen = int8_linear(tokens, codes, scale, bias)
    assert torch.equal(seen[1], bias)
    assert torch.equal(seen[3], bias)
    assert torch.equal(int8_linear(torch.zeros(2, 24), codes, scale, None), torch.zeros(2, 16))


def test_no_tokens() -> None:
    codes, scale, bias = parts(16, 24)
    assert int8_linear(torch.zeros(0, 24), codes, scale, bias).shape == (0, 16)


@needs_exact
def test_a_token_does_not_depend_on_the_others() -> None:
    codes, scale, bias = parts(16, 24)
    tokens = TOKENS["mixed"]
    whole = int8_linear(tokens, codes, scale, bias)
    for index in range(len(tokens)):
        assert torch.equal(whole[index : index + 1], int8_linear(tokens[index : index + 1], codes, scale, bias))


def test_input_is_left_alone() -> None:
    codes, scale, bias = parts(16, 24)
    tokens = random(4, 24)
    before = [tensor.clone() for tensor in (tokens, codes, scale, bias)]
    int8_linear(tokens, codes, scale, bias)
    assert all(torch.equal(*pair) for pair in zip(before, (tokens, codes, scale, bias), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_stay_visible(value: float) -> None:
    codes, scale, bias = parts(16, 24)
    tokens = random(2, 24)
    tokens[1, 5] = value
    seen = int8_linear(tokens, codes, scale, bias)
    assert bool(seen[0].isfinite().all())
    assert not bool(seen[1].isfinite().any())


@needs_exact
def test_exactness_probe_is_true_here() -> None:
    assert _exact()
    extreme = torch.full((8, 512), -128, dtype=torch.int8)
    assert bool((torch._int_mm(extreme.repeat(3, 1), extreme.t()) == 128 * 128 * 512).all())


def packed_linear(rows: int = 16, columns: int = 24, scheme: object = W8A8) -> nn.Linear:
    codes, scale, bias = parts(rows, columns)
    module = nn.Linear(columns, rows, device="meta")
    module.bias = nn.Parameter(bias)
    pack_module(
        module,
        "weight",
        pack(Quantized(codes, scale.unsqueeze(-1), None), Layout((rows, columns), scheme, False)),
    )
    return module


@needs_exact
@pytest.mark.parametrize("shape", [(3, 24), (2, 3, 24), (2, 2, 3, 24)])
@torch.no_grad()
def test_module_gives_its_reference_in_any_rank(shape: tuple[int, ...]) -> None:
    """A kernel may differ by accumulation order only, also for inputs that are not (batch, tokens, features)."""
    module = packed_linear()
    value = random(*shape)
    expected = module(value)
    module.hfc_kernel = KERNELS[0]
    seen = module(value)
    assert seen.shape == (*shape[:-1], 16)
    assert relative(seen, expected) <= 1e-4


@torch.no_grad()
def test_strided_input() -> None:
    module = packed_linear()
    module.hfc_kernel = KERNELS[0]
    value = random(24, 5).t().unsqueeze(0)
    assert torch.equal(module(value), module(value.contiguous()))


@pytest.mark.parametrize(
    ("rows", "columns", "scheme", "reason"),
    [
        (16, 24, W8A8, None),
        (16, 20, W8A8, "multiple of 8"),
        (4, 24, W8A8, "too small"),
        (16, 24, schemes.scheme(schemes.weight_args(8, "channel", True)), "not quantized dynamically"),
    ],
)
def test_refusals(rows: int, columns: int, scheme: object, reason: str | None) -> None:
    module = packed_linear(rows, columns, scheme)
    seen = IntMatmul().refusal(module, module.hfc_layouts["weight"])
    assert seen is None if reason is None else reason in str(seen)
    if reason is None:
        assert "float32 on the CPU" in str(
            IntMatmul().refusal(module.to(torch.bfloat16), module.hfc_layouts["weight"])
        )


def test_kernel_choice_is_told_and_can_be_undone() -> None:
    model = quantize(tiny("llama"), Int8DynamicQuantConfig())
    chosen = kernel_counts(model)
    assert chosen == ({"int8-matmul": 14} if IntMatmul().probe() is None else {"reference": 14})
    with reference_kernels(model):
        assert kernel_counts(model) == {"reference": 14}
    assert kernel_counts(model) == chosen
    with pytest.raises(ZeroDivisionError), reference_kernels(model):
        raise ZeroDivisionError
    assert kernel_counts(model) == chosen
    choose_kernels(model)
    assert kernel_counts(model) == chosen


@needs_exact
@pytest.mark.parametrize("family", ["bert-classifier", "llama", "gpt2", "t5", "vit", "qwen3-moe"])
def test_models_agree_with_the_reference(family: str) -> None:
    model = quantize(tiny(family), Int8DynamicQuantConfig())
    for _, module in packed_modules(model):
        layout = module.hfc_layouts.get("weight")
        if layout is not None and IntMatmul().refusal(module, layout) is None:
            module.hfc_kernel = KERNELS[0]
    inputs = tiny_inputs(model)
    seen = output(model, inputs)
    with reference_kernels(model):
        # Layer by layer the difference is at most 1e-4; a code may flip and pass it on.
        assert relative(seen, output(model, inputs)) < 2e-2
