"""Every error a user can meet: typed, coded, with the value seen, the place and a fix to paste.

Codes are stable and grouped: 1xx coverage, 2xx configuration and rules, 3xx environment, 4xx models and
weights, 5xx data, 6xx results, 7xx checkpoints, 8xx formats. HFC901 is what a guarded checkpoint tells stock readers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class HFCompressError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        message: What happened, with the value seen and the place.
        fix: What to do about it, ready to paste. Appended to the message.
    """

    code: ClassVar[str] = "HFC000"

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"[{self.code}] {message}" + (f" Fix: {fix}" if fix else ""))

    def __reduce__(self) -> tuple[type[HFCompressError], tuple[str, str]]:
        return type(self), (self.message, self.fix)


class NothingToQuantizeError(HFCompressError, ValueError):
    """The plan selects no weight at all."""

    code = "HFC101"


class CoverageError(HFCompressError, ValueError):
    """The plan covers less of the model than `min_coverage`."""

    code = "HFC102"


class PatternError(HFCompressError, ValueError):
    """A skip or rule pattern matches no weight, or is not a valid pattern."""

    code = "HFC201"


class ConfigError(HFCompressError, ValueError):
    """A configuration has an unknown key, a wrong type or an impossible value."""

    code = "HFC202"


class RuleError(HFCompressError, ValueError):
    """A rule says nothing, contradicts itself, or changes only weights that are kept."""

    code = "HFC203"


class MethodError(HFCompressError, ValueError):
    """A method name is unknown, or registered twice."""

    code = "HFC204"


class BackendError(HFCompressError, ImportError):
    """A package that the request needs is not installed, is broken, or can't do it on this machine."""

    code = "HFC301"


class DeviceError(HFCompressError, ValueError):
    """A device, device map or loading option that the operation can't work with."""

    code = "HFC303"


class TrainerError(HFCompressError, ValueError):
    """A Trainer is set up in a way that a callback or mixin of this package can't work with."""

    code = "HFC304"


class GroupSizeError(HFCompressError, ValueError):
    """`group_size` does not divide the input width of a weight."""

    code = "HFC401"


class WeightValueError(HFCompressError, ValueError):
    """A weight holds NaN or infinite values, or has no values at all."""

    code = "HFC402"


class UnsupportedModelError(HFCompressError, ValueError):
    """The object given is not a model this operation can work on."""

    code = "HFC403"


class TiedWeightsError(HFCompressError, ValueError):
    """Only one side of a tied weight would be changed."""

    code = "HFC404"


class AlreadyQuantizedError(HFCompressError, ValueError):
    """The model is quantized already."""

    code = "HFC405"


class ModelNotFoundError(HFCompressError, FileNotFoundError):
    """The model id or directory does not exist or has no readable config."""

    code = "HFC406"


class IncompleteLoadError(HFCompressError, RuntimeError):
    """A planned weight was not found in the checkpoint that was read."""

    code = "HFC407"


class PackedWeightError(HFCompressError, RuntimeError):
    """Something tried to write to a packed weight, such as a merge of an adapter."""

    code = "HFC408"


class RowError(HFCompressError, IndexError):
    """A row was looked up that a packed embedding table does not have."""

    code = "HFC409"


class TeacherError(HFCompressError, ValueError):
    """A teacher and a student don't fit: vocabulary, labels, layers or sizes."""

    code = "HFC410"


class CalibrationError(HFCompressError, ValueError):
    """Calibration data is missing, empty, too little, of unknown form, unfit for the model, or given twice."""

    code = "HFC501"


class EvaluationDataError(HFCompressError, ValueError):
    """Evaluation data is missing, empty or of the wrong form."""

    code = "HFC502"


class InputError(HFCompressError, ValueError):
    """No example inputs can be made for this model, or the given ones don't fit."""

    code = "HFC503"


class MeasurementError(HFCompressError, RuntimeError):
    """A measurement gave no usable numbers."""

    code = "HFC601"


class LossError(HFCompressError, FloatingPointError):
    """The training loss is NaN or infinite."""

    code = "HFC602"


class MergeError(HFCompressError, ValueError):
    """Merging an adapter into a compressed model would lose what it has learned."""

    code = "HFC603"


class OutputExistsError(HFCompressError, FileExistsError):
    """The output path is taken and `overwrite` was not given."""

    code = "HFC701"


class CorruptCheckpointError(HFCompressError, ValueError):
    """A checkpoint is unreadable, truncated, inconsistent, or was changed after it was proven."""

    code = "HFC702"


class ProofError(HFCompressError, RuntimeError):
    """What was written does not reload to the same outputs. The output was not created."""

    code = "HFC703"


class WriteError(HFCompressError, OSError):
    """The disk is full or not writable. Nothing was left behind."""

    code = "HFC704"


class CheckpointNotFoundError(HFCompressError, FileNotFoundError):
    """There is no checkpoint at the path."""

    code = "HFC705"


class WorkerError(HFCompressError, RuntimeError):
    """The clean process that proves checkpoints died or answered nonsense."""

    code = "HFC706"


class ResumeError(HFCompressError, ValueError):
    """A checkpoint to resume from lacks training state, or holds that of another configuration."""

    code = "HFC707"


class FormatError(HFCompressError, ValueError):
    """No checkpoint format, or not the one asked for, can hold the plan."""

    code = "HFC801"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A `Did you mean` clause with the names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"Did you mean {' or '.join(repr(found) for found in close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names and how many more there are."""
    everything = list(names)
    shown = ", ".join(everything[:limit])
    return shown + (f" and {len(everything) - limit} more" if len(everything) > limit else "")
