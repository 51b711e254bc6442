"""The one report: what a compression did, what it gained and what it cost, as data.

A reader knows one schema version. Later versions of this package add fields with defaults, so that they still
read old reports; a change that breaks them raises `SCHEMA`.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from .. import _version
from ..checkpoint.record import Proof
from .environment import Environment
from .latency import LatencyComparison
from .quality_results import QualityResult
from .size import DiskBytes

SCHEMA: Final = 1


class _Part(BaseModel):
    # NaN has no JSON; -Infinity (a signal-to-noise ratio of nothing but noise) is written as a string.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Size(_Part):
    """Bytes on disk and in memory, before and after.

    Attributes:
        disk: The checkpoint's files; None if no path was given.
        baseline_disk_weights: The baseline's weights as dense safetensors: every stored tensor once.
        resident: Bytes of the memory that the model's tensors hold here, packed.
        baseline_resident: The same of the baseline.
        stock_resident_before: Bytes of the checkpoint loaded by stock transformers, before its first forward, as
            its proof measured them; None where there is no such proof.
        stock_resident_after: The same after its first forward, which may have decompressed the weights.
    """

    disk: DiskBytes | None = None
    baseline_disk_weights: int
    resident: int
    baseline_resident: int
    stock_resident_before: int | None = None
    stock_resident_after: int | None = None

    @property
    def disk_ratio(self) -> float | None:
        """How many times smaller the weights are on disk; None if not saved."""
        return None if self.disk is None else _ratio(self.baseline_disk_weights, self.disk.weights)

    @property
    def resident_ratio(self) -> float:
        """How many times smaller the model is in memory, here."""
        return _ratio(self.baseline_resident, self.resident)


class SchemeCount(_Part):
    """How much of a model one scheme holds.

    Attributes:
        weights: Number of weights.
        parameters: Number of values; those of tied weights count once.
    """

    weights: int
    parameters: int


class KeptWeight(_Part):
    """A weight that was not compressed.

    Attributes:
        name: Its name without `.weight`.
        parameters: Number of values; 0 for a tied weight after the first.
        reason: Why, in words.
        in_scope: Whether it lowers the coverage.
    """

    name: str
    parameters: int
    reason: str
    in_scope: bool


class Coverage(_Part):
    """How much of the model was compressed.

    Attributes:
        fraction: Compressed values / values in scope, 0 to 1. Heads and embeddings that are kept are out of scope.
        by_scheme: Weights and values per scheme, `kept` included.
        kept: Every weight that was not compressed.
        small_parameters: Values in biases, norms and other one-dimensional parameters, always kept.
    """

    fraction: float
    by_scheme: dict[str, SchemeCount]
    kept: tuple[KeptWeight, ...]
    small_parameters: int = 0

    @property
    def of_all(self) -> float:
        """Compressed values / values of all weights, heads and embeddings included, 0 to 1."""
        total = sum(count.parameters for count in self.by_scheme.values())
        kept = sum(weight.parameters for weight in self.kept)
        return 1 - kept / total if total else 0.0


class Layer(_Part):
    """One compressed weight.

    Attributes:
        name: Its name without `.weight`.
        scheme: Label such as `int4-g64`.
        sqnr_db: Signal-to-quantization-noise ratio in dB, 10·log10(Σw² / Σ(w - ŵ)²); None where it is exact or was
            not measured.
    """

    name: str
    scheme: str
    sqnr_db: float | None = None


class Report(_Part):
    """What `hf_compress.evaluate` found.

    Attributes:
        schema_version: Version of this layout.
        version: Version of hf_compress that measured.
        model: The original: a Hub id, or the name of a local directory; empty for a model made in memory.
        architecture: Class of the model.
        method: Name of the compression method.
        request: The configuration's fields, without data.
        format: Checkpoint format of the result.
        size: Bytes on disk and in memory.
        coverage: What was compressed, and what not and why.
        layers: The compressed weights with their noise, in the model's order.
        kernels: How many packed modules each kernel runs.
        latency: Comparison with the baseline per input, named by its shape; None if not measured.
        quality: Comparison with the baseline on data; None if there was none.
        proof: How the checkpoint was proven; None if no path was given.
        environment: Where it was measured.
        notes: Remarks that a reader of the numbers should know.
    """

    schema_version: Literal[1] = SCHEMA
    version: str = _version.__version__
    model: str
    architecture: str = ""
    method: str
    request: dict[str, Any]
    format: str
    size: Size
    coverage: Coverage
    layers: tuple[Layer, ...] = ()
    kernels: dict[str, int] = {}
    latency: dict[str, LatencyComparison] | None = None
    quality: QualityResult | None = None
    proof: Proof | None = None
    environment: Environment
    notes: tuple[str, ...] = ()


def _ratio(before: int, after: int) -> float:
    """before / after; infinite when nothing is left."""
    return before / after if after else float("inf")
