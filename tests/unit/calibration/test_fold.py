from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.fold import fold_batch_norms
from hf_compress.core.build import build_plan
from hf_compress.methods.int8_static import Int8StaticQuantConfig
from tests._utils.tiny import tiny


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, its normalisations with random statistics and factors, one of them negative, one zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            for value in (module.weight, module.bias, module.running_mean):
                if value is not None:
                    value.data = torch.randn(value.shape, generator=generator)
            if module.running_var is not None:
                module.running_var = torch.rand(module.running_var.shape, generator=generator) + 0.1
            module.weight.data[1] = 0.0
    return model.double().eval()


def block_of(model: nn.Module, value: Tensor) -> Block:
    rows = build_plan(model, Int8StaticQuantConfig(format="guarded")).quantized
    return Block(0, "", deepcopy(model), rows, [Call(None, args=(value,))])


def images(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Net(nn.Module):
    """A convolution and its normalisation, with a few ways to use the convolution's output elsewhere."""

    def __init__(self, use: str = "", bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.conv = nn.Conv2d(4, 8, 3, bias=bias, groups=groups)
        self.bn = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)
        self.use = use

    def forward(self, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        made = self.conv(value)
        if self.use == "between":
            return self.bn(made.relu())
        if self.use == "returned":
            return self.bn(made), made
        if self.use == "residual":
            return self.bn(made) + made
        if self.use == "two":
            return self.bn(made) + self.other(made)
        if self.use == "twice":
            return self.bn(made) + self.bn(self.conv(value * 2) * 3)
        if self.use == "numbers":
            return self.bn(made) + sum(made[:, 0, 0, 0].tolist())
        if self.use == "number":
            return self.bn(made) + float(made.sum())
        if self.use == "list":
            return self.bn(made) + made.tolist()[0][0][0][0]
        if self.use == "shape":
            form = (made.shape, made.size(0), made.dim(), made.ndim, made.dtype, made.device, len(made), made.numel())
            return self.bn(made) + float(made.is_floating_point() and made.stride()[-1] and len(form))
        if self.use == "elsewhere":
            return self.bn(made) + self.bn(value.repeat(1, 2, 1, 1))[..., 1:-1, 1:-1]
        return self.bn(made)


def outputs(model: nn.Module, value: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(value)
    return found if isinstance(found, Tensor) else torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_function_stays_and_the_norm_becomes_an_offset(bias: bool, groups: int) -> None:
    """Float64: a few roundings of values around 1, far below 1e-12."""
    model = with_statistics(Net(bias=bias, groups=groups))
    block = block_of(model, images(4))
    assert fold_batch_norms(block) == [("conv", "bn")]
    torch.testing.assert_close(outputs(block.module, images(4)), outputs(model, images(4)), rtol=1e-12, atol=1e-12)
    norm = block.module.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    offset = norm(torch.zeros(1, 8, 1, 1, dtype=torch.float64))
    moved = norm(torch.full((1, 8, 1, 1), 5.0, dtype=torch.float64))
    torch.testing.assert_close(moved - offset, torch.full_like(offset, 5.0), rtol=1e-12, atol=1e-12)
    kept = {"bn.weight", "bn.running_mean", "bn.running_var"}
    assert set(block.finished.changed) == kept | ({"conv.bias"} if bias else set())


@pytest.mark.parametrize(
    "use", ["between", "returned", "residual", "two", "twice", "elsewhere", "number", "numbers", "list"]
)
def test_output_that_is_read_elsewhere_is_left_alone(use: str) -> None:
    model = with_statistics(Net(use))
    block = block_of(model, images(4))
    assert fold_batch_norms(block) == []
    assert not block.finished.changed
    assert torch.equal(outputs(block.module, images(4)), outputs(model, images(4)))


def test_asking_for_its_form_is_no_reading() -> None:
    model = with_statistics(Net("shape"))
    block = block_of(model, images(4))
    assert fold_batch_norms(block) == [("conv", "bn")]
    torch.testing.assert_close(outputs(block.module, images(4)), outputs(model, images(4)), rtol=1e-12, atol=1e-12)


def test_a_convolution_called_twice_with_its_norm_is_folded() -> None:
    class Twice(Net):
        def forward(self, value: Tensor) -> Tensor:
            return self.bn(self.conv(value)) + self.bn(self.conv(value * 2))

    model = with_statistics(Twice())
    block = block_of(model, images(4))
    assert fold_batch_norms(block) == [("conv", "bn")]
    torch.testing.assert_close(outputs(block.module, images(4)), outputs(model, images(4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        "affine",
        "statistics",
        "training",
        "shared",
        "shared norm",
        "shared statistics",
        "shared memory",
        "outside",
        "skipped",
    ],
)
def test_what_can_not_be_folded(change: str) -> None:
    model = Net()
    if change == "affine":
        model.bn = nn.BatchNorm2d(8, affine=False)
    if change == "statistics":
        model.bn = nn.BatchNorm2d(8, track_running_stats=False)
    block = block_of(with_statistics(model), images(4))
    if change == "shared":
        other = deepcopy(block.module.get_submodule("conv"))
        other.weight = block.module.get_submodule("conv").get_parameter("weight")
        block.module.add_module("same", other)
    other_norm = block.module.get_submodule("other")
    if change == "shared norm":
        other_norm.weight = block.module.get_submodule("bn").get_parameter("weight")
    if change == "shared statistics":
        other_norm.running_mean = block.module.get_submodule("bn").get_buffer("running_mean")
    if change == "shared memory":
        other_norm.weight.data = block.module.get_submodule("bn").get_parameter("weight").data
    if change == "outside":
        block.shared = frozenset({"bn.bias", "bn.weight"})
    if change == "training":
        block.module.get_submodule("bn").train()
    if change == "skipped":
        block.rows = ()
    assert fold_batch_norms(block) == []


def test_every_pair_of_a_real_architecture() -> None:
    """ResNet: normalisation directly behind every convolution, its residual sums behind the normalisation."""
    model = with_statistics(tiny("resnet"))
    value = images(int(model.config.num_channels), 32)
    block = block_of(model, value)
    block.calls = [Call(None, kwargs={"pixel_values": value})]
    pairs = fold_batch_norms(block)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [path for path, _ in pairs] == convolutions
    with torch.no_grad():
        mine, before = (one(pixel_values=value).logits for one in (block.module, model))
    torch.testing.assert_close(mine, before, rtol=1e-10, atol=1e-10)  # float64 over a few layers


def test_hooks_do_not_stay() -> None:
    model = with_statistics(Net())
    block = block_of(model, images(4))
    fold_batch_norms(block)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.module.modules())
