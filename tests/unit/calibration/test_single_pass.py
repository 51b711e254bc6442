"""One walk through a block gives what stopping before each stage and starting again gives."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.experts import collect_experts
from hf_compress.calibration.gram import collect
from hf_compress.calibration.held import SLAB, Held, Slabs
from hf_compress.calibration.single_pass import Stage, UnsuitableBlockError, single_pass
from hf_compress.core.plan import PlanRow
from hf_compress.methods.rtn.method import quantize_scheme
from hf_compress.modules.packed import layout_of
from tests._utils.blocks import block_of
from tests._utils.tiny import tiny

BLOCKS = {
    "llama": "model.layers.0",
    "bert": "encoder.layer.0",
    "gpt2": "transformer.h.0",
    "t5": "decoder.block.0",
    "bart": "model.decoder.layers.0",
    "vit": "vit.layers.0",
    "qwen3-moe": "model.layers.0",
    "phi": "model.layers.0",
    "modernbert": "model.layers.1",
}


def with_calls(family: str, count: int = 3) -> Block:
    """A block with several calls of different data."""
    blocks = [block_of(tiny(family), BLOCKS[family], seed=seed) for seed in range(count)]
    blocks[0].calls = [call for block in blocks for call in block.calls]
    return blocks[0]


def rounded(block: Block, rows: tuple[PlanRow, ...]) -> None:
    """Round weights to nearest, coarsely enough for later stages to notice."""
    for row in rows:
        block.install(row, quantize_scheme(block.weight(row), layout_of(row).scheme))


@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_the_same_as_running_again_for_each_stage(family):
    block = with_calls(family)
    oracle = deepcopy(block)
    stages: list[Stage] = []

    def solve(stage: Stage) -> None:
        stages.append(stage)
        rounded(block, stage.rows)

    single_pass(block, block.rows, solve)
    assert block.advanced
    assert sorted(row.name for stage in stages for row in stage.rows) == sorted(row.name for row in block.rows)
    assert len(stages) > 1
    for stage in stages:
        found = collect(oracle, stage.rows)
        assert stage.inputs.keys() == found.keys()
        for name, inputs in found.items():
            assert stage.inputs[name].tokens == inputs.tokens
            # What earlier stages read was kept in float16: 2^-11 relative, far below the rounding of weights.
            limit = 1e-3 * float(inputs.gram.diagonal().max())
            torch.testing.assert_close(stage.inputs[name].gram, inputs.gram, rtol=1e-3, atol=limit)
        for path, experts in collect_experts(oracle, stage.rows).items():
            assert [len(one) for one in stage.experts[path].routed] == [len(one) for one in experts.routed]
        rounded(oracle, stage.rows)
    for call, other in zip(block.calls, oracle.calls, strict=True):
        expected = other.run(oracle.module)
        assert call.hidden is not None
        torch.testing.assert_close(call.hidden, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@torch.no_grad()
def test_calls_of_different_lengths():
    block = with_calls("llama", 2)
    first = block.calls[0]
    assert first.hidden is not None
    short = first.hidden[:1, :4]
    cosine, sine = (part[:, :4] for part in first.kwargs["position_embeddings"])
    block.calls[0] = Call(short, kwargs={"position_embeddings": (cosine, sine), "attention_mask": None})
    expected = [call.run(block.module) for call in block.calls]
    single_pass(block, block.rows, lambda stage: None)
    for call, output in zip(block.calls, expected, strict=True):
        assert call.hidden is not None
        torch.testing.assert_close(call.hidden, output, rtol=0, atol=2e-3 * float(output.abs().max()))


class Odd(nn.Module):
    """A block with something in it that can't be walked in pieces."""

    def __init__(self, odd: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.odd = *(nn.Linear(8, 8) for _ in range(3)), odd
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.odd(self, self.first(value)))


def _branch(block: Odd, value: Tensor) -> Tensor:
    return value if value.sum() > 0 else -value


def _twice(block: Odd, value: Tensor) -> Tensor:
    return block.first(value)


