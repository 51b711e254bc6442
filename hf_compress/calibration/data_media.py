"""Images, sound and tensors as rows of what a model's forward takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import FeatureExtractionMixin

from ..core.config import Calibration
from ..core.errors import CalibrationError, first_line
from .data_batches import IGNORED
from .data_model import config_int, decoder_start, dtype_of, main_input, takes_decoder_inputs
from .data_sources import Items
from .processors import Source, feature_extractor_of, image_processor_of, tokenizer_of

Row = dict[str, Tensor]

_DIMENSIONS = {"pixel_values": 3, "input_features": 2, "input_ids": 1}
"""Dimensions of one row of inputs with a known name."""

# What a processor raises about something that is no image, or no sound.
_MISFITS = (TypeError, ValueError, KeyError, IndexError, RuntimeError, OSError)


def media_rows(items: Items, request: Calibration, model: nn.Module, source: Source) -> list[Row]:
    """Images through the image processor, or sound through the feature extractor.

    Sound with a transcript gets it as labels, from which the decoder's inputs follow.

    Raises:
        CalibrationError: There is no processor, or it refuses an item.
    """
    pictures = items.kind == "images"
    processor = (image_processor_of if pictures else feature_extractor_of)(request, model, source)
    rows: list[Row] = []
    spoken: list[str | None] = []
    for index, value in enumerate(islice(items.values, request.rows)):
        options = {} if pictures else {"sampling_rate": processor.sampling_rate}
        try:
            made = processor(value if pictures else _sound(value, processor), return_tensors="pt", **options)
        except CalibrationError:
            raise
        except _MISFITS as error:
            raise CalibrationError(
                f"{type(processor).__name__} refuses item {index} of the calibration data: {first_line(error)}.",
                "pass images as PIL images or arrays, sound as arrays of one dimension",
            ) from None
        rows.append({name: dtype_of(model, tensor[0]) for name, tensor in made.items() if isinstance(tensor, Tensor)})
        spoken.append(value.get("text") if isinstance(value, Mapping) else None)
    if isinstance(model, PreTrainedModel) and takes_decoder_inputs(model):
        _add_transcripts(rows, [text for text in spoken if text is not None], request, model, source)
    return rows


def _add_transcripts(
    rows: list[Row], texts: list[str], request: Calibration, model: PreTrainedModel, source: Source
) -> None:
    """Give every row what is said in it as labels, padded to the same length; where all rows have a text."""
    if len(texts) < len(rows) or isinstance(request.tokenizer, FeatureExtractionMixin):
        return
    tokenizer = tokenizer_of(request, model, source)
    limit = config_int(model.config, "max_target_positions")
    ids = [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    first = decoder_start(model)
    ids = [(row[1:] if row[:1] == [first] else row)[:limit] for row in ids]
    longest = max(map(len, ids), default=0)
    for row, labels in zip(rows, ids, strict=True):
        row["labels"] = torch.tensor(labels + [IGNORED] * (longest - len(labels)))


def stacked(rows: list[Row], batch_size: int) -> list[Row]:
    """Batches of rows of the same names and shapes, in the order of the first row of each."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple((name, tuple(value.shape)) for name, value in sorted(row.items())), []).append(row)
    return [
        {name: torch.stack([row[name] for row in group[start : start + batch_size]]) for name in group[0]}
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def tensor_batches(items: Items, model: nn.Module) -> Iterator[Mapping[str, Any]]:
    """Tensors under the name of the model's main input; a single row becomes a batch of one."""
    name = main_input(model)
    for value in items.values:
        yield {name: value[None] if value.ndim == _DIMENSIONS.get(name) else value}


def _sound(value: Any, extractor: Any) -> Any:
    """One channel of sound as an array, float32.

    Raises:
        CalibrationError: It was sampled at another rate than the model expects.
    """
    if isinstance(value, Mapping):
        rate = value.get("sampling_rate", extractor.sampling_rate)
        if rate != extractor.sampling_rate:
            raise CalibrationError(
                f"The sound has a sampling rate of {rate} Hz, and the model expects {extractor.sampling_rate} Hz.",
                f'data.cast_column("audio", datasets.Audio(sampling_rate={extractor.sampling_rate}))',
            )
        value = value["array"]
    return np.asarray(value.numpy() if isinstance(value, Tensor) else value, dtype=np.float32)
