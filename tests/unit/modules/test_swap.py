from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.core.config import QuantConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.kernels.choose import kernel_counts, reference_kernels
from hf_compress.modules.swap import PackedModule, pack_module, packed_modules, packed_tensor, unpack_module
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import packed_of
from tests._utils.tiny import FAMILIES, output, tiny, tiny_inputs

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUANTIZABLE = [family for family in FAMILIES if family != "resnet"]


def packed_model(family: str, config: QuantConfig | None = None, **overrides: Any) -> PreTrainedModel:
    model: PreTrainedModel = quantize(tiny(family, **overrides), config or RTNQuantConfig())
    return model


def dense_twin(packed: nn.Module, family: str, **overrides: Any) -> PreTrainedModel:
    """A model that was never packed, holding the dequantized weights."""
    twin = tiny(family, **overrides)
    for path, module in packed_modules(packed):
        for name in module.hfc_layouts:
            twin.get_submodule(path).get_parameter(name).data.copy_(packed_tensor(module, name).dense())
    return twin


@pytest.fixture
def linear() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(16, 6)
    pack_module(module, "weight", packed_of((6, 16)))
    return module


@pytest.mark.parametrize(
    "config",
    [RTNQuantConfig(), RTNQuantConfig(bits=3, group_size="channel", symmetric=False, format="guarded")],
    ids=repr,
)
@pytest.mark.parametrize("family", QUANTIZABLE)
def test_forward_is_that_of_the_dequantized_model(family: str, config: QuantConfig) -> None:
    model = packed_model(family, config)
    inputs = tiny_inputs(model)
    difference = (output(model, inputs) - output(dense_twin(model, family), inputs)).abs().max()
    assert difference == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "t5", "bert-classifier"])
def test_forward_in_bfloat16(family: str) -> None:
    model = packed_model(family, dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    seen = output(model, inputs)
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, output(dense_twin(model, family, dtype=torch.bfloat16), inputs))


def test_forward_with_packed_embeddings_and_head() -> None:
    config = RTNQuantConfig(default_rules=False, format="guarded")
    model = packed_model("llama", config)
    inputs = tiny_inputs(model)
    assert {type(module).__name__ for _, module in packed_modules(model)} == {"Linear", "Embedding"}
    assert torch.equal(output(model, inputs), output(dense_twin(model, "llama"), inputs))


def test_generation_is_that_of_the_dequantized_model() -> None:
    model = packed_model("llama")
    ids = tiny_inputs(model)["input_ids"]
    made = [one.generate(ids, max_new_tokens=6, do_sample=False) for one in (model, dense_twin(model, "llama"))]
    assert torch.equal(*made)


def test_class_stays_a_subclass(linear: nn.Linear) -> None:
    assert isinstance(linear, nn.Linear)
    assert isinstance(linear, PackedModule)
    assert type(linear).__name__ == "Linear"
    assert (linear.in_features, linear.out_features) == (16, 6)
    assert set(dict(linear.named_parameters())) == {"bias"}
    assert repr(linear) == "Linear(in_features=16, out_features=6, bias=True)"


def test_same_packing_gives_the_same_class(linear: nn.Linear) -> None:
    with torch.random.fork_rng(devices=[]):
        other = nn.Linear(16, 6)
    pack_module(other, "weight", packed_of((6, 16)))
    assert type(other) is type(linear)


def test_state_dict_names() -> None:
    model = packed_model("llama", RTNQuantConfig(symmetric=False))
    state = model.state_dict()
    prefix = "model.layers.0.self_attn.k_proj"
    assert {key for key in state if key.startswith(prefix)} == {
        f"{prefix}.weight_packed",
        f"{prefix}.weight_scale",
        f"{prefix}.weight_zero_point",
    }
    experts = packed_model("qwen3-moe").state_dict()
    assert {key.rpartition(".")[2] for key in experts if ".experts." in key} == {
        "gate_up_proj_packed",
        "gate_up_proj_scale",
        "down_proj_packed",
        "down_proj_scale",
    }


def test_state_dict_loads_back() -> None:
    first, second = packed_model("llama"), packed_model("llama", num_hidden_layers=2)
    for buffer in second.buffers():
        if buffer.dtype == torch.int32:
            buffer.zero_()
    second.load_state_dict(first.state_dict())
    inputs = tiny_inputs(first)
    assert torch.equal(output(first, inputs), output(second, inputs))


def test_packed_tensor_of_a_dense_module() -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises((TypeError, KeyError)):
        packed_tensor(nn.Linear(4, 4), "weight")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_deepcopy(family: str) -> None:
    model = packed_model(family)
    copied = copy.deepcopy(model)
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    assert torch.equal(output(copied, inputs), before)
    for (path, module), (_, other) in zip(packed_modules(model), packed_modules(copied), strict=True):
        assert type(module) is type(other), path
        for buffer in module._buffers:
            assert module._buffers[buffer].data_ptr() != other._buffers[buffer].data_ptr()
    for buffer in copied.buffers():
        buffer.zero_()
    assert torch.equal(output(model, inputs), before)


