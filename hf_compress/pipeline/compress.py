"""`hf_compress.compress`: from an id or directory to a proven checkpoint, resumable, with bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..apply.packing import pack_weight
from ..apply.planning import check_config, plan_model, refuse_trained
from ..apply.swapping import announce
from ..calibration.block import Finished
from ..calibration.results import Results
from ..checkpoint.atomic import check_output, disk_errors, ensure_space, recover
from ..checkpoint.record import Proof
from ..checkpoint.results_store import has_results, open_store, remove_leftover, remove_store, signature_of
from ..checkpoint.save import Saveable, output_path, save
from ..checkpoint.session import Packer
from ..checkpoint.shards import safetensors_files
from ..checkpoint.stock import load_source
from ..checkpoint.worker import CleanWorker
from ..core.config import QuantConfig
from ..core.errors import CalibrationError, UnsupportedModelError, WeightValueError
from ..core.plan import Plan, PlanRow
from ..modules.packed import PackedTensor
from .calibrate import ResultRequest, calibrate_source
from .planning import Request, meta_model, model_class, model_config
from .quantize import quantize, with_calibration
from .recipes import load_config

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def compress(
    model_id: str | Path,
    config: Request | str | Path,
    out: str | Path,
    calibration: Any = None,
    *,
    tokenizer: Saveable | None = None,
    overwrite: bool = False,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    worker: CleanWorker | None = None,
) -> Proof:
    """Compress a model from disk to disk, and prove it.

    Weights are read one after the other (of calibrated methods, one block after the other) and results are written as
    they come, into `.OUT.partial` beside the output; neither the dense nor the packed model is ever in memory of its
    own. After a kill the same call goes on where it was and gives the same bytes. Once proven, `.OUT.partial` is gone.

    Args:
        model_id: A Hub id or directory, with weights in safetensors files; others are loaded at once.
        config: The request, such as `RTNQuantConfig(bits=4)`, or a recipe: a packaged name or a file.
        out: Output directory.
        calibration: Calibration data for methods that need it; not together with `config.calibration`.
        tokenizer: Tokenizer or processor to save beside the model.
        overwrite: Replace an existing checkpoint, and unfinished results of another request.
        memory_limit: Bytes that the proof may use, by default what is free; with less than the dense model takes it is
            truncated.
        progress: Called with the number of weights done and the number planned.
        worker: A clean process to reuse for the proof; started for this call by default.

    Returns:
        The proof, which is also in `hf_compress.json`.

    Raises:
        OutputExistsError: The output is taken, or there are unfinished results of another request.
        WeightValueError, CalibrationError: Weights or data are refused; results of this call are deleted.
        HFCompressError: Others of `quantize` and `save`; what was finished stays for the next call.
    """
    target, request = output_path(out), _request(config)
    if isinstance(model_id, nn.Module):
        raise UnsupportedModelError(
            f"compress works from disk to disk, got a live {type(model_id).__name__}.",
            "pass its id or directory, or use hf_compress.quantize and hf_compress.save",
        )
    tidy(target)
    check_output(target, overwrite)
    model_config(model_id)
    files = safetensors_files(model_id) if isinstance(request, QuantConfig) and request.load_dtype is None else []
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "overwrite": overwrite,
        "free_bytes": memory_limit,
        "worker": worker,
    }
    if not files or not isinstance(request, QuantConfig):
        return save(quantize(model_id, request, calibration, progress), target, **options)
    check_config(request)
    return _streamed(model_id, with_calibration(request, calibration), target, files, progress, options)


def _request(config: Request | str | Path) -> Request:
    """What is asked for, out of a recipe if it is one.

    Raises:
        ConfigError: The recipe is not valid, or the method trains.
    """
    request = load_config(config) if isinstance(config, str | Path) else config
    if isinstance(request, QuantConfig):
        refuse_trained(request)
    return request


def partial_directory(out: Path) -> Path:
    """Where unfinished results of an output are: `.NAME.partial` beside it."""
    return out.parent / f".{out.name}.partial"


def tidy(out: Path) -> None:
    """Put back or delete what a killed run left beside an output; unfinished results stay.

    Raises:
        WriteError: A previous output is there but can't be renamed back.
    """
    recover(out)
    remove_leftover(partial_directory(out), out)


def _streamed(
    model_id: str | Path,
    request: QuantConfig,
    target: Path,
    files: list[Path],
    progress: Progress | None,
    options: dict[str, Any],
) -> Proof:
    """Quantize with a store, save, prove, delete the store."""
    directory = partial_directory(target)
    config = model_config(model_id)
    architecture = model_class(config, model_id)
    plan = plan_model(meta_model(model_id), request)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    ensure_space(target, sum(row.planned_bytes for row in plan.quantized))
    announce(plan)
    with ExitStack() as opened:

        def results(made: Plan) -> Results:
            signature = signature_of(files, config, made)
            begun = has_results(directory)
            store = opened.enter_context(open_store(directory, signature, made, options["overwrite"]))
            if not begun:
                refused.enter_context(_removed_if_refused(directory))
            return store

        with ExitStack() as refused:
            if request.spec.needs_data:
                model = calibrate_source(model_id, plan, request, architecture, results, progress)
            else:
                made = ResultRequest(plan, _weight_by_weight(plan, results(plan)), progress)
                model = load_source(architecture, model_id, quantization_config=made)
        proof = save(model, target, **options)
        del model
        remove_store(directory)
    return proof


@contextmanager
def _removed_if_refused(directory: Path) -> Iterator[None]:
    """Delete results where weights or data are refused: the same call would be refused again."""
    try:
        yield
    except (CalibrationError, WeightValueError):
        remove_store(directory)
        raise


def _weight_by_weight(plan: Plan, results: Results) -> Packer:
    """What packs one weight after the other into a store, unless it is there.

    A weight that comes twice, under the names of a tie, is packed twice, so that the load session can compare them.
    """
    served: set[str] = set()

    def pack(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
        finished = None if row.name in served else results.get(row.name)
        if finished is None:
            packed, noise = pack_weight(row, value, plan.method)
            if row.name in served:
                return packed, noise
            finished = results.put(row.name, Finished({row.name: packed}, {row.name: noise}), {})
        served.add(row.name)
        return finished.packed[row.name], finished.sqnr[row.name]

    return pack
