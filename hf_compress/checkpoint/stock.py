"""Calling transformers' loader: complete or not at all, in our errors, without touching the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.errors import (
    CorruptCheckpointError,
    HFCompressError,
    IncompleteLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
    first_line,
    listed,
)

LOADER_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError)
"""What transformers raises for files or configs that don't fit together."""


def load_complete(
    architecture: type[PreTrainedModel], source: Any, *, closed: bool = False, **options: Any
) -> PreTrainedModel:
    """`from_pretrained`, refusing a model of which any weight is missing or of another shape.

    Args:
        architecture: The model's class.
        source: Directory or id, or None with `state_dict`.
        closed: Whether weights that the model has no place for are refused too.
        **options: Further arguments of `from_pretrained`.

    Raises:
        IncompleteLoadError: Weights are missing (they would be random) or have other shapes.
        CorruptCheckpointError: There are weights that the model has no place for.
    """
    with torch.random.fork_rng(devices=[]):
        model, info = architecture.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[kind])
        if names:
            raise IncompleteLoadError(
                f"{kind.replace('_', ' ').capitalize()} in the checkpoint of {architecture.__name__}: "
                f"{listed(names)} ({len(names)} in all). They would be random.",
                "load a complete checkpoint of this architecture",
            )
    unexpected = sorted(info["unexpected_keys"]) if closed else []
    if unexpected:
        raise CorruptCheckpointError(
            f"The checkpoint holds {listed(unexpected)}, for which {architecture.__name__} has no place.",
            "save the model again",
        )
    loaded: PreTrainedModel = model
    return loaded


def load_source(architecture: type[PreTrainedModel], source: str | Path, **options: Any) -> PreTrainedModel:
    """`load_complete` of a user's id or directory, in its data type, with what goes wrong told in our errors.

    Args:
        architecture: The model's class.
        source: Directory or id.
        **options: Further arguments of `from_pretrained`.

    Raises:
        CorruptCheckpointError: A weights file is damaged.
        ModelNotFoundError: There are no weights.
        UnsupportedModelError: Config and weights don't fit together.
        HFCompressError: Of ours, unchanged.
    """
    try:
        return load_complete(architecture, source, **options)
    except HFCompressError:
        raise
    except SafetensorError as error:
        raise CorruptCheckpointError(
            f"The weights of {str(source)!r} are damaged: {first_line(error)}.", "download or save them again"
        ) from error
    except OSError as error:
        raise ModelNotFoundError(
            f"No weights at {str(source)!r}: {first_line(error)}", "check that the model is complete"
        ) from error
    except LOADER_ERRORS as error:
        raise UnsupportedModelError(
            f"transformers can't load {str(source)!r} as {architecture.__name__}: {first_line(error)}",
            "check that the config belongs to the weights",
        ) from error


@contextmanager
def damaged_if_it_fails(what: str) -> Iterator[None]:
    """Turn whatever a loader raises inside the block into `CorruptCheckpointError`.

    Args:
        what: What is being read, for the message.
    """
    try:
        yield
    except IncompleteLoadError as error:
        raise CorruptCheckpointError(f"{what}: {error.message}", "save the model again") from error
    except HFCompressError:
        raise
    except (*LOADER_ERRORS, StrictDataclassError) as error:
        line = first_line(error).rstrip(".")
        raise CorruptCheckpointError(f"{what} can't be loaded: {line}.", "save the model again") from error


def architecture_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names under `architectures`, if transformers has it and it takes this config."""
    names = config.architectures or []
    kind: Any = getattr(transformers, str(names[0]), None) if names else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        return None
    wanted: Any = kind.config_class  # type: ignore[attr-defined]
    return kind if isinstance(wanted, type) and isinstance(config, wanted) else None
