"""Stock backends under the contract: bitsandbytes and torchao, through transformers' own quantizers.

Planned on the meta device with the stock quantizer's own preprocessing, so that the plan says what it really does;
measured after loading, so that it says what was really done.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint.foreign import Foreign, check_measured, foreign_row, method_name
from ...checkpoint.handover import hand_over
from ...checkpoint.stock import load_source
from ...core.build import check_coverage
from ...core.config import QuantConfig, QuantFields
from ...core.errors import (
    BackendError,
    ConfigError,
    HFCompressError,
    TiedWeightsError,
    UnsupportedModelError,
    first_line,
    listed,
)
from ...core.packages import IMPORT_ERRORS, require
from ...core.plan import Plan, PlanRow
from ...core.weights import Weight, list_weights, small_parameters
from . import bitsandbytes, skipping, torchao
from .protocol import Backend

MIN_COVERAGE: float = QuantFields.model_fields["min_coverage"].default
"""The default of `min_coverage`, as of our own configurations."""

INSTEAD = {
    "awq": "hf_compress.HQQQuantConfig(bits=4)",
    "gptq": "hf_compress.HQQQuantConfig(bits=4)",
    "hqq": "hf_compress.HQQQuantConfig(bits=4)",
    "quanto": "hf_compress.RTNQuantConfig(bits=8)",
}
"""What to use instead of another library's configuration, by `quant_method`."""


def backend_of(config: object) -> Backend | None:
    """The backend of a configuration of transformers; None for one that is not transformers' (ours included).

    Raises:
        ConfigError: It is of a library that is not supported here.
    """
    if isinstance(config, QuantConfig) or not isinstance(config, QuantizationConfigMixin):
        return None
    if isinstance(config, BitsAndBytesConfig):
        return bitsandbytes.BACKEND
    if isinstance(config, TorchAoConfig):
        return torchao.BACKEND
    name = method_name(config)
    raise ConfigError(
        f"{type(config).__name__} is not supported; of transformers' configurations, BitsAndBytesConfig and "
        "TorchAoConfig are.",
        f"use {INSTEAD.get(name, 'hf_compress.RTNQuantConfig(bits=4)')}",
    )


def refuse_live(model: nn.Module, config: object) -> NoReturn:
    """transformers quantizes for other libraries only while it loads.

    Raises:
        UnsupportedModelError: Always, with the line to paste.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A {type(config).__name__} is carried out while transformers loads a model, and this "
            f"{type(model).__name__} is none of transformers.",
            "model = hf_compress.quantize(model, hf_compress.RTNQuantConfig(bits=4))",
        )
    name = str(model.config.name_or_path)
    call = f'model = hf_compress.quantize("{name or "DIR"}", config)'
    raise UnsupportedModelError(
        f"A {type(config).__name__} is carried out while a model loads, and this {type(model).__name__} is loaded.",
        call if name else f'model.save_pretrained("DIR"); {call}',
    )


def check_minimum(minimum: object) -> float:
    """The smallest coverage accepted.

    Raises:
        ConfigError: It is no fraction.
    """
    if minimum is None:
        return MIN_COVERAGE
    if isinstance(minimum, bool) or not isinstance(minimum, int | float) or not 0 <= minimum <= 1:
        raise ConfigError(f"min_coverage is {minimum!r}.", "give a fraction from 0 to 1, such as min_coverage=0.5")
    return float(minimum)


@torch.no_grad()
def plan_stock(model: PreTrainedModel, config: QuantizationConfigMixin, backend: Backend, minimum: float) -> Plan:
    """What a library would do to every weight.

    Args:
        model: The dense model on meta; used up.
        config: The library's configuration in transformers; not changed.
        backend: The library.
        minimum: Smallest coverage accepted, 0 to 1.

    Raises:
        BackendError: The library is absent, broken, or can't do it on this machine.
        ConfigError: The configuration asks for nothing.
        PatternError: A name in its skip list matches nothing.
        TiedWeightsError: Only one side of a tied weight would be quantized.
        NothingToQuantizeError, CoverageError: As their names say.
    """
    require(backend.library)
    backend.check(config)
    given = copy.deepcopy(config)
    weights = list_weights(model)
    skips = skipping.skips_of(model, given, backend)
    small = small_parameters(model)
    with _in_our_errors(backend.library, type(given).__name__), torch.random.fork_rng(devices=[]):
        quantizer = AutoHfQuantizer.from_config(given, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        devices = quantizer.update_device_map(None) or {"": "cpu"}
        quantizer.preprocess_model(model=model, device_map=devices, checkpoint_files=None)
        made = {weight.key: _made(weight, model, quantizer, backend, skips) for weight in weights}
    rows = tuple(foreign_row(weight, made[weight.key], "in scope") for weight in weights)
    _check_ties(rows, skips)
    backend.check_machine(rows, model, skips)
    check_coverage(rows, minimum, type(model).__name__, backend.library, backend.instead(rows))
    return Plan(
        method=backend.library,
        request={**json.loads(json.dumps(given.to_dict(), default=str)), "min_coverage": minimum},
        format=backend.library,
        rows=rows,
        small_parameters=small,
        notes=(*skipping.notes(weights, rows, skips), *backend.notes(rows)),
    )


def _made(
    weight: Weight, model: PreTrainedModel, quantizer: Any, backend: Backend, skips: skipping.Skips
) -> Foreign | str:
    """What the library makes of a weight, or why it stays."""
    if not quantizer.param_needs_quantization(model, weight.key):
        return backend.unhandled(weight) or skips.reason(weight)
    return backend.made(weight, model, quantizer)


def quantize_stock(model_id: str | Path, plan: Plan, config: Any, architecture: type[PreTrainedModel]) -> Any:
    """Load and quantize with transformers, and check that what was planned was done.

    Args:
        model_id: Id or directory.
        plan: Its plan.
        config: The library's configuration in transformers; not changed.
        architecture: The model's class.

    Raises:
        BackendError: The library did something else, or failed.
        HFCompressError: The checkpoint is incomplete or damaged.
    """
    library = str(plan.backend)
    model = load_source(architecture, model_id, quantization_config=copy.deepcopy(config))
    try:
        measured = check_measured(plan, model)
    except UnsupportedModelError as error:
        raise BackendError(
            f"{library} did something else than its plan: {error.message}", "report this with the model's config"
        ) from error
    differing = [new.name for new, old in zip(measured.rows, plan.rows, strict=True) if new != old]
    if differing:
        raise BackendError(
            f"{library} takes other bytes than planned for {listed(differing, 3)} ({len(differing)} weights).",
            "report this with the model's config",
        )
    hand_over(model, measured)
    return model


@contextmanager
def _in_our_errors(library: str, config: str) -> Iterator[None]:
    """Whatever the library or transformers says against the request, in one short error."""
    try:
        yield
    except HFCompressError:
        raise
    except IMPORT_ERRORS as error:
        raise BackendError(
            f"{library} can't carry out this {config} here: {first_line(error).rstrip('.')}. No data was read.",
            "choose another configuration, or hf_compress.RTNQuantConfig(bits=4)",
        ) from error


def _check_ties(rows: Sequence[PlanRow], skips: skipping.Skips) -> None:
    """A tied weight is stored once: it can't be quantized through one name only."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        source = by_name.get(row.tied_to or "")
        if source is not None and (row.backend or source.backend):
            raise TiedWeightsError(
                f"{row.name} shares its values with {source.name}: one is planned as {row.scheme}, the other as "
                f"{source.scheme}.",
                f"keep both: {skips.keeping_tied([row.module, source.module])}",
            )
