"""`hf_compress.load`: any format we write, kept packed.

The packed tensors are decoded by the format; everything else goes through transformers' own loader, so renames,
ties, data types and generation config are handled there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.config import REQUEST
from ..core.errors import CorruptCheckpointError, UnsupportedModelError, listed
from ..core.packages import require
from ..core.plan import Plan, PlanRow
from ..core.weights import list_weights
from ..formats.base import check_scale_type, format_of, take
from ..formats.guarded import GUARD
from ..modules.packed import PackedTensor
from .foreign import check_measured
from .handover import hand_over
from .record import open_weights, read_config, read_record, weight_files
from .session import LoadSession, release_ties
from .stock import architecture_of, damaged_if_it_fails, load_complete

_FORM = attrgetter("name", "kind", "shape", "transposed", "parts", "kernel")
"""What a row of a plan and the weight that it is for must share."""


class ReadRequest(QuantizationConfigMixin):
    """The request that `load` passes to transformers: packed weights are there already."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        self.quant_method = REQUEST
        self.plan = plan
        self.tensors = tensors

    def __deepcopy__(self, memo: dict[int, object]) -> ReadRequest:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nothing of it is ever stored."""
        return {"quant_method": self.quant_method}

    def session(self, model: PreTrainedModel) -> LoadSession:
        """A load session whose packer decodes instead of quantizing."""
        check_plan(self.plan, model)
        release_ties(model, self.plan)
        layout = format_of(self.plan)
        tensors = renamed(self.tensors, model)
        check_claimed(self.plan, self.tensors, tensors)
        noise = {row.name: row.sqnr_db for row in self.plan.rows}

        def decode(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
            packed = layout.decode(row, tensors)
            check_scale_type(row, packed)
            check_followers(self.plan, row, packed, tensors)
            return packed, noise[row.name]

        return LoadSession(self.plan, decode)


def load_packed(path: Path) -> PreTrainedModel:
    """A model from a checkpoint of ours, with packed weights, on the CPU.

    Args:
        path: The checkpoint directory.

    Raises:
        CheckpointNotFoundError: There is no checkpoint of ours.
        CorruptCheckpointError: It is damaged or inconsistent.
        UnsupportedModelError: transformers has no such architecture.
    """
    record = read_record(path)
    check_guard(path, record.plan)
    config, architecture = stored_config(path)
    if record.plan.backend:
        return _load_foreign(path, record.plan, architecture)
    tensors = read_tensors(path)
    layout = format_of(record.plan)
    packed = layout.owned(tensors) if record.plan.quantized else set()
    packed |= {key for row in record.plan.quantized if row.tied_to for key in layout.keys(row) if key in tensors}
    placeholder = torch.empty(0)
    state = {key: value for key, value in tensors.items() if key not in packed}
    state |= dict.fromkeys((row.key for row in record.plan.quantized if not row.tied_to), placeholder)
    request = ReadRequest(record.plan, {key: tensors[key] for key in packed})
    planned = request if record.plan.quantized else None
    model = load_state(path, architecture, config, state, planned, closed=True)
    if not record.plan.quantized:
        hand_over(model, record.plan)
    return model


def load_state(
    path: Path,
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    request: ReadRequest | None,
    **options: Any,
) -> PreTrainedModel:
    """A complete model from tensors, through transformers' loader.

    Args:
        path: Where they come from; its generation config is read too.
        architecture: The model's class.
        config: Its config, without quantization.
        state: Dense tensors by name, and a placeholder for each packed one.
        request: Decodes the packed ones; None where there are none.
        **options: Further arguments of `load_complete`.

    Raises:
        CorruptCheckpointError: Tensors are missing or don't fit.
    """
    with damaged_if_it_fails(str(path)):
        model = load_complete(
            architecture, None, config=config, state_dict=state, quantization_config=request, **options
        )
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    model.config.name_or_path = str(path)
    return model


def _load_foreign(path: Path, plan: Plan, architecture: type[PreTrainedModel]) -> PreTrainedModel:
    """A model that another library quantized, through transformers' own loader, complete and as planned."""
    require(str(plan.backend))
    with damaged_if_it_fails(str(path)):
        model = load_complete(architecture, path, device_map="cpu")
        try:
            hand_over(model, check_measured(plan, model))
        except UnsupportedModelError as error:
            raise CorruptCheckpointError(f"{path}: {error.message}", "save the model again") from error
    return model