def _count(block: Odd, value: Tensor) -> Tensor:
    return value[value[..., 0] > 0][None]


def _remember(block: Odd, value: Tensor) -> Tensor:
    block.get_buffer("seen").add_(1)
    return value


def _drop(block: Odd, value: Tensor) -> Tensor:
    return nn.functional.dropout(value, 0.5, training=True, inplace=False)


def _late(block: Odd, value: Tensor) -> Tensor:
    doubled = 2 * value
    return doubled.add_(block.third(value))


OUTSIDE = torch.arange(8.0)


def _foreign(block: Odd, value: Tensor) -> Tensor:
    return value + OUTSIDE


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (_branch, "reads values"),
        (_twice, "first runs 2 times"),
        (_count, "depends on values"),
        (_remember, "writes to what it was given"),
        (_late, "changes a tensor in place"),
        (_foreign, "no argument or parameter"),
    ],
)
@torch.no_grad()
def test_blocks_that_depend_on_more_than_shapes_are_refused(odd, why):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = Odd(odd).eval()
    config = hfc.RTNQuantConfig(group_size="channel", min_coverage=0.0, format="guarded")
    hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    block = Block(0, "", module, plan_model(module, config).quantized, [Call(hidden)])
    rows = tuple(row for row in block.rows if row.name in ("first", "second") or odd is _late)
    with pytest.raises(UnsuitableBlockError, match=why):
        single_pass(block, rows, lambda stage: None)
    assert not block.advanced
    assert not module.first._forward_pre_hooks


@torch.no_grad()
def test_random_numbers_are_refused():
    with torch.random.fork_rng(devices=[]):
        test_blocks_that_depend_on_more_than_shapes_are_refused(_drop, "draws random numbers")


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_held_values_keep_eleven_bits(scale):
    value = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)) * scale
    held = Held.of(value)
    assert held.value.dtype == torch.float16
    # Half a unit in the last place of float16, down to 2^-27 of the largest value.
    limit = value.abs() * 2**-11 + value.abs().max() * 2**-38
    assert ((held.restore() - value).abs() <= limit).all()
    assert torch.equal(held.restore(torch.tensor([3, 1])), held.restore()[[3, 1]])


@pytest.mark.parametrize("value", [torch.zeros(3), torch.ones(3).bfloat16(), torch.arange(3), torch.zeros(0)])
def test_other_values_are_held_exactly(value):
    assert torch.equal(Held.of(value, Slabs()).restore(), value)


def test_slabs_do_not_overlap():
    slabs, generator = Slabs(), torch.Generator().manual_seed(5)
    sizes = [3, 1000, SLAB // 8, SLAB // 2, 5000]
    values = [torch.randn(size, generator=generator) for size in sizes]
    kept = [slabs.copy(value) for value in values]
    assert all(torch.equal(one, other) for one, other in zip(kept, values, strict=True))
    assert len({one.untyped_storage().data_ptr() for one in kept[:3]}) == 1
    assert kept[3].untyped_storage().nbytes() == values[3].nbytes


@torch.no_grad()
def test_nothing_is_computed_that_nobody_reads():
    """A block that counts as advanced is left after its last weight; its calls let go of what they held."""
    block = with_calls("llama", 1)
    block.advanced = True
    stages: list[Stage] = []
    single_pass(block, block.rows, stages.append)
    assert len(stages) == 4
    hidden = block.calls[0].hidden
    assert hidden is not None
    assert hidden.numel() == 0


@torch.no_grad()
def test_each_operation_is_done_once():
    """Of the products of a block, the recorded call's are done twice, those of other calls of its shape once."""
    block, calls = with_calls("llama", 1), with_calls("llama", 3).calls
    shared = calls[0]
    block.calls = [shared, *(Call(call.hidden, mask=shared.mask, kwargs=shared.kwargs) for call in calls[1:])]
    counted: list[str] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                counted.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Counting():
        single_pass(block, block.rows, lambda stage: None)
    # Seven layers and the product that makes it; Gram matrices are accumulated by addmm_, another operator.
    assert len(counted) == 7 * (1 + len(block.calls))