def test_to_bfloat16() -> None:
    model = packed_model("llama")
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_packed")}
    model.to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.weight_packed.dtype == torch.int32
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in codes.items())
    inputs = tiny_inputs(model)
    twin = dense_twin(model, "llama", dtype=torch.bfloat16)
    assert torch.equal(output(model, inputs), output(twin, inputs))


def test_to_bfloat16_leaves_the_integer_kernel() -> None:
    model = packed_model("llama", Int8DynamicQuantConfig()).to(torch.bfloat16)
    inputs = tiny_inputs(model)
    seen = output(model, inputs)
    with reference_kernels(model):
        assert torch.equal(output(model, inputs), seen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_unpack(family: str) -> None:
    model = packed_model(family)
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    untouched = tiny(family)
    for _, module in list(packed_modules(model)):
        unpack_module(module)
    assert list(packed_modules(model)) == []
    assert torch.equal(output(model, inputs), before)
    assert set(model.state_dict()) == set(untouched.state_dict())
    for path, module in untouched.named_modules():
        if module is not untouched:  # a guarded model's class is the checkpoint's business
            assert type(model.get_submodule(path)) is type(module)
    for name, value in untouched.named_parameters():
        assert model.get_parameter(name).shape == value.shape
        assert model.get_parameter(name).is_contiguous()


def test_unpack_and_pack_again(linear: nn.Linear) -> None:
    value = linear.weight.clone()
    unpack_module(linear)  # type: ignore[arg-type]
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, value)
    pack_module(linear, "weight", packed_of((6, 16), bits=8, seed=5))
    assert torch.equal(linear.weight, packed_of((6, 16), bits=8, seed=5).dense())


def test_two_parameters_of_one_module() -> None:
    module = tiny("qwen3-moe", num_hidden_layers=1).model.layers[0].mlp.experts
    base = type(module)
    first, second = packed_of((8, 128, 64), seed=1), packed_of((8, 64, 64), seed=2)
    pack_module(module, "gate_up_proj", first)
    pack_module(module, "down_proj", second)
    assert isinstance(module, base)
    assert base in type(module).__bases__
    assert torch.equal(module.gate_up_proj.clone(), first.dense())
    assert torch.equal(module.down_proj.clone(), second.dense())
    unpack_module(module)
    assert type(module) is base


@pytest.mark.parametrize(("family", "config"), [("llama", RTNQuantConfig()), ("llama", Int8DynamicQuantConfig())])
def test_compiled_equals_eager(family: str, config: QuantConfig) -> None:
    model = packed_model(family, config, num_hidden_layers=1)
    inputs = tiny_inputs(model)
    with reference_kernels(model):
        eager = output(model, inputs)
        torch._dynamo.reset()
        compiled = output(torch.compile(model, backend="eager"), inputs)
    assert torch.equal(compiled, eager)


def test_compiled_experts_equal_eager() -> None:
    model = packed_model("qwen3-moe", num_hidden_layers=1)
    inputs = tiny_inputs(model)
    torch._dynamo.reset()
    compiled = output(torch.compile(model, backend="eager"), inputs)
    assert torch.allclose(compiled, output(model, inputs), rtol=0, atol=1e-6)


