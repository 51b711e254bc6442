"""Second moments of inputs: padding, splitting, sharing, convolutions, experts, bad values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.experts import collect_experts, intermediate
from hf_compress.calibration.gram import Inputs, collect, patches
from hf_compress.core.errors import CalibrationError
from tests._utils.blocks import block_of
from tests._utils.tiny import tiny

BLOCKS = {
    "llama": "model.layers.0",
    "bert": "encoder.layer.0",
    "gpt2": "transformer.h.0",
    "qwen3-moe": "model.layers.0",
}


def built(make: Callable[[], Any]) -> Any:
    """A module with reproducible weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return make().eval()


def block_with(module: nn.Module, calls: list[Call]) -> Block:
    """A plain module as a block."""
    config = hfc.RTNQuantConfig(group_size="channel", min_coverage=0.0, format="guarded")
    return Block(0, "", module, plan_model(module, config).quantized, calls)


def slow(block: Block, module: nn.Module) -> tuple[Tensor, int]:
    """Σ x xᵀ of what a module reads, token by token in float64."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for call in block.calls:
        call.run(block.module)
    handle.remove()
    gram, count = torch.zeros(found[0].shape[-1], found[0].shape[-1]).double(), 0
    for call, value in zip(block.calls, found, strict=True):
        keep = (
            torch.ones(value.shape[:-1], dtype=torch.bool) if call.mask is None else call.mask.view(value.shape[:-1])
        )
        for token in value[keep].double():
            gram += torch.outer(token, token)
            count += 1
    return gram, count


@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_grams_are_sums_over_kept_tokens(family):
    block = block_of(tiny(family), BLOCKS[family])
    assert block.calls[0].mask is not None
    assert not block.calls[0].mask.all()
    found = collect(block)
    for row in block.rows:
        if row.name not in found:
            assert row.kind == "experts"
            continue
        gram, count = slow(block, block.owner(row))
        assert found[row.name].tokens == count == int(block.calls[0].mask.sum())
        # float32 sums of a few dozen products: eps times the number of terms.
        torch.testing.assert_close(found[row.name].gram.double(), gram, rtol=1e-5, atol=1e-5 * float(gram.abs().max()))


@torch.no_grad()
def test_padded_rows_together_equal_rows_alone():
    block = block_of(tiny("llama"), "model.layers.0")
    whole, call = collect(block, magnitudes=True), block.calls[0]
    assert call.hidden is not None
    assert call.mask is not None

    def alone(row: int) -> Call:
        length = int(call.mask[row].sum())  # padding is at the end of a row: cut off
        cosine, sine = (part[:, :length] for part in call.kwargs["position_embeddings"])
        kwargs = {"position_embeddings": (cosine, sine), "attention_mask": None}
        return Call(call.hidden[row : row + 1, :length], kwargs=kwargs)

    block.calls = [alone(0), alone(1)]
    apart = collect(block, magnitudes=True)
    for name, inputs in whole.items():
        scale = float(inputs.gram.abs().max())
        assert apart[name].tokens == inputs.tokens
        # The same float32 sums in another order, after attention kernels of other lengths.
        torch.testing.assert_close(apart[name].gram, inputs.gram, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(apart[name].mean, inputs.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(apart[name].largest, inputs.largest, rtol=1e-4, atol=1e-5)


def test_split_tokens_equal_all_at_once():
    value = torch.randn(5000, 24, generator=torch.Generator().manual_seed(1))
    whole, split = Inputs.empty(24, magnitudes=True), Inputs.empty(24, magnitudes=True)
    whole.add(value)
    for part in value.split(700):
        split.add(part)
    for inputs in (whole, split):
        inputs.finish("w")
    torch.testing.assert_close(split.gram, whole.gram, rtol=1e-5, atol=1e-2)  # sums of 5000 terms of about 1
    torch.testing.assert_close(whole.gram.double(), value.double().T @ value.double(), rtol=1e-5, atol=1e-2)
    assert torch.equal(whole.gram, whole.gram.T)
    assert torch.equal(split.largest, value.abs().amax(0))
    torch.testing.assert_close(whole.mean, value.abs().mean(0))


@torch.no_grad()
def test_weights_that_read_one_tensor_share():
    found = collect(block_of(tiny("llama"), "model.layers.0"))
    of = {name.removeprefix("model.layers.0."): id(inputs) for name, inputs in found.items()}
    assert of["self_attn.q_proj"] == of["self_attn.k_proj"] == of["self_attn.v_proj"]
    assert of["mlp.gate_proj"] == of["mlp.up_proj"]
    assert len(set(of.values())) == 4


class Changing(nn.Module):
    """Two layers that read the same tensor in the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, value: Tensor, same: bool) -> Tensor:
        return self.first(value) + self.second(value if same else 2 * value)


