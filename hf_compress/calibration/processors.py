"""Tokenizers, image processors and feature extractors: the one that was given, or the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from ..core.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from ..core.config import Calibration

Source = str | Path | None

# A directory without any of these gets a tokenizer with an empty vocabulary from transformers.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

_LOADER = {
    PreTrainedTokenizerBase: ("AutoTokenizer", TOKENIZER_FILES, "a tokenizer"),
    ImageProcessingMixin: ("AutoImageProcessor", PROCESSOR_FILES, "an image processor"),
    FeatureExtractionMixin: ("AutoFeatureExtractor", PROCESSOR_FILES, "a feature extractor"),
}


def tokenizer_of(request: Calibration, model: nn.Module, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer for texts.

    Raises:
        CalibrationError: There is none, or it can't be read.
    """
    return _required(PreTrainedTokenizerBase, request, model, source)


def image_processor_of(request: Calibration, model: nn.Module, source: Source) -> Any:
    """The image processor for images.

    Raises:
        CalibrationError: There is none, or it can't be read.
    """
    return _required(ImageProcessingMixin, request, model, source)


def feature_extractor_of(request: Calibration, model: nn.Module, source: Source) -> Any:
    """The feature extractor for sound.

    Raises:
        CalibrationError: There is none, or it can't be read.
    """
    return _required(FeatureExtractionMixin, request, model, source)


def find(kind: type, request: Calibration, model: nn.Module, source: Source) -> Any | None:
    """A processor of a kind, or None where neither the request nor the model has one.

    Raises:
        CalibrationError: Something else was given, or the model's own can't be read.
    """
    given = request.tokenizer
    if isinstance(given, str | Path):
        return _loaded(kind, given)
    if given is not None:
        return _part(kind, given)
    sources = [source, model.config.name_or_path if isinstance(model, PreTrainedModel) else None]
    for place in sources:
        if place and (found := _loaded(kind, place)) is not None:
            return found
    return None


def has_file(source: str | Path, name: str) -> bool:
    """Whether a model has a file; offline, whether it is in the cache."""
    try:
        return cached_file(str(source), name) is not None
    except OSError:
        return False


def _required(kind: type, request: Calibration, model: nn.Module, source: Source) -> Any:
    found = find(kind, request, model, source)
    if found is None:
        loader, files, words = _LOADER[kind]
        raise CalibrationError(
            f"This data needs {words}, and none was found for {source or type(model).__name__}.",
            f"pass Calibration(data, tokenizer={loader}.from_pretrained(...)), or a directory that has {files[0]}",
        )
    return found


def _part(kind: type, given: object) -> Any | None:
    """The part of a processor that has this kind.

    Raises:
        CalibrationError: It has none.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, ProcessorMixin):
        part = next((value for value in vars(given).values() if isinstance(value, kind)), None)
        if part is not None:
            return part
    loader, _, words = _LOADER[kind]
    raise CalibrationError(
        f"tokenizer= is a {type(given).__name__}, and this data needs {words}.",
        f"tokenizer={loader}.from_pretrained(...)",
    )


def _loaded(kind: type, source: str | Path) -> Any | None:
    """A processor read from a directory or the hub, or None where the files for it aren't there.

    Raises:
        CalibrationError: The files are there, but can't be read.
    """
    import transformers

    loader, files, words = _LOADER[kind]
    if not any(has_file(source, name) for name in files):
        return None
    try:
        return getattr(transformers, loader).from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CalibrationError(
            f"{source} has files of {words} that can't be read: {first_line(error)}.",
            f"pass Calibration(data, tokenizer={loader}.from_pretrained(...))",
        ) from None
