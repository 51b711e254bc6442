"""What calibration data must know of the model that it is made for."""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import PreTrainedConfig


def config_int(config: PreTrainedConfig, name: str) -> int | None:
    """A whole number of a config under its common name; None where it has none."""
    value = config.to_dict().get(config.attribute_map.get(name, name))
    value = value[0] if isinstance(value, list) and value else value  # several end tokens
    return value if type(value) is int else None


def position_limit(model: nn.Module, decoder: bool = False) -> int | None:
    """Most tokens per row that a model has positions for; None where it has no such limit.

    A table of learned positions with a padding row (RoBERTa) starts counting after that row.

    Args:
        model: The model; its weights may be on the meta device.
        decoder: Of an encoder-decoder's decoder, not of what reads `input_ids`.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config.get_text_config(decoder=True) if decoder else model.config.get_text_config()
    names = ("max_target_positions", "max_position_embeddings") if decoder else ("max_position_embeddings",)
    limit = next((found for name in names if (found := config_int(config, name)) is not None), None)
    if limit is None:
        return None
    offsets = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
        if "position" in name.rpartition(".")[2] and module.num_embeddings == limit
    ]
    return limit - max(offsets, default=0)


def vocabulary(model: nn.Module) -> int | None:
    """Number of token ids that a model has embeddings for; None where it reads no tokens."""
    if not isinstance(model, PreTrainedModel) or not reads_tokens(model):
        return None
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises where it can't tell
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def reads_tokens(model: nn.Module) -> bool:
    """Whether a model's forward takes token ids."""
    return "input_ids" in arguments(model)


def is_text_model(model: nn.Module) -> bool:
    """Whether a model predicts tokens from tokens: decoders, masked language models, text-to-text models."""
    if not isinstance(model, PreTrainedModel) or main_input(model) != "input_ids":
        return False
    return generates(model) or (model.get_output_embeddings() is not None and not model.config.is_encoder_decoder)


def generates(model: nn.Module) -> bool:
    """Whether a model continues text."""
    return isinstance(model, PreTrainedModel) and bool(model.can_generate())


def takes_decoder_inputs(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder whose decoder reads tokens."""
    return (
        isinstance(model, PreTrainedModel)
        and bool(model.config.is_encoder_decoder)
        and "decoder_input_ids" in arguments(model)
    )


def decoder_start(model: PreTrainedModel) -> int:
    """The token that a decoder starts with."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    found = [config_int(model.config, name) for name in names]
    return next((value for value in found if value is not None), 0)


def main_input(model: nn.Module) -> str:
    """The argument of forward that the data goes to: as transformers names it, else the first one."""
    if isinstance(model, PreTrainedModel):
        return str(model.main_input_name)
    return next(iter(arguments(model)), "input")


def arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of forward by name, without `*args` and `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in variadic}


def takes_anything(model: nn.Module) -> bool:
    """Whether forward has `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def dtype_of(model: nn.Module, value: Tensor) -> Tensor:
    """Floating inputs in the data type of the model's weights; others as they are."""
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return value.to(weight.dtype) if weight is not None and value.is_floating_point() else value