@torch.no_grad()
def test_sharing_that_ends_is_noticed():
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(1, 6, 8, generator=generator) for _ in range(2)]
    calls = [Call(value, args=(same,)) for value, same in zip(values, (True, False), strict=True)]
    found = collect(block_with(built(Changing), calls))
    first, second = (part[0].double() for part in values)
    torch.testing.assert_close(found["first"].gram.double(), first.T @ first + second.T @ second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found["second"].gram.double(), first.T @ first + 4 * second.T @ second, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), (2, 6, 11)),
        (lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, dilation=2, groups=2), (2, 6, 11, 9)),
        (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"), (3, 4, 6, 5)),
        (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 5, 3)),
        (lambda: nn.Conv2d(3, 4, 2), (3, 5, 5)),
    ],
)
@torch.no_grad()
def test_patches_times_weight_is_the_convolution(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    module, value = built(make), torch.randn(shape, generator=torch.Generator().manual_seed(5))
    windows = patches(module, value)
    windows = windows if windows.ndim == 3 else windows.unsqueeze(0)
    weight = module.weight.view(module.groups, -1, windows.shape[-1])
    batched = value if value.ndim == module.weight.ndim else value.unsqueeze(0)
    expected = module(batched)
    made = torch.einsum("gwc,goc->wgo", windows, weight).flatten(1) + module.bias
    torch.testing.assert_close(made.view(len(batched), -1, len(module.weight)).transpose(1, 2), expected.flatten(2))


@torch.no_grad()
def test_a_grouped_convolution_has_a_matrix_per_group():
    module = built(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, padding=1)))
    value = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(7))
    found = collect(block_with(module, [Call(value)]))["0"]
    assert found.gram.shape == (2, 18, 18)
    assert found.tokens == 50
    windows = patches(module[0], value).double()
    torch.testing.assert_close(found.gram.double(), windows.mT @ windows, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_dead_columns():
    value = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(9))
    value[..., 3] = 0
    module = built(lambda: nn.Sequential(nn.Linear(8, 4)))
    assert collect(block_with(module, [Call(value)]))["0"].dead.nonzero().tolist() == [[3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
@torch.no_grad()
def test_bad_inputs_name_the_layers(bad):
    block = block_of(tiny("llama"), "model.layers.0")
    block.module.get_parameter("input_layernorm.weight")[5] = bad
    with pytest.raises(CalibrationError, match=r"q_proj, .*k_proj, .*v_proj hold NaN or infinite"):
        collect(block)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
@torch.no_grad()
def test_experts_read_their_tokens(family):
    block = block_of(tiny(family), "model.layers.0")
    path = "model.layers.0.mlp.experts"
    experts, mask = block.module.get_submodule("mlp.experts"), block.calls[0].mask
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    block.calls[0].run(block.module)
    handle.remove()
    assert mask is not None
    found = collect_experts(block, block.rows)[path]
    hidden, index = seen[0][0].view(-1, 64)[mask.view(-1)], seen[0][1].view(mask.numel(), -1)[mask.view(-1)]
    for expert in range(len(experts.gate_up_proj)):
        tokens = hidden[(index == expert).any(-1)]
        assert found.tokens(expert) == len(tokens)
        made = found.inputs(expert, "gate_up_proj", 64)
        made.finish("w")
        # Kept in float16: 2^-11 relative per value, twice that per product.
        limit = 1e-3 * float(hidden.square().sum(0).max())
        torch.testing.assert_close(made.gram, tokens.T @ tokens, rtol=0, atol=limit)
        gate, up = nn.functional.linear(tokens, experts.gate_up_proj[expert]).chunk(2, -1)
        middle = experts.act_fn(gate) * up
        torch.testing.assert_close(intermediate(experts, expert, tokens), middle)
        second = found.inputs(expert, "down_proj", 64)
        assert second.tokens == len(tokens)
    everything = found.inputs(0, "gate_up_proj", 64, everything=True)
    assert everything.tokens == int(mask.sum())
