"""`hf_compress.optimize_for_inference`: packed modules and fast kernels for any compressed-tensors model."""

from __future__ import annotations

from typing import TypeVar

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from ..checkpoint.handover import hand_over, plan_of
from ..checkpoint.session import release_ties
from ..core.errors import UnsupportedModelError
from ..core.plan import Plan, PlanRow, row_of
from ..core.scheme import Scheme
from ..core.weights import Role, Weight, WeightKind, list_weights, small_parameters
from ..formats.base import format_of
from ..modules.kernels.choose import choose_kernels
from ..modules.swap import pack_module, share_packed

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def optimize_for_inference(model: Model) -> Model:
    """Give a compressed model the fastest kernels that this machine has, in place.

    A model that stock transformers loaded from a compressed-tensors checkpoint, by whomever it was written, is
    packed first: stock turns it dense on its first forward. It may have run already. Experts, which stock
    dequantizes while loading, stay dense; `hf_compress.load` keeps them packed.

    Args:
        model: A model compressed by this package, or loaded by stock transformers from compressed-tensors.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: It is not compressed, or in a way that can't be packed.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"Expected a model, got {type(model).__name__}.", "pass a loaded model")
    if plan_of(model) is None:
        _pack_stock(model)
    choose_kernels(model)
    return model


def _pack_stock(model: nn.Module) -> None:
    """Pack a model that stock transformers loaded."""
    quantizer = vars(model).get("hf_quantizer")
    if not isinstance(model, PreTrainedModel) or not isinstance(quantizer, CompressedTensorsHfQuantizer):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a compressed-tensors model.",
            "compress it with hf_compress.quantize",
        )
    modules = {path: module for path, module in model.named_modules() if _scheme(module) is not None}
    default = quantizer.quantization_config.quantization_config.format
    rows = _with_ties(model, [_row(path, module, default) for path, module in modules.items()])
    if not rows:
        raise UnsupportedModelError(
            f"No layer of {type(model).__name__} is compressed in memory: stock dequantized it while loading.",
            "load it with hf_compress.load",
        )
    dense = [weight for weight in list_weights(model) if weight.module not in modules]
    kept = tuple(row_of(weight, "dense in its checkpoint", "", in_scope=not weight.role) for weight in dense)
    plan = Plan(
        method="compressed-tensors",
        request={},
        format="compressed-tensors",
        rows=(*rows, *kept),
        small_parameters=small_parameters(model),
        notes=("read from a stock compressed-tensors model",),
    )
    for row in rows:
        _pack(model, row, plan)
    release_ties(model, plan)
    quantizer.compressor.remove_decompression_hook(model)
    hand_over(model, plan)


def _scheme(module: nn.Module) -> QuantizationScheme | None:
    """The scheme that compressed-tensors attached to a module."""
    found = vars(module).get("quantization_scheme")
    return found if isinstance(found, QuantizationScheme) and found.weights is not None else None


def _row(path: str, module: nn.Module, default: str) -> PlanRow:
    """The plan's row for a module that stock compressed; `default` is the checkpoint's storage format."""
    scheme = _scheme(module)
    if scheme is None or scheme.weights is None or not isinstance(module, nn.Linear | nn.Embedding):
        raise UnsupportedModelError(f"{path} ({type(module).__name__}) can't be packed.", "leave the model as it is")
    if scheme.weights.type != "int" or scheme.weights.strategy not in ("group", "channel", "tensor"):
        raise UnsupportedModelError(
            f"{path} is {scheme.weights.type}{scheme.weights.num_bits} per {scheme.weights.strategy}; only integers "
            "per group, channel or tensor can be packed.",
            "leave the model as it is",
        )
    weight = Weight(
        name=path,
        module=path,
        parameter="weight",
        kind=WeightKind.LINEAR if isinstance(module, nn.Linear) else WeightKind.EMBEDDING,
        role=Role.NONE,
        owner=type(module).__name__,
        shape=_weight_shape(module),
        transposed=False,
        dtype=module.get_parameter("weight_scale").dtype,
    )
    storage = CompressionFormat(scheme.format or default).value
    stored = Scheme.model_validate({**scheme.model_dump(), "format": storage})
    return row_of(weight, stored, "compressed by its checkpoint", in_scope=True)


def _weight_shape(module: nn.Linear | nn.Embedding) -> tuple[int, int]:
    """Rows and columns of the dense weight."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.num_embeddings, module.embedding_dim


def _with_ties(model: PreTrainedModel, rows: list[PlanRow]) -> list[PlanRow]:
    """Rows that know which of them are tied; those after the first hold no values of their own.

    Raises:
        UnsupportedModelError: The scales of two tied weights differ.
    """
    names = {row.key: row.name for row in rows}
    made = []
    for row in rows:
        source = names.get(model.all_tied_weights_keys.get(row.key, ""))
        if source is not None:
            mine, theirs = (model.get_submodule(name).get_parameter("weight_scale") for name in (row.name, source))
            if not torch.equal(mine, theirs):
                raise UnsupportedModelError(
                    f"{row.name} is tied to {source}, but has other scales.", "leave the model as it is"
                )
        made.append(row if source is None else row.model_copy(update={"tied_to": source, "parameters": 0}))
    return sorted(made, key=lambda row: row.tied_to is not None)


def _pack(model: nn.Module, row: PlanRow, plan: Plan) -> None:
    """Swap one stock module for its packed form."""
    module = model.get_submodule(row.module)
    packed = None
    if row.tied_to is None:
        tensors = {f"{row.name}.{name}": value for name, value in _compressed(module, row).items()}
        packed = format_of(plan).decode(row, tensors)
    for name in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]:
        del module._parameters[name]
    module._parameters["weight"] = None
    for name in ("forward", "quantization_scheme", "quantization_status", "quantization_enabled"):
        vars(module).pop(name, None)
    if packed is None:
        share_packed(model.get_submodule(str(row.tied_to)), "weight", module, "weight")
    else:
        pack_module(module, "weight", packed)


def _compressed(module: nn.Module, row: PlanRow) -> dict[str, Tensor]:
    """The module's tensors as on disk, compressed again if a forward has made it dense."""
    local = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    local |= dict(module.named_buffers(recurse=False))
    local.pop("bias", None)
    if vars(module).get("quantization_status") == QuantizationStatus.COMPRESSED or row.quantization is None:
        return local
    storage = str(row.quantization.format)
    compressor = BaseCompressor.get_value_from_registry(storage)
    compressed: dict[str, Tensor] = compressor.compress(local, row.quantization)
    return compressed
