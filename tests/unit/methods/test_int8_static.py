from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.calibration.block import Finished
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass
from hf_compress.calibration.sources import LiveSource, WeightSource
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import CalibrationError, ConfigError, TiedWeightsError
from hf_compress.core.registry import METHODS
from hf_compress.core.scheme import static_args, weight_args
from hf_compress.core.weights import WeightKind, list_weights
from hf_compress.methods.int8_static import Int8StaticFields, Int8StaticQuantConfig, make, scheme
from hf_compress.methods.rtn.method import quantize
from hf_compress.modules.kernels.choose import reference_kernels
from hf_compress.modules.packed import nbytes
from hf_compress.modules.swap import PackedModule, packed_modules, packed_tensor, unpack_module
from hf_compress.pipeline.planning import plan
from tests._utils.tiny import output, tiny, tiny_inputs

EXTREMES = Int8StaticQuantConfig(observer="minmax", symmetric_inputs=True)
ASYMMETRIC = Int8StaticQuantConfig(observer="minmax")


def token_batch(rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_batch(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    side = model.config.to_dict().get("image_size", 32)
    size = (4, int(model.config.num_channels), side, side)
    return {"pixel_values": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


def batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    if model.main_input_name == "pixel_values":
        return [image_batch(model, seed) for seed in range(2)]
    return [token_batch(seed=seed) for seed in range(2)]


def compressed(family: str, config: Int8StaticQuantConfig, data: Sequence[dict[str, Tensor]] = ()) -> Any:
    model = tiny(family)
    found = list(data) or batches(model)
    return hfc.quantize(model, copy(config), calibration=hfc.Calibration(found, min_rows=1, min_tokens=1))


def inputs_of(model: PreTrainedModel, data: Sequence[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each layer of the dense model reads."""
    seen: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda module, args: seen.setdefault(path, []).append(args[0])

    kinds = (nn.Linear, Conv1D, nn.Conv2d)
    handles = [
        module.register_forward_pre_hook(keep(path))
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("family", "kind", "static"),
    [
        ("llama", WeightKind.LINEAR, True),
        ("gpt2", WeightKind.CONV1D, True),
        ("resnet", WeightKind.CONV, True),
        ("qwen3-moe", WeightKind.EXPERTS, False),
        ("llama", WeightKind.EMBEDDING, False),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scheme_per_kind(family: str, kind: WeightKind, static: bool, symmetric: bool) -> None:
    def depth(kernel: tuple[int, ...]) -> int:
        return kernel[0] if kernel else 0

    weight = max((one for one in list_weights(tiny(family)) if one.kind is kind), key=lambda one: depth(one.kernel))
    made = scheme(Int8StaticFields(symmetric_inputs=symmetric), weight)
    assert made.weights == weight_args(8, "channel", True)
    assert made.input_activations == (static_args(symmetric) if static else None)


def test_depthwise_convolutions_are_weight_only() -> None:
    rows = plan(tiny("mobilenet"), Int8StaticQuantConfig()).quantized
    depthwise = {row.scheme for row in rows if row.kind is WeightKind.CONV and row.kernel[0] == 1}
    assert depthwise == {"int8-channel"}
    assert any(row.scheme == "w8a8-static-tensor-asym" for row in rows)


def test_declaration() -> None:
    method = METHODS.get("int8_static")
    assert method.needs_data
    assert method.config is Int8StaticQuantConfig
    assert not make(Int8StaticFields()).sequential
    assert make(Int8StaticFields(smoothing=0.5)).sequential


@pytest.mark.parametrize(
    "wrong", [{"observer": "best"}, {"percentile": 50}, {"percentile": 101.0}, {"smoothing": 2.0}]
)
def test_impossible_fields(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Int8StaticQuantConfig(**wrong)


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_weights_are_rounded_and_input_scales_are_the_extremes(family: str) -> None:
    """Also of BERT's pooler, whose inputs have two dimensions. Convolutions read what folding leaves unchanged."""
    dense = tiny(family)
    seen = inputs_of(dense, batches(dense))
    model = compressed(family, EXTREMES)
    assert {row.scheme for row in model.hfc_plan.quantized} == {"w8a8-static-tensor"}
    for path, module in packed_modules(model):
        packed = packed_tensor(module, "weight")
        largest = max(float(value.abs().max()) for value in seen[path])
        assert packed.input_scale is not None
        # Folding batch normalisation rounds activations anew: a few units in the last place of float32.
        torch.testing.assert_close(packed.input_scale, torch.tensor([largest / 127.5]), rtol=1e-5, atol=0)
        assert packed.input_zero_point is None
        if family != "resnet":
            layer = dense.get_submodule(path)
            weight = layer.weight.T.contiguous() if isinstance(layer, Conv1D) else layer.weight
            assert torch.equal(packed.codes, quantize(weight, weight_args(8, "channel", True)).codes)


def test_asymmetric_grids_reach_from_end_to_end() -> None:
    """scale = (max - min) / 255 and zero point = -128 - min / scale, as compressed-tensors has them."""
    dense = tiny("bert")
    seen = inputs_of(dense, batches(dense))
    for path, module in packed_modules(compressed("bert", ASYMMETRIC)):
        packed = packed_tensor(module, "weight")
        assert packed.input_scale is not None
        assert packed.input_zero_point is not None
        low = min(0.0, *(float(value.min()) for value in seen[path]))
        high = max(0.0, *(float(value.max()) for value in seen[path]))
        assert float(packed.input_scale) == pytest.approx((high - low) / 255, rel=1e-6)
        assert int(packed.input_zero_point) == round(-128 - low / float(packed.input_scale))


def grids(model: nn.Module) -> dict[str, Tensor]:
    """Input scales by path."""
    found = ((path, packed_tensor(module, "weight").input_scale) for path, module in packed_modules(model))
    return {path: scale for path, scale in found if scale is not None}


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_padding_is_not_looked_at(observer: str) -> None:
    """Rows of different lengths in one padded batch, or one by one; sums in another order may move a value by 1e-6."""
    rows = [token_batch(1, length, seed=length) for length in (5, 9, 12)]
    padded = {
        key: torch.cat([functional.pad(row[key], (0, 12 - row[key].shape[1])) for row in rows]) for key in rows[0]
    }
    # A pooler reads the first token, which is never padding.
    config = Int8StaticQuantConfig(observer=observer, symmetric_inputs=True)
    together, alone = grids(compressed("bert", config, [padded])), grids(compressed("bert", config, rows))
    assert together.keys() == alone.keys()
    for path, scale in together.items():
        torch.testing.assert_close(scale, alone[path], rtol=2e-3 if observer != "minmax" else 1e-5, atol=0)


@pytest.mark.parametrize("config", [EXTREMES, ASYMMETRIC], ids=repr)
@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_forward_is_that_of_compressed_tensors(family: str, config: Int8StaticQuantConfig) -> None:
    """The layer's own function of `fake_quantize` with the stored grid.

    Bit for bit, except that Conv1D's unpacked weight lies in memory the other way round: float32 sums of 64 to 256
    products in another order, relative 1e-6.
    """
    model = compressed(family, config)
    with reference_kernels(model):
        for _, module in packed_modules(model):
            packed = packed_tensor(module, "weight")
            columns = packed.layout.kernel[0] if packed.layout.kernel else packed.layout.shape[1]
            shape = (2, columns, 9, 9) if packed.layout.kernel else (2, 3, columns)
            value = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
            args = packed.layout.scheme.input_activations
            assert args is not None
            rounded = fake_quantize(value, packed.input_scale, packed.input_zero_point, args)
            plain = deepcopy(module)
            assert isinstance(plain, PackedModule)
            unpack_module(plain)
            with torch.no_grad():
                found, expected = module(value), plain(rounded)
            tolerance = 1e-6 * float(expected.abs().max()) if family == "gpt2" else 0.0
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_copies_and_casts(family: str) -> None:
    model = compressed(family, ASYMMETRIC)
    inputs = tiny_inputs(model)
    first = output(model, inputs)
    assert torch.equal(output(deepcopy(model), inputs), first)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = compressed(family, Int8StaticQuantConfig(observer="percentile", percentile=90.0))
    other.load_state_dict(torch.load(stored))
    assert torch.equal(output(other, inputs), first)
    narrow = deepcopy(model).to(torch.bfloat16)
    for _, module in packed_modules(narrow):
        packed = packed_tensor(module, "weight")
        assert packed.input_scale is not None
        assert packed.input_scale.dtype == torch.bfloat16
        assert packed.input_zero_point is not None
        assert packed.input_zero_point.dtype == torch.int8
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    # bfloat16 has 8 bits of precision, as the inputs' grids have.
    assert functional.cosine_similarity(output(narrow, cast).float().flatten(), first.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("config", [EXTREMES, Int8StaticQuantConfig()], ids=repr)
@pytest.mark.parametrize(
    ("family", "layout"), [("bert", "compressed-tensors"), ("t5", "compressed-tensors"), ("gpt2", "guarded")]
)
def test_a_clean_process_reads_it(
    family: str, layout: str, config: Int8StaticQuantConfig, worker: CleanWorker, tmp_path: Path
) -> None:
    """Stock transformers reads linear layers, also of T5, whose initialisation can't handle packed ones."""
    data = [{**token_batch(seed=seed), "decoder_input_ids": token_batch(seed=9)["input_ids"]} for seed in range(2)]
    model = compressed(family, config, data if family == "t5" else ())
    assert model.hfc_plan.format == layout
    proof = hfc.save(model, tmp_path / "saved", worker=worker)
    assert proof.level == "full"
    assert all(check.relative <= 1e-5 for check in proof.checks)
    again, inputs = hfc.load(tmp_path / "saved"), tiny_inputs(model)
    assert again.hfc_plan == model.hfc_plan
    with reference_kernels(model), reference_kernels(again):
        assert torch.equal(output(again, inputs), output(model, inputs))


def test_planned_bytes_are_those_of_the_result() -> None:
    for config in (EXTREMES, ASYMMETRIC):
        model = compressed("bert", config)
        rows = {row.module: row for row in model.hfc_plan.quantized}
        for path, module in packed_modules(model):
            assert rows[path].planned_bytes == nbytes(packed_tensor(module, "weight"))


class Blockwise:
    """A source that is not live, so that it is walked through block by block."""

    def __init__(self, model: nn.Module) -> None:
        self._live = LiveSource(model)

    @property
    def model(self) -> nn.Module:
        return self._live.model

    def block(self, path: str) -> nn.Module:
        return self._live.block(path)

    def outside(self, stacks: Sequence[str], written: bool) -> AbstractContextManager[None]:
        return self._live.outside(stacks, written)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_block_by_block_is_the_same_as_at_once(family: str) -> None:
    """Ranges are those of the float model, except for what lies behind the blocks."""

    def passed(source: WeightSource) -> Finished:
        fields = EXTREMES.fields
        data = batches(tiny(family))
        return Pass(source, plan(tiny(family), EXTREMES), make(fields), data, MemoryResults()).run()

    whole, blocks = passed(LiveSource(tiny(family))), passed(Blockwise(tiny(family)))
    assert whole.packed.keys() == blocks.packed.keys()
    inside = [name for name in whole.packed if any(part.isdigit() for part in name.split("."))]
    assert len(inside) >= 12
    for name in inside:
        left, right = whole.packed[name], blocks.packed[name]
        assert torch.equal(left.codes, right.codes)
        assert left.input_scale is not None
        assert right.input_scale is not None
        assert torch.equal(left.input_scale, right.input_scale)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_error_is_that_of_eight_bits(observer: str) -> None:
    """Rounding 8-bit inputs of random layers costs about 1 % of their size; entropy clips more."""
    dense = tiny("bert")
    inputs = batches(dense)[0]
    model = compressed("bert", Int8StaticQuantConfig(observer=observer))
    found, expected = output(model, inputs), output(dense, inputs)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.2


def test_smoothing_lowers_the_error_of_planted_outliers() -> None:
    """A norm's channel 60 times as large as the others, undone by the weights behind it."""
    dense = tiny("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.input_layernorm.weight[5] *= 60
            layer.post_attention_layernorm.weight[5] *= 60
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                layer.get_submodule(name).weight[:, 5] /= 60
    data = batches(dense)

    def error(smoothing: float | None) -> float:
        config = Int8StaticQuantConfig(smoothing=smoothing)
        model = hfc.quantize(deepcopy(dense), config, calibration=hfc.Calibration(data, min_rows=1, min_tokens=1))
        expected = output(dense, data[0])
        return float((output(model, data[0]) - expected).norm() / expected.norm())

    assert error(0.5) < 0.5 * error(None)


def test_batch_normalisation_is_folded_and_the_model_stays_stock() -> None:
    model = compressed("resnet", EXTREMES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    error = output(model, batches(model)[0]) - output(tiny("resnet"), batches(model)[0])
    assert 0 < float(error.norm() / output(model, batches(model)[0]).norm()) < 0.2


def test_the_model_is_as_it_was_after_an_error() -> None:
    dense = tiny("bert")
    with torch.no_grad():
        dense.encoder.layer[1].intermediate.dense.bias[0] = float("nan")
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"encoder\.layer\.1\.output\.dense: It holds NaN") as caught:
        hfc.quantize(dense, copy(EXTREMES), calibration=hfc.Calibration(batches(dense), min_rows=1, min_tokens=1))
    assert "float32" in caught.value.fix
    assert not any(module._forward_pre_hooks for module in dense.modules())
    assert all(
        torch.equal(
            value,
            before[key],
        )
        or value.isnan().any()
        for key, value in dense.state_dict().items()
    )


class Idle(nn.Module):
    """A layer that runs and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, value: Tensor) -> Tensor:
        return self.used(value)


def test_weights_that_no_data_reaches_are_named() -> None:
    model, value = Idle(), torch.ones(2, 3, 16)
    run = Pass(LiveSource(model), plan(model, EXTREMES), make(EXTREMES.fields), [{"value": value}], MemoryResults())
    with pytest.raises(CalibrationError, match="never reaches idle"):
        run.run()


def test_tied_layers_can_not_share_a_range() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    with pytest.raises(TiedWeightsError, match="one range for its inputs"):
        plan(model, EXTREMES)
