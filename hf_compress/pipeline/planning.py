"""Plans for a live model, or for an id or directory without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

from ..apply.planning import check_config, plan_model
from ..checkpoint.plain import class_name, is_plain
from ..checkpoint.stock import architecture_of
from ..core.config import QuantConfig
from ..core.errors import AlreadyQuantizedError, ModelNotFoundError, UnsupportedModelError, first_line
from ..core.plan import DTYPES, Plan
from .backends import backend_of, check_minimum, plan_stock, refuse_live

Request: TypeAlias = QuantConfig | BitsAndBytesConfig | TorchAoConfig
"""A configuration of ours, or one of transformers' that is carried out by another library."""


def plan(model_or_id: nn.Module | str | Path, config: Request, min_coverage: float | None = None) -> Plan:
    """What would happen to every weight; reads no weights for an id or directory.

    Args:
        model_or_id: A live model, a Hub id or a directory.
        config: The request; one of another library needs an id or directory.
        min_coverage: Only with another library's configuration, which has no such field: smallest fraction of the
            values in scope that must be quantized, 0 to 1; 0.9 by default.

    Raises:
        HFCompressError: The plan is refused; the code says why.
        UnsupportedModelError: The model is inside of another module, such as `torch.compile`'s, or has adapters.
        ModelNotFoundError: There is no such model.
    """
    return plan_request(model_or_id, config, min_coverage)[0]


def plan_request(
    model_or_id: nn.Module | str | Path, config: Request, min_coverage: float | None = None
) -> tuple[Plan, nn.Module]:
    """The plan of any request, and the model that it was made with: the live one, or a skeleton on meta."""
    backend = backend_of(config)
    if backend is None or isinstance(config, QuantConfig):
        check_config(config, min_coverage)
        model = model_or_id if isinstance(model_or_id, nn.Module) else meta_model(model_or_id)
        return plan_model(model, config), model
    if isinstance(model_or_id, nn.Module):
        refuse_live(model_or_id, config)
    minimum = check_minimum(min_coverage)
    model = meta_model(model_or_id)
    return plan_stock(meta_model(model_or_id), config, backend, minimum), model


def meta_model(model_id: str | Path) -> PreTrainedModel:
    """A model of the right class and data type on the meta device.

    Raises:
        ModelNotFoundError: There is no such id or directory, or it has no config.
        UnsupportedModelError: transformers has no such architecture.
        AlreadyQuantizedError: The checkpoint is quantized.
    """
    config = model_config(model_id)
    architecture = model_class(config, model_id)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = architecture(config)
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(
            f"{architecture.__name__} can't be built from the config of {str(model_id)!r}: {first_line(error)}",
            "check the config's sizes",
        ) from error
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else DTYPES.get(str(config.dtype), torch.float32)
    return model.to(dtype)


def model_config(model_id: str | Path) -> PreTrainedConfig:
    """The config of an id or directory.

    Raises:
        UnsupportedModelError: The argument is neither.
        ModelNotFoundError: There is none.
        AlreadyQuantizedError: It says that the checkpoint is quantized.
    """
    if not isinstance(model_id, str | Path):
        raise UnsupportedModelError(
            f"Expected a model, an id or a directory, got {type(model_id).__name__}.", "pass a transformers model"
        )
    path = Path(model_id)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"The directory {str(model_id)!r} has no config.json.", "point to a saved transformers model"
        )
    if not path.exists() and str(model_id).count("/") > 1:
        raise ModelNotFoundError(f"There is no directory {str(model_id)!r}.", "check the path")
    if (path / "hf_compress.safetensors").is_file() and is_plain(path):
        raise AlreadyQuantizedError(
            f"{str(model_id)!r} holds a plain module, {class_name(path)}, that is compressed already.",
            f'read it with hf_compress.load("{model_id}", model=...), or compress the original module',
        )
    try:
        config = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelNotFoundError(
            f"No usable model config at {str(model_id)!r}: {first_line(error)}",
            "check the spelling; a directory needs a config.json with a known model_type",
        ) from error
    if vars(config).get("quantization_config"):
        raise AlreadyQuantizedError(f"{str(model_id)!r} is quantized already.", "start from the original model")
    return config


def model_class(config: PreTrainedConfig, model_id: str | Path) -> type[PreTrainedModel]:
    """The class named in the config.

    Raises:
        UnsupportedModelError: There is none, or transformers doesn't have it.
    """
    kind = architecture_of(config)
    if kind is None:
        raise UnsupportedModelError(
            f"The config of {str(model_id)!r} names the architectures {config.architectures}; transformers "
            f"{transformers.__version__} has none of them for a {type(config).__name__}.",
            "load the model yourself and pass it instead of its id",
        )
    return kind
