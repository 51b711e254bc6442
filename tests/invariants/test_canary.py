"""A canary: every private or unstable name of other packages that we lean on, and the behaviour we expect of it.

When one of these fails after an upgrade, the place in our package that uses the name is in the comment.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from tests._utils.tiny import tiny

FUNCTIONS = {
    # core/weights.py, checkpoint/load.py
    "transformers.conversion_mapping:get_model_conversion_mapping": ("model", "add_legacy"),
    "transformers.core_model_loading:apply_renamings": ("source_key", "weight_renamings"),
    # checkpoint/shards.py
    "transformers.core_model_loading:rename_source_key": (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ),
    "transformers.core_model_loading:dot_natural_key": ("s",),
    "transformers.core_model_loading:WeightConverter.add_tensor": (
        "target_key",
        "source_key",
        "source_pattern",
        "future",
    ),
    "transformers.core_model_loading:WeightConverter.convert": ("layer_name", "model", "config"),
    "transformers.modeling_utils:PreTrainedModel.initialize_weights": (),
    "transformers.modeling_utils:PreTrainedModel.tie_weights": ("recompute_mapping",),
    # core/weights.py, formats/bitsandbytes.py
    "transformers.quantizers.quantizers_utils:should_convert_module": ("full_name", "patterns"),
    # integrations/transformers.py
    "transformers.quantizers:register_quantization_config": ("method",),
    "transformers.quantizers:register_quantizer": ("name",),
    "transformers.quantizers.base:HfQuantizer.__init__": ("quantization_config",),
    "transformers.quantizers.base:HfQuantizer.validate_environment": ("args", "kwargs"),
    "transformers.quantizers.base:HfQuantizer.update_dtype": ("dtype",),
    "transformers.quantizers.base:HfQuantizer.param_needs_quantization": ("model", "param_name", "kwargs"),
    "transformers.quantizers.base:HfQuantizer.get_quantize_ops": (),
    "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading": ("model", "kwargs"),
    "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading": ("model", "kwargs"),
    "transformers.quantizers.base:HfQuantizer._dequantize": ("model", "dtype"),
    "transformers.quantizers.base:HfQuantizer.get_state_dict_and_metadata": ("model",),
    "transformers.quantizers.base:HfQuantizer.is_serializable": (),
    # checkpoint/handover.py
    "transformers.utils.quantization_config:QuantizationConfigMixin.to_dict": (),
    "transformers.utils.quantization_config:CompressedTensorsConfig.from_dict": ("config_dict",),
    "transformers.modeling_utils:PreTrainedModel.save_pretrained": ("save_directory", "max_shard_size"),
    "transformers.modeling_utils:PreTrainedModel.add_model_tags": ("tags",),
    # pipeline/planning.py
    "transformers.modeling_utils:PreTrainedModel._init_weights": ("module",),
    # checkpoint/load.py passes these to it
    "transformers.modeling_utils:PreTrainedModel.from_pretrained": (
        "pretrained_model_name_or_path",
        "config",
        "kwargs",
    ),
    # pipeline/backends/
    "transformers.quantizers.base:get_keys_to_not_convert": ("model",),
    "transformers.quantizers:AutoHfQuantizer.from_config": ("quantization_config", "kwargs"),
    "transformers.quantizers.base:HfQuantizer.preprocess_model": ("model", "kwargs"),
    "transformers.quantizers.base:HfQuantizer.update_device_map": ("device_map",),
    "transformers.integrations.torchao:TorchAoQuantize.convert": ("input_dict", "model", "full_layer_name"),
    # checkpoint/inputs.py
    "transformers.initialization:meta_device_safe_creation_ops": (),
    # modules/packed.py
    "compressed_tensors.compressors.pack_quantized.helpers:pack_to_int32": ("value", "num_bits"),
    "compressed_tensors.compressors.pack_quantized.helpers:unpack_from_int32": ("value", "num_bits", "shape"),
    # modules/swap.py
    "compressed_tensors.quantization.lifecycle.forward:fake_quantize": ("x", "scale", "zero_point", "args"),
    "compressed_tensors.quantization.utils:compute_dynamic_scales_and_zp": ("value", "args", "module"),
    # methods/rtn/method.py
    "compressed_tensors.quantization.utils:calculate_qparams": ("min_vals", "max_vals", "quantization_args"),
    # pipeline/optimize.py
    "compressed_tensors.compressors:BaseCompressor.get_value_from_registry": ("name",),
    "compressed_tensors.compressors:BaseCompressor.compress": ("state_dict", "scheme"),
    "compressed_tensors.compressors:ModelCompressor.remove_decompression_hook": ("model",),
    # training/distillation/
    "transformers:Trainer.compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "transformers:Trainer.get_tp_size": (),
    "transformers:Trainer._set_signature_columns_if_needed": (),
    "transformers:Wav2Vec2ForCTC._get_feat_extract_output_lengths": ("input_lengths",),
    "transformers:ParakeetForCTC._get_subsampling_output_length": ("input_lengths",),
    "transformers:BartForConditionalGeneration.prepare_decoder_input_ids_from_labels": ("labels",),
    # integrations/optimum_cli.py
    "optimum.commands.base:BaseOptimumCLICommand.parse_args": ("parser",),
    "optimum.commands.base:CommandInfo.__init__": ("name", "help"),
}
"""`module:qualified name` and parameters that must be there."""


def find(place: str) -> Any:
    module, _, qualified = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("place", FUNCTIONS)
def test_function(place: str) -> None:
    found = find(place)
    assert callable(found)
    names = inspect.signature(found).parameters
    assert [name for name in FUNCTIONS[place] if name not in names] == [], f"{place}{inspect.signature(found)}"


def test_registries_are_dictionaries_by_name() -> None:
    """integrations/transformers.py"""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        assert isinstance(mapping, dict)
        assert "compressed-tensors" in mapping
        assert "hf_compress" in mapping


def test_quantizer_members_are_of_the_kind_we_override() -> None:
    """integrations/transformers.py, checkpoint/handover.py: property or method matters, see facts 2.1."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    for name in ("is_trainable", "is_qat_trainable", "is_compileable", "quantized_element_size"):
        assert isinstance(inspect.getattr_static(HfQuantizer, name), property), name
    assert inspect.isfunction(inspect.getattr_static(HfQuantizer, "is_serializable"))
    assert HfQuantizer.requires_calibration is False
    assert issubclass(CompressedTensorsHfQuantizer, HfQuantizer)
    assert {"is_serializable", "is_trainable"} <= HfQuantizer.__abstractmethods__


