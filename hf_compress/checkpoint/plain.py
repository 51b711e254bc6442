"""Plain modules on disk: no config rebuilds them, so their checkpoint is the guarded form of the whole state dict.

`hf_compress.safetensors` holds it, and stock transformers refuses the `config.json` beside it. `skeleton` reads it,
`plain_proof` proves it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.errors import ConfigError, CorruptCheckpointError, UnsupportedModelError, listed
from ..core.plan import Plan
from ..formats.base import check_scale_type, encode_model, format_of
from ..modules.packed import PackedTensor
from .load import read_tensors
from .record import KEY, open_weights, read_config, record_of, sort_metadata, weight_files

_MODULE = "hf_compress_module"
_SHARED = "hf_compress_shared"


def is_plain(path: Path) -> bool:
    """Whether a checkpoint holds a plain module.

    Raises:
        CorruptCheckpointError: Its config can't be read.
    """
    return _MODULE in read_config(path)


def class_name(path: Path) -> str:
    """Name of the class of a plain module in a checkpoint.

    Raises:
        CorruptCheckpointError: Its config can't be read.
    """
    return str(read_config(path).get(_MODULE))


def needs_skeleton(path: Path) -> ConfigError:
    """The error for reading a plain module without a skeleton."""
    name = class_name(path)
    return ConfigError(
        f"{path} holds a plain module, {name}; only its code can build it.",
        f'build one as it was saved and pass it: hf_compress.load("{path}", model={name}(...))',
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before packing."""
    found: type[nn.Module] = vars(type(module)).get("hfc_base", type(module))
    return found


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, saved or not, under every name that they have."""
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: value for pairs in named for name, value in pairs}


def check_storable(module: nn.Module) -> None:
    """Refuse state that no checkpoint of a plain module can hold.

    Raises:
        UnsupportedModelError: Something in the state dict is no parameter or buffer, or safetensors can't hold it.
    """
    state, held = module.state_dict(), named_tensors(module)
    foreign = [name for name in state if name not in held]
    if foreign:
        raise UnsupportedModelError(
            f"{type(module).__name__} keeps state that is no parameter or buffer: {listed(foreign)}.",
            "turn it into buffers; a checkpoint holds parameters and buffers only",
        )
    obstacles = {name: _obstacle(value) for name, value in state.items()}
    odd = [f"{name} ({obstacle})" for name, obstacle in obstacles.items() if obstacle]
    if odd:
        raise UnsupportedModelError(
            f"{type(module).__name__} has tensors that a safetensors file can't hold: {listed(odd)}.",
            "make them dense, with values of an ordinary type, or register them with persistent=False",
        )


def stored_bytes(module: nn.Module) -> int:
    """Bytes that the state dict of a module takes on disk, about; `check_storable` lets it pass."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return sum({id(value): value.numel() * value.element_size() for value in state.values()}.values())


def write_plain(module: nn.Module, plan: Plan, folder: Path) -> None:
    """Write a packed plain module, one that `check_storable` lets pass.

    Args:
        module: The module.
        plan: Its plan, of the guarded format.
        folder: An existing directory.
    """
    layout = format_of(plan)
    tensors, shared = _stored(encoded(module, plan))
    metadata = {"format": "pt", KEY: record_of(module, plan).model_dump_json(), _SHARED: json.dumps(shared)}
    file = folder / str(layout.weights_file)
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)
    config = {_MODULE: original_class(module).__name__, "quantization_config": layout.quantization_config(plan)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def encoded(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors to write, on the CPU."""
    return {name: value.detach().cpu() for name, value in encode_model(module, plan, format_of(plan)).items()}


def read_plain(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, shared ones under each of their names.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    tensors = read_tensors(path)
    for file in weight_files(path):
        with open_weights(file) as opened:
            text = (opened.metadata() or {}).get(_SHARED, "{}")
        tensors |= {name: tensors[source] for name, source in _shared_names(file, text, tensors).items()}
    return tensors


def decoded(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """Every packed weight, by its row's name.

    Raises:
        CorruptCheckpointError: One is missing or has another form.
    """
    layout = format_of(plan)
    packed = {row.name: layout.decode(row, tensors) for row in plan.quantized if row.tied_to is None}
    for row in plan.quantized:
        if row.tied_to is None:
            check_scale_type(row, packed[row.name])
    return packed


def _obstacle(value: Tensor) -> str:
    """Why safetensors can't hold a tensor, or empty."""
    if value.layout is not torch.strided:
        return str(value.layout)
    if value.is_meta:
        return "on the meta device"
    if value.is_quantized or value.is_nested or is_traceable_wrapper_subclass(value):
        return f"{type(value).__name__} of {value.dtype}"
    try:
        save({"": torch.empty(0, dtype=value.dtype)})
    except KeyError:
        return str(value.dtype)
    return ""


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, and the names of those that are the same as an earlier one."""
    seen: dict[tuple[object, ...], str] = {}
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, value in sorted(tensors.items()):
        whole = value.resolve_conj().resolve_neg()
        place = (whole.data_ptr(), whole.shape, whole.stride(), whole.dtype) if whole.numel() else (name,)
        if place in seen:
            shared[name] = seen[place]
        else:
            seen[place] = name
            stored[name] = whole.contiguous().clone()
    return stored, shared


def _shared_names(file: Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that lie in a file under another name.

    Raises:
        CorruptCheckpointError: The text says something else.
    """
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or any(source not in tensors for source in map(str, names.values())):
        raise CorruptCheckpointError(
            f"{file} names no tensors of its own in the metadata {_SHARED}: {text[:60]}.", "save the module again"
        )
    return names