def adapted(family: str, config: QuantConfig) -> tuple[nn.Module, PreTrainedModel]:
    model = packed_model(family, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapters = peft.LoraConfig(target_modules="all-linear", r=2, fan_in_fan_out=family == "gpt2")
        return peft.get_peft_model(model, adapters).eval(), model


def loss_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model(**inputs).logits.square().mean().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("family", ["llama", "bert-classifier", "gpt2", "qwen3-moe"])
def test_lora_trains_on_packed_weights(family: str) -> None:
    model, base = adapted(family, RTNQuantConfig())
    inputs = tiny_inputs(base)
    gradients = loss_gradients(model, inputs)
    assert gradients
    assert all("lora_" in name for name in gradients if "modules_to_save" not in name)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        if "lora_B" in name:  # A's gradient is zero as long as B is
            assert gradient.abs().sum() > 0, name


def test_lora_gradients_are_those_of_the_dequantized_model() -> None:
    twin = dense_twin(packed_model("llama"), "llama")
    model, base = adapted("llama", RTNQuantConfig())
    inputs = tiny_inputs(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        dense = peft.get_peft_model(twin, peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    expected, seen = loss_gradients(dense, inputs), loss_gradients(model, inputs)
    assert set(seen) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(seen[name], gradient), name


@pytest.mark.parametrize("reference", [False, True])
def test_lora_on_w8a8_gets_gradients_or_an_error(reference: bool) -> None:
    """Rounding the inputs must not silently cut the gradient: adapters behind it would never be trained."""
    model, base = adapted("llama", Int8DynamicQuantConfig())
    if reference:
        for _, module in packed_modules(base):
            module.hfc_kernel = None
    try:
        gradients = loss_gradients(model, tiny_inputs(base))
    except (RuntimeError, ValueError):
        return
    dead = [name for name, one in gradients.items() if "lora_B" in name and (one is None or not one.any())]
    assert dead == []


@pytest.mark.parametrize("config", [RTNQuantConfig(), Int8DynamicQuantConfig()], ids=repr)
@pytest.mark.parametrize("kernel", ["chosen", "reference"])
def test_input_by_keyword(config: QuantConfig, kernel: str) -> None:
    layer = packed_model("llama", config).model.layers[0].self_attn.q_proj
    if kernel == "reference":
        layer.hfc_kernel = None
    value = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(input=value), layer(value), rtol=1e-4, atol=1e-5)


def test_kernels_are_counted() -> None:
    model = packed_model("bert")
    assert kernel_counts(model) == {"reference": 13}


def test_pickle_is_refused_by_python() -> None:
    """Packed classes are made at run time, so `pickle` and `torch.save(model)` can't find them and say so.

    Checkpoints are safetensors, never pickles; `state_dict()` can be pickled as usual.
    """
    model = packed_model("llama", num_hidden_layers=1)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model.model.layers[0].mlp.up_proj)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        torch.save(model, io.BytesIO())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def w8a8(make: Callable[[], nn.Module]) -> Any:
    """A plain module with quantized inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
    return quantize(module, Int8DynamicQuantConfig())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", ["chosen", "reference"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(32,), (64, 32), (4, 8, 32), (3, 4, 5, 32)])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(shape: tuple[int, ...], conv1d: bool, kernel: str) -> None:
    """compressed-tensors' scale per token spans the batch of 2-D inputs, and dimension 2 of 4-D ones."""
    module = w8a8(lambda: nn.Sequential(Conv1D(16, 32) if conv1d else nn.Linear(32, 16)))
    if kernel == "reference":
        module[0].hfc_kernel = None
    assert module[0].hfc_layouts["weight"].scheme.input_activations.strategy == "token"
    value = random(*shape)
    alone = torch.cat([module(token.view(1, 1, -1)).view(1, -1) for token in value.view(-1, 32)])
    assert torch.allclose(module(value), alone.view(*shape[:-1], 16), rtol=1e-5, atol=1e-5)
    loud = value.clone().view(-1, 32)
    loud[0] = 1e4
    found = module(loud.view(shape)).reshape(-1, 16)
    assert torch.allclose(found[1:], alone[1:], rtol=1e-5, atol=1e-5)


def test_gradients_of_two_dimensional_inputs_pass_straight_through() -> None:
    module = w8a8(lambda: nn.Sequential(nn.Linear(32, 16)))
    value = random(4, 32).requires_grad_()
    module(value).sum().backward()
    expected = module[0].weight.sum(0).expand(4, 32)
    assert value.grad is not None
    assert torch.allclose(value.grad, expected, atol=1e-5)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@torch.no_grad()
def test_inputs_are_bound_by_name() -> None:
    module, value = w8a8(lambda: Scaled(32, 16)), random(2, 3, 32)
    assert torch.equal(module(scale=2.0, x=value), module(value) * 2)
    assert torch.equal(module(value, 2.0), module(value) * 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'input'"):
        module(input=value)


@torch.no_grad()
def test_an_input_without_dimensions_gives_the_error_of_the_original() -> None:
    module = w8a8(lambda: nn.Linear(16, 16))
    with pytest.raises(RuntimeError, match="at least 1D"):
        module(torch.tensor(1.0))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 8, 3), lambda: nn.Linear(16, 16)])
def test_calls_without_input_give_the_error_of_the_original(make: Callable[[], nn.Module]) -> None:
    module = w8a8(make)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        module()
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        module(torch.zeros(1, 8, 16, 16), torch.zeros(1))


def test_kernels_leave_a_forward_of_its_own_alone() -> None:
    module = w8a8(lambda: Scaled(32, 16))
    assert kernel_counts(module) == {"reference": 1}


def test_trainable_biases_get_their_gradient() -> None:
    """Kernels have no backward: a first layer, whose input has no gradient, must not run one."""
    mixed = w8a8(lambda: nn.ModuleList([nn.Linear(32, 16), nn.LSTM(16, 16), nn.LayerNorm(16)]))
    mixed.train().requires_grad_()
    first, recurrent, norm = mixed
    norm(recurrent(first(random(2, 3, 32)))[0]).square().sum().backward()
    missing = [name for name, value in mixed.named_parameters() if value.grad is None]
    assert missing == []
    assert float(first.bias.grad.abs().sum()) > 0
    lone = w8a8(lambda: nn.LSTM(16, 16)).train().requires_grad_()
    lone(random(3, 2, 16))[0].sum().backward()
    assert lone.bias_ih_l0.grad is not None