def test_conversion_operations() -> None:
    """core/weights.py reads these attributes; integrations/transformers.py is called with these keywords."""
    from transformers import core_model_loading as loading

    assert loading.MergeModulelist(dim=0).dim == 0
    assert loading.Concatenate(dim=1).dim == 1
    for kind in (loading.MergeModulelist, loading.Concatenate):
        assert issubclass(kind, loading.ConversionOps)
    source = inspect.getsource(loading)
    for keyword in ("full_layer_name=", "model=model", "missing_keys="):
        assert keyword in source, keyword
    mapping = loading_mapping("qwen3-moe")
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    stacked = [entry for entry in converters if isinstance(entry.operations[0], loading.MergeModulelist)]
    assert sorted(entry.target_patterns[0].rpartition(".")[2] for entry in stacked) == ["down_proj", "gate_up_proj"]
    assert all("*" in name for entry in stacked for name in entry.source_patterns)


def loading_mapping(family: str) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(tiny(family), add_legacy=False))


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_fused_experts_say_how_they_are_stored(family: str) -> None:
    """core/weights.py"""
    experts = [module for path, module in tiny(family).named_modules() if path.endswith("experts")]
    assert len(experts) == 2
    for module in experts:
        assert vars(module)["is_transposed"] is False
        assert module.get_parameter("gate_up_proj").ndim == module.get_parameter("down_proj").ndim == 3


def test_attributes_of_models() -> None:
    """core/weights.py, checkpoint/{handover,proof,truncate,inputs}.py"""
    model = tiny("llama-tied")
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert vars(model.config.get_text_config())["num_hidden_layers"] == 2
    assert isinstance(model.dummy_inputs, dict)
    assert model.get_output_embeddings() is model.lm_head
    assert tiny("bert-classifier").base_model is not None
    with torch.device("meta"):
        assert tiny_meta().device.type == "meta"


