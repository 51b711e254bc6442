"""Calibrated methods: from data to a packed model, of a live model or block by block from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..apply.swapping import set_changed
from ..calibration.block import Compressor, Finished
from ..calibration.data import CalibrationSet, check_data, is_generated, prepare
from ..calibration.results import MemoryResults, Results
from ..calibration.runner import Pass, split
from ..calibration.sources import LiveSource, WeightSource
from ..checkpoint.session import LoadSession, Packer, release_ties
from ..checkpoint.shards import ShardSource, safetensors_files
from ..checkpoint.stock import load_source
from ..core.config import REQUEST, Calibration, QuantConfig
from ..core.plan import Plan, PlanRow
from ..modules.packed import PackedTensor

Progress = Callable[[int, int], None]


def memory_results(plan: Plan) -> Results:
    """Results that are kept in memory, for whatever plan."""
    return MemoryResults()


def calibrate_live(
    model: nn.Module, plan: Plan, config: QuantConfig, progress: Progress | None = None
) -> tuple[Plan, Finished]:
    """Calibrate and quantize a live model, which stays as it is.

    Args:
        model: The model, dense.
        plan: Its plan.
        config: The request, with the data.
        progress: Called with the number of weights done and the number planned.

    Returns:
        The plan with what is recorded of the data, and what becomes of the model.

    Raises:
        CalibrationError: The data is missing, unusable, or does not reach a planned weight.
        HFCompressError: The method's own.
    """
    where = model.config.name_or_path if isinstance(model, PreTrainedModel) else None
    data = prepare(config.calibration, model, where or None)
    return _calibrate(LiveSource(model), plan, config, data, memory_results, progress)


def calibrate_source(
    model_id: str | Path,
    plan: Plan,
    config: QuantConfig,
    architecture: type[PreTrainedModel],
    results: Callable[[Plan], Results],
    progress: Progress | None = None,
    owned: bool = False,
) -> PreTrainedModel:
    """Calibrate and quantize the model of an id or directory, one dense block in memory at a time.

    Args:
        model_id: Hub id or directory.
        plan: Its plan.
        config: The request, with the data.
        architecture: The model's class.
        results: Where finished blocks are kept, and found again by a run that goes on from them; made from the plan
            once it tells which data is used.
        progress: Called with the number of weights done and the number planned.
        owned: Whether the model's packed weights are copies of the results, which may be gone afterwards.

    Returns:
        The packed model.

    Raises:
        CalibrationError: The data is missing, unusable, or does not reach a planned weight.
        HFCompressError: The method's own, or the loader's.
    """
    source = _source(model_id, config, architecture)
    data = _data(model_id, config, architecture, source)
    made, finished = _calibrate(source, plan, config, data, results, progress)

    def find(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
        packed = finished.packed[row.name]
        return (packed.clone() if owned else packed), finished.sqnr[row.name]

    model = load_source(architecture, model_id, quantization_config=ResultRequest(made, find))
    set_changed(model, finished.changed)
    return model


def _source(model_id: str | Path, config: QuantConfig, architecture: type[PreTrainedModel]) -> WeightSource:
    """Shards where blocks are compressed in order; else the whole model, mapped from its files.

    A method that only looks at the float model keeps no activations between blocks then.
    """
    if _compressor(config).sequential and safetensors_files(model_id):  # others can't be read in parts
        return ShardSource(architecture, model_id)
    return LiveSource(load_source(architecture, model_id))


def _data(
    model_id: str | Path, config: QuantConfig, architecture: type[PreTrainedModel], source: WeightSource
) -> CalibrationSet:
    """The batches; a model that makes them itself is loaded for that, mapped from its files, and let go again."""
    request = config.calibration or Calibration()
    if isinstance(source, LiveSource) or not is_generated(request):
        return prepare(request, source.model, model_id)
    check_data(request, source.model)
    return prepare(request, load_source(architecture, model_id), model_id)


def _compressor(config: QuantConfig) -> Compressor:
    """What compresses the blocks."""
    if config.spec.compressor is None:
        raise ValueError(f"the method {config.method!r} needs no data")
    return config.spec.compressor(config.fields)


def _calibrate(
    source: WeightSource,
    plan: Plan,
    config: QuantConfig,
    data: CalibrationSet,
    results: Callable[[Plan], Results],
    progress: Progress | None,
) -> tuple[Plan, Finished]:
    """The pass over the blocks of a source."""
    compressor = _compressor(config)
    made = plan.model_copy(update={"calibration": data.record})
    batches = split(data.batches, compressor.call_tokens)
    return made, Pass(source, made, compressor, batches, results(made), data.record.seed, progress).run()


class ResultRequest(QuantizationConfigMixin):
    """The request that is passed to transformers where packed weights are kept elsewhere: they only need their places.

    Args:
        plan: The plan to carry out.
        packer: Gives the packed weight of a row and its noise in dB; takes the dense one too.
        progress: Called with the number of weights done and the number planned.
    """

    def __init__(self, plan: Plan, packer: Packer, progress: Progress | None = None) -> None:
        self.quant_method = REQUEST
        self.plan = plan
        self.packer = packer
        self.progress = progress

    def __deepcopy__(self, memo: dict[int, object]) -> ResultRequest:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nothing of it is ever stored."""
        return {"quant_method": self.quant_method}

    def session(self, model: PreTrainedModel) -> LoadSession:
        """A load session with that packer."""
        release_ties(model, self.plan)
        return LoadSession(self.plan, self.packer, self.progress)