def check_plan(plan: Plan, model: PreTrainedModel) -> None:
    """Compare the plan of a checkpoint with the model that its config describes.

    Raises:
        CorruptCheckpointError: A quantized weight does not exist in the model, or has another form.
    """
    weights = {(weight.module, weight.parameter): weight for weight in list_weights(model)}
    for row in plan.quantized:
        weight = weights.get((row.module, row.parameter))
        if weight is None or _FORM(row) != _FORM(weight):
            raise CorruptCheckpointError(
                f"The plan's row for {row.name} ({row.parameter}: {row.kind} {row.shape}) does not fit the model: "
                f"{type(model).__name__} has {'none' if weight is None else f'{weight.kind} {weight.shape}'} there.",
                "save the model again",
            )


def check_claimed(plan: Plan, tensors: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Refuse packed tensors that no row of the plan reads: the plan is not the one that they were written by.

    Args:
        plan: The plan.
        tensors: Packed tensors of the checkpoint, by name on disk.
        named: The same tensors, also under the model's names.

    Raises:
        CorruptCheckpointError: There are some.
    """
    layout = format_of(plan)
    read = {id(named[key]) for row in plan.quantized for key in layout.keys(row) if key in named}
    left = sorted(key for key, value in tensors.items() if id(value) not in read)
    if left:
        raise CorruptCheckpointError(f"The plan has no use for {listed(left)}.", "save the model again")


def check_followers(plan: Plan, row: PlanRow, packed: PackedTensor, tensors: Mapping[str, Tensor]) -> None:
    """Compare what a checkpoint holds for the weights that are tied to one with what that one implies.

    Raises:
        CorruptCheckpointError: It is missing, or something else.
    """
    for other in plan.followers.get(row.name, ()):
        for key, value in format_of(plan).encode(other, packed).items():
            found = take(tensors, key)
            if found.dtype != value.dtype or not torch.equal(found, value):
                raise CorruptCheckpointError(
                    f"{key} differs from that of {row.name}, to which {other.name} is tied.", "save the model again"
                )


def check_guard(path: Path, plan: Plan) -> None:
    """A guarded plan belongs to a guarded config; anything else was saved over it.

    Raises:
        CorruptCheckpointError: The config is not the guarded one.
    """
    stored = read_config(path).get("quantization_config")
    guarded = isinstance(stored, dict) and stored.get("format") == GUARD
    if guarded != (plan.format == "guarded"):
        raise CorruptCheckpointError(
            f"{path} holds weights of another save than its record: config.json and the plan disagree on the guard.",
            "save the model again, into an empty directory",
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, mapped from their files.

    Raises:
        CorruptCheckpointError: There are none, or a file is damaged.
    """
    files = weight_files(path)
    if not files:
        raise CorruptCheckpointError(f"{path} has no weights file.", "save the model again")
    return read_files(files)


def read_files(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of weights files, mapped.

    Raises:
        CorruptCheckpointError: A file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        with open_weights(file) as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def stored_config(path: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The model's config without quantization, and its class."""
    with damaged_if_it_fails(str(path / "config.json")):
        config = AutoConfig.from_pretrained(path)
    kind = architecture_of(config)
    if kind is None:
        raise UnsupportedModelError(
            f"{path / 'config.json'} names the architectures {config.architectures}; transformers "
            f"{transformers.__version__} has none of them for a {type(config).__name__}.",
            "install the version of transformers that has it",
        )
    if "quantization_config" in vars(config):
        del config.quantization_config
    return config, kind


def renamed(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors under the model's own names, as transformers would rename them while loading."""
    renames = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return {apply_renamings(key, renames): value for key, value in tensors.items()}