def tiny_meta() -> PreTrainedModel:
    return transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


def test_initialised_flag_stops_transformers_from_drawing() -> None:
    """modules/swap.py marks packed modules with it."""
    from transformers import initialization

    weight = nn.Parameter(torch.zeros(4))
    vars(weight)["_is_hf_initialized"] = True
    initialization.normal_(weight)
    assert not weight.any()
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel._initialize_weights)


def test_saving_asks_the_quantizer() -> None:
    """checkpoint/handover.py"""
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert "hf_quantizer.get_state_dict_and_metadata(self)" in source
    assert "hf_quantizer.is_serializable()" in source
    assert 'metadata["format"] = "pt"' in source


def test_training_gate_reads_what_we_set() -> None:
    """checkpoint/handover.py"""
    from transformers.trainer_utils import validate_quantization_for_training

    source = inspect.getsource(validate_quantization_for_training)
    assert all(name in source for name in ("is_quantized", "is_qat_trainable", "is_trainable"))


def test_compressed_tensors_vocabulary() -> None:
    """core/scheme.py, formats/compressed_tensors.py, pipeline/optimize.py"""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    assert {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"} <= set(QuantizationArgs.model_fields)
    assert {"targets", "weights", "input_activations", "format"} <= set(QuantizationScheme.model_fields)
    assert {"config_groups", "format", "ignore", "quantization_status"} <= set(QuantizationConfig.model_fields)
    assert QuantizationStatus.COMPRESSED.value == "compressed"
    for name in ("pack-quantized", "int-quantized", "mixed-precision"):
        assert CompressionFormat(name).value == name
    for name in ("pack-quantized", "int-quantized"):
        assert BaseCompressor.get_value_from_registry(name) is not None


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_dense_little_endian_and_offset_binary(bits: int) -> None:
    """modules/packed.py relies on the layout and has a path of its own for 2, 4 and 8 bits."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    from hf_compress.modules.packed import from_words, to_words

    generator = torch.Generator().manual_seed(bits)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (3, 41), generator=generator, dtype=torch.int8)
    words = pack_to_int32(codes, bits)
    value = sum((int(code) - low) << (index * bits) for index, code in enumerate(codes[1]))
    expected = [(value >> (32 * index)) & 0xFFFFFFFF for index in range(words.shape[1])]
    assert [int(word) & 0xFFFFFFFF for word in words[1]] == expected
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(to_words(codes, bits), words)
    assert torch.equal(from_words(words, bits, 41), codes)


def test_dynamic_scales_are_absmax_over_half_the_range() -> None:
    """modules/kernels/int_mm.py repeats this arithmetic."""
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from hf_compress.core.scheme import token_args

    value = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]])
    scale, _ = compute_dynamic_scales_and_zp(value=value, args=token_args(), module=nn.Linear(3, 3, device="meta"))
    assert scale.shape == (1, 2, 1)
    assert float(scale[0, 0]) == pytest.approx(2 / 127.5, rel=1e-6)
    assert 0 < float(scale[0, 1]) < 1e-6


def test_torch_internals() -> None:
    """modules/lazy.py, modules/kernels/int_mm.py, checkpoint/inputs.py"""
    from torch._subclasses import FakeTensorMode
    from torch.utils._pytree import tree_map

    assert callable(torch._int_mm)
    assert callable(torch.Tensor._make_wrapper_subclass)
    assert torch._C.DisableTorchFunctionSubclass is not None
    assert tree_map(lambda value: value + 1, (1, {"a": 2})) == (2, {"a": 3})
    with FakeTensorMode():
        assert torch.zeros(2).shape == (2,)
    assert torch.compiler.is_compiling() is False


def test_models_name_what_is_never_stored() -> None:
    """checkpoint/proof.py and checkpoint/skeleton.py leave these tensors out."""
    assert PreTrainedModel._keys_to_ignore_on_save is None
    assert transformers.MarianMTModel._keys_to_ignore_on_save
    assert "._keys_to_ignore_on_save" in inspect.getsource(inspect.getmodule(PreTrainedModel))  # type: ignore[arg-type]
