"""Hand-over: after packing, the model carries transformers' native quantizer and config, not ours.

So `config.json` never names a method that stock transformers doesn't know, and `save_pretrained`, `push_to_hub`
and `Trainer.save_model` write through the format, before and after a forward alike.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from ..core.config import Format
from ..core.errors import FormatError, UnsupportedModelError, listed
from ..core.fit import in_format
from ..core.plan import DTYPES, Plan
from ..formats.awq import stock_refusal
from ..formats.base import encode_model, format_of, plain_path
from ..modules.packed import Layout, layout_of
from ..modules.swap import packed_modules, unpack_module
from .foreign import LIBRARIES, check_measured, measured_plan, quantization_of
from .record import FILE, KEY, record_of, sort_metadata

_PLAN = "hfc_plan"
TRAINING_PLAN = "hfc_qat"
"""Attribute of a model that computes with fake-quantized values: the plan that converting it will carry out."""


class NativeConfig(CompressedTensorsConfig):
    """compressed-tensors' config that also serialises `dequantize`, which asymmetric weights need."""

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says."""
        values: dict[str, Any] = super().to_dict()
        return {**values, "dequantize": True} if self.dequantize else values


class StoredConfig(QuantizationConfigMixin):
    """What a format puts into `config.json`, word for word; the guarded form's has no `quant_method`."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.quant_method = name
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        """The format's values."""
        return dict(self.values)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults."""
        return dict(self.values)


class _Packed:
    """What our native quantizers share: saving through the format, and no claim to be trainable."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors and metadata that `save_pretrained` writes."""
        plan = current_plan(model)
        if plan is None:
            raise UnsupportedModelError(f"{type(model).__name__} has lost its plan.", "quantize it again")
        if not vars(model).get("_hf_peft_config_loaded"):
            refuse_wrapped(model)
        return encode_model(model, plan, format_of(plan)), {KEY: record_of(model, plan).model_dump_json()}

    @property
    def is_qat_trainable(self) -> bool:
        """Packed weights can't be trained; adapters on top of them can."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile."""
        return True

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """`model.dequantize()`: back to dense parameters."""
        wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
        plan = plan_of(model)
        for _, module in list(packed_modules(model)):
            unpack_module(module)
        forget_plan(model)
        vars(model).pop("quantization_method", None)  # transformers refuses to cast GPTQ and bitsandbytes models
        model.__class__ = vars(type(model)).get("hfc_base", type(model))
        if plan is not None and plan.followers:
            model.all_tied_weights_keys |= model.get_expanded_tied_weights_keys(all_submodels=True)
            model.tie_weights(recompute_mapping=False)
        return model if wanted in (None, model.dtype) else model.to(wanted)  # which also casts buffers, such as RoPE's


class NativeQuantizer(_Packed, CompressedTensorsHfQuantizer):
    """transformers' own compressed-tensors quantizer, saving through our format."""


class StoredQuantizer(_Packed, HfQuantizer):
    """The quantizer of models that this package saves without help from transformers' own quantizer."""


class PackedSave(PreTrainedModel):
    """What saving adds for packed models; mixed into the model's class by class swap, under the same name."""

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie what is still a parameter; packed ties share their buffers already."""
        plan = plan_of(self)
        super().tie_weights(missing_keys, recompute_mapping and not (plan is not None and plan.followers))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' `save_pretrained`, with the same bytes every time, and the guarded form under its own name.

        A guarded checkpoint is one file, whose name stock loading doesn't look for.
        """
        if vars(self).get("_hf_peft_config_loaded") or not is_main_process:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # writes no base weights
            return
        plan, folder = current_plan(self), Path(save_directory)
        name = format_of(plan).weights_file if plan is not None else None
        if name and kwargs.get("variant"):
            raise UnsupportedModelError("A guarded checkpoint has no variants.", "leave `variant` out")
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", folder.name)
        hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if push and key in kwargs}
        options = {**kwargs, "max_shard_size": 1 << 62} if name else kwargs
        super().save_pretrained(save_directory, is_main_process, *args, **options)
        _forget_proof(folder)
        for file in sorted(folder.glob("model*.safetensors")):
            sort_metadata(file)
        if name and (folder / "model.safetensors").is_file():
            (folder / "model.safetensors").replace(folder / name)
        if push:
            self.push_to_hub(repo_id, **hub)


_HUB_OPTIONS = ("token", "private", "commit_message", "commit_description", "revision", "create_pr", "tags")


def _forget_proof(folder: Path) -> None:
    """Delete what an earlier save left beside the new weights: its proof, and its guarded weights."""
    for name in (FILE, "hf_compress.safetensors"):
        (folder / name).unlink(missing_ok=True)


def hand_over(model: nn.Module, plan: Plan) -> None:
    """Give a packed model its plan, and its native quantizer and config.

    Args:
        model: The model, packed according to the plan. Plain modules have no config and get only the plan.
        plan: The plan as carried out.
    """
    vars(model)[_PLAN] = plan
    if not isinstance(model, PreTrainedModel):
        return
    if plan.backend:
        model.add_model_tags(["hf_compress", plan.method])
        return
    values = format_of(plan).quantization_config(plan)
    quantizer: NativeQuantizer | StoredQuantizer
    if plan.format == "dense":
        forget_quantization(model)
        return
    if plan.format == "compressed-tensors":
        quantizer = NativeQuantizer(NativeConfig.from_dict(values), pre_quantized=True)
    else:
        quantizer = StoredQuantizer(StoredConfig(plan.format, values))
    if not isinstance(model, PackedSave):
        model.__class__ = _saving_class(type(model))  # type: ignore[arg-type] # nn.Module is hashable
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.add_model_tags(["hf_compress", plan.method])


@contextmanager
def handed_over(model: nn.Module, plan: Plan, name: str | None) -> Iterator[Plan]:
    """A model that saves in another format inside the block, and as before after it.

    Args:
        model: The model.
        plan: Its plan.
        name: The format; None for the plan's own.

    Yields:
        The plan in that format.

    Raises:
        FormatError: The format can't hold it.
    """
    if name is None or name == plan.format:
        yield plan
        return
    known = [one for one in get_args(Format) if one != "auto"]
    if name not in known:
        raise FormatError(f"There is no format {name!r}.", f"choose one of {', '.join(map(repr, known))}")
    if plan.backend or not plan.quantized or not isinstance(model, PreTrainedModel):
        raise FormatError(f"A model in the format {plan.format!r} can't be saved as {name!r}.", "leave `format` out")
    wanted = in_format(plan, name)
    check_scales(model, wanted)
    if name == "awq":
        check_awq(model, wanted)
    hand_over(model, wanted)
    try:
        yield wanted
    finally:
        hand_over(model, plan)


def check_scales(model: PreTrainedModel, plan: Plan) -> None:
    """Refuse scales that were made for another format and would change in this one, before anything is written.

    Raises:
        FormatError: There are some.
    """
    layout = format_of(plan)
    rows = {(row.module, row.parameter): row for row in plan.quantized}
    for path, module in packed_modules(model):
        for name in module.hfc_layouts:
            row = rows[plain_path(path), name]
            weights = layout_of(layout.adapted(row)).weights
            scale = module.get_buffer(f"{name}_scale")
            if weights.scale_dtype is None or torch.equal(scale.to(weights.scale_dtype).to(scale.dtype), scale):
                continue
            stored = str(weights.scale_dtype).removeprefix("torch.")
            raise FormatError(
                f"The format {plan.format!r} stores scales as {stored}, and those of {row.name} were made for another "
                "format and would change. Nothing was written.",
                f'compress the original model with format="{plan.format}" in its configuration',
            )


def check_awq(model: PreTrainedModel, plan: Plan) -> None:
    """Refuse what stock transformers would load from an AWQ checkpoint with random weights.

    Raises:
        FormatError: It would.
    """
    reason = stock_refusal(model, plan)
    if reason is not None:
        raise FormatError(
            f"The format 'awq' can't hold {type(model).__name__}: {reason}.", 'use format="gptq" or format="guarded"'
        )


def current_plan(model: nn.Module) -> Plan | None:
    """The plan of a compressed model, if the model still is what the plan says.

    Of a model that stock transformers loaded with bitsandbytes or torchao, the plan is measured.

    Raises:
        UnsupportedModelError: Layers were removed, replaced or added since it was compressed.
    """
    plan = plan_of(model)
    if plan is None:
        return _of_library(model)
    if plan.backend:
        return None if quantization_of(model) is None else check_measured(plan, model)  # None: it was dequantized
    found = {
        (plain_path(path), name, _form(layout))
        for path, module in packed_modules(model)
        for name, layout in module.hfc_layouts.items()
    }
    planned = {(row.module, row.parameter, _form(layout_of(row))) for row in plan.quantized}
    changed = sorted({f"{path}.{name}" for path, name, _ in found ^ planned})
    if changed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has changed since it was compressed: {listed(changed)} ({len(changed)} weights).",
            "change the model first, then compress it",
        )
    return plan


def _of_library(model: nn.Module) -> Plan | None:
    """The measured plan of a model that one of the libraries that we save and load quantized."""
    measured = None if quantization_of(model) is None else measured_plan(model)
    return measured if measured is not None and measured.backend in LIBRARIES else None


def _form(layout: Layout) -> str:
    """What two layouts must share."""
    return f"{layout.shape} {layout.transposed} {layout.scheme.model_dump_json(exclude={'targets'})}"


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse to save layers that PEFT or torch.compile has wrapped: their names would be wrong in the checkpoint.

    Raises:
        UnsupportedModelError: With the way out.
    """
    for path, _ in packed_modules(model):
        if ".base_layer" in path:
            raise UnsupportedModelError(
                f"{type(model).__name__} has an adapter on {plain_path(path)}, which is saved apart from the model.",
                "save the adapter with its own save_pretrained, and the model before an adapter is added",
            )
        if "_orig_mod" in path:
            raise UnsupportedModelError(
                f"{plain_path(path)} of {type(model).__name__} is compiled.", "save before torch.compile"
            )


def forget_plan(model: nn.Module) -> None:
    """Drop the plan of a model that is dense again."""
    vars(model).pop(_PLAN, None)


def plan_of(model: object) -> Plan | None:
    """The plan of a model that this package compressed, or None."""
    found = vars(model).get(_PLAN) if isinstance(model, nn.Module) else None
    return found if isinstance(found, Plan) else None


def training_plan_of(model: object) -> Plan | None:
    """The plan that a model is being trained for, or None."""
    found = vars(model).get(TRAINING_PLAN) if isinstance(model, nn.Module) else None
    return found if isinstance(found, Plan) else None


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove every trace of quantization from a model that stays dense, and from models inside of it."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    model.is_quantized = False


@functools.cache
def _saving_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model's class with `PackedSave`; its name stays, so `architectures` in the config does too."""
    return type(base.__name__, (PackedSave, base), {"__module__": base.__module__, "hfc_base": base})
