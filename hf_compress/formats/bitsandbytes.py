"""The layouts of bitsandbytes: NF4 and FP4 in blocks, INT8 per channel. Written and read without the package.

4 bits: `weight` holds two codes per byte, the first in the high half; `absmax`, `quant_map` and the state as JSON lie
beside it. Blocks run over the flattened weight, so they are this package's groups where they divide the inputs.
8 bits: `weight` holds INT8, and `SCB` 127 times each row's scale. GPT-2's `Conv1D` is stored like a linear layer,
outputs × inputs.

Stock transformers replaces every plain linear layer that its config does not name, so that all others are named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from ..core import scheme as schemes
from ..core.errors import CorruptCheckpointError, FormatError
from ..core.plan import DTYPES, Plan, PlanRow
from ..core.registry import FORMATS
from ..core.weights import WeightKind
from ..modules.packed import PackedTensor, from_words, layout_of, to_words
from .base import Limits, take, tie_refusal

NAME = "bitsandbytes"

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' operators accept, on every device."""

ROWS = 32
"""Its kernel for processors with AVX512-BF16 takes multiples of this many outputs, and fails on others."""

TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5),
        *(-0.1666666716337204, -0.25),
    ),
}
"""The values of its codes, in order; its kernels have them built in. NF4: QLoRA, Dettmers et al. 2023, appendix E."""

FORWARD_LIMIT = 0.1
"""Relative limit on outputs of bitsandbytes' 4-bit kernels: on processors with AVX512-BF16 they round inputs and
`absmax` to bfloat16. Measured: at most 0.03 (SmolLM2-135M, 30 layers); 0 on other processors."""

INT8_FORWARD_LIMIT = 0.5
"""Relative limit on outputs of its INT8 kernels, which round inputs to INT8 per token, and columns of values from 6 to
float16. Measured: at most 0.22 (SmolLM2-135M, 30 layers)."""

INPUTS_ROUNDED = "bitsandbytes rounds its inputs to INT8 at run time"

_HELD = (WeightKind.LINEAR, WeightKind.CONV1D)
_DTYPES = ("float32", "bfloat16", "float16")


class BitsAndBytesFormat:
    """The `bitsandbytes` layouts; a checkpoint has one of them."""

    name = NAME
    stock_reader: str | None = NAME
    weights_file: str | None = None

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why a row can't be held, or None."""
        if row.quantization is None:
            return None
        return tie_refusal(row) or _place_refusal(row) or _grid_refusal(row, plan) or _mixture_refusal(row, plan)

    def adapted(self, row: PlanRow) -> PlanRow:
        """INT8 scales are stored 127-fold in float32, and rounded to 8 significant bits to survive that exactly."""
        if row.quantization is None or row.quantization.codebook is not None:
            return row
        reason = row.reason if INPUTS_ROUNDED in row.reason else f"{row.reason}; {INPUTS_ROUNDED}"
        changes: dict[str, Any] = {"reason": reason}
        if row.dtype != "bfloat16":
            args = _args(row).model_copy(update={"scale_dtype": torch.bfloat16})
            changes["quantization"] = row.quantization.model_copy(update={"weights": args})
        return row.model_copy(update=changes)

    def limits(self, plan: Plan) -> Limits:
        """Its kernels round inputs, so that outputs alone would not show a wrong scale: weights are compared too.

        They are bit-equal: 4-bit values are rounded once from float32, like ours. `code * SCB` is exact in float32,
        8 bits times 8 plus the 7 of 127, and times 1/127 rounds back to `code * scale`.
        """
        four_bits = _codebook(plan.quantized[0]) is not None
        return Limits(outputs=FORWARD_LIMIT if four_bits else INT8_FORWARD_LIMIT, weights=0.0)

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What transformers' own config says."""
        first = plan.quantized[0]
        codebook = _codebook(first)
        given: dict[str, Any] = {"load_in_8bit": True}
        if codebook is not None:
            given = {"load_in_4bit": True, "bnb_4bit_quant_type": codebook, "bnb_4bit_compute_dtype": first.dtype}
        values = BitsAndBytesConfig(llm_int8_skip_modules=_skipped(plan), **given).to_dict()
        return {**values, "quant_method": self.name}

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""
        codebook = _codebook(row)
        if codebook is None:
            return [f"{row.name}.{part}" for part in ("weight", "SCB", "weight_format")]
        sides = ("", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{codebook}")
        return [f"{row.name}.weight{side}" for side in sides]

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on disk that belong to packed weights: bytes with their `absmax`, INT8 with its `SCB`."""
        found: set[str] = set()
        for key, value in tensors.items():
            base = key.removesuffix("weight")
            if value.dtype == torch.uint8 and f"{key}.absmax" in tensors:
                found |= {key, *(side for side in tensors if side.startswith((f"{key}.quant_", f"{key}.absmax")))}
            if value.dtype == torch.int8 and f"{base}SCB" in tensors:
                found |= {key, *({f"{base}SCB", f"{base}weight_format"} & set(tensors))}
        return found

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk.

        Raises:
            FormatError: Scales or codebook were changed since the weight was packed, or don't fit the layout.
        """
        _check_unchanged(row, packed)
        codebook = _codebook(row)
        values = _encode_int8(packed) if codebook is None else _encode_4bit(row, packed, codebook)
        return dict(zip(self.keys(row), values, strict=True))

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight.

        Raises:
            CorruptCheckpointError: A tensor is missing, or is not what the plan implies.
        """
        return _decoded(row, [take(tensors, key) for key in self.keys(row)])


def _args(row: PlanRow) -> QuantizationArgs:
    """The weight's grid."""
    return layout_of(row).weights


def _codebook(row: PlanRow) -> schemes.Codebook | None:
    """The kind of the row's codebook; None for INT8."""
    return None if row.quantization is None else row.quantization.codebook


def _place_refusal(row: PlanRow) -> str | None:
    """Why a layer can't be held, or None."""
    if row.kind is WeightKind.EMBEDDING:
        return 'it holds no embeddings; leave out embeddings="int8"'
    if row.kind is WeightKind.EXPERTS:
        return "it holds no fused experts; keep them, or use RTNQuantConfig with compressed-tensors"
    if row.kind not in _HELD or row.owner not in ("Linear", "Conv1D"):
        return f"it holds nn.Linear and Conv1D, not {row.owner}"
    if row.stays_float32:
        return "stock transformers leaves it in float32 for this architecture"
    if row.dtype not in _DTYPES:
        return f"it holds weights of {', '.join(_DTYPES)}, not {row.dtype}"
    return None


def _grid_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why a scheme can't be held, or None."""
    args, codebook = _args(row), _codebook(row)
    if row.quantization is not None and row.quantization.input_activations is not None:
        return 'bitsandbytes rounds inputs itself; use RTNQuantConfig(bits=8, group_size="channel")'
    if codebook is None:
        if args.num_bits != 8 or not args.symmetric or args.strategy != "channel":
            return (
                "its uniform grid is INT8, symmetric, per channel: "
                'RTNQuantConfig(bits=8, group_size="channel"); its 4 bits are NF4: CodebookQuantConfig()'
            )
        asked = plan.request.get("format") == NAME
        return None if asked else f'{INPUTS_ROUNDED}, so that it has to be asked for: format="{NAME}"'
    if codebook not in TABLES or args.num_bits != 4:
        return f"it holds the codebooks nf4 and fp4, not {codebook}"
    size = args.group_size if args.strategy == "group" else None
    if size not in BLOCK_SIZES or row.shape[-1] % size:
        known = ", ".join(str(size) for size in BLOCK_SIZES)
        return f"it holds groups of {known} inputs that divide the layer's; choose group_size=64"
    if row.shape[0] % ROWS:
        return f"bitsandbytes' CPU kernel takes multiples of {ROWS} outputs, not {row.shape[0]}; keep it with skip"
    return None


def _mixture_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why a row can't lie beside the others, or None: the config says one thing for the whole model."""
    first = next(other for other in plan.quantized if other.kind in _HELD)
    if row.scheme != first.scheme:
        return f"it holds one scheme per model, and {first.name} has {first.scheme}"
    if _codebook(row) is not None and row.dtype != first.dtype:
        return f"it computes in one data type, and {first.name} has {first.dtype}, not {row.dtype}"
    return None


def _skipped(plan: Plan) -> list[str]:
    """Names of the layers that stock must not replace, as patterns where the plain name would hit planned ones.

    Stock reads each entry as a regular expression from the start, and as the end of a name.
    """
    planned = [row.module for row in plan.quantized]
    kept = [row.module for row in plan.rows if row.kind in _HELD and row.quantization is None]
    hits = {name: any(not should_convert_module(module, [name]) for module in planned) for name in kept}
    return [f"^{re.escape(name)}$" if hits[name] else name for name in kept]


def _check_unchanged(row: PlanRow, packed: PackedTensor) -> None:
    """Refuse scales and codebooks that would not be read back as they are.

    Raises:
        FormatError: They have another data type or other values than the plan implies.
    """
    scale, codebook = packed.scale, _codebook(row)
    table = None if codebook is None else torch.tensor(TABLES[codebook], device=scale.device)
    if scale.dtype != DTYPES[row.dtype]:
        raise FormatError(
            f"{row.name} was compressed in {row.dtype} and is {scale.dtype} now. Nothing was written.",
            "compress the model in the data type that it will have: from_pretrained(dtype=...)",
        )
    if table is not None and (packed.codebook is None or not _same(packed.codebook, table)):
        raise FormatError(
            f"{row.name} has another codebook than bitsandbytes' {codebook}. Nothing was written.",
            'use format="guarded"',
        )
    if table is None and not torch.equal(scale.bfloat16().to(scale.dtype), scale):
        raise FormatError(
            f"Scales of {row.name} have more than 8 significant bits: they would not come back. Nothing was written.",
            'use format="guarded", or a method whose scales follow the scheme',
        )


def _encode_int8(packed: PackedTensor) -> list[Tensor]:
    """`weight`, `SCB` and `weight_format` (0: row-major)."""
    scb = packed.scale.to(torch.float32).flatten() * 127
    return [packed.codes, scb, torch.tensor(0, dtype=torch.uint8)]


def _encode_4bit(row: PlanRow, packed: PackedTensor, codebook: str) -> list[Tensor]:
    """`weight`, `absmax`, `quant_map` and the state that `QuantState.as_dict(packed=True)` gives."""
    positions = (from_words(packed.codes, 4, row.shape[-1]) + 8).view(torch.uint8).flatten()
    absmax = packed.scale.to(torch.float32).flatten().clone()
    table = torch.tensor(TABLES[codebook], device=packed.codes.device)
    return [(positions[::2] << 4 | positions[1::2]).unsqueeze(1), absmax, table, _state(row, codebook)]


def _state(row: PlanRow, codebook: str) -> Tensor:
    """The state as JSON in bytes."""
    shape = list(row.shape)
    state = {"quant_type": codebook, "blocksize": _args(row).group_size, "dtype": row.dtype, "shape": shape}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _decoded(row: PlanRow, values: list[Tensor]) -> PackedTensor:
    """The packed weight from its tensors, in the order of `keys`."""
    layout, codebook, dtype = layout_of(row), _codebook(row), DTYPES[row.dtype]
    rows, columns = row.shape
    grid = schemes.groups(row.shape, layout.weights)
    if codebook is None:
        weight, scb, order = values
        _check(row, "weight", weight, torch.int8, (rows, columns))
        _check(row, "SCB", scb, torch.float32, (rows,))
        _check(row, "weight_format", order, torch.uint8, ())
        if int(order):
            raise CorruptCheckpointError(f"{row.name}.weight_format is {int(order)}, not 0 for rows.", "save it again")
        return PackedTensor(layout, weight, (scb / 127).to(dtype).view(grid))
    weight, absmax, table, state = values
    _check(row, "weight", weight, torch.uint8, (rows * columns // 2, 1))
    _check(row, "weight.absmax", absmax, torch.float32, (grid[0] * grid[1],))
    _check(row, "weight.quant_map", table, torch.float32, (16,))
    _check_state(row, codebook, table, state)
    halves = torch.stack([weight.flatten() >> 4, weight.flatten() & 15], dim=-1)
    codes = halves.view(torch.int8).sub_(8).view(rows, columns)
    return PackedTensor(layout, to_words(codes, 4), absmax.to(dtype).view(grid), None, table.clone())


def _check(row: PlanRow, part: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Compare a tensor with what the plan implies.

    Raises:
        CorruptCheckpointError: It has another type or shape, or values that are not finite.
    """
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise CorruptCheckpointError(
            f"{row.name}.{part} is {value.dtype} {tuple(value.shape)}, the plan says {dtype} {shape}.",
            "save it again",
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CorruptCheckpointError(f"{row.name}.{part} holds values that are not finite.", "save it again")


def _check_state(row: PlanRow, codebook: str, table: Tensor, state: Tensor) -> None:
    """Compare codebook and state with what the plan implies.

    Raises:
        CorruptCheckpointError: They differ, or the state is no JSON.
    """
    name = f"{row.name}.weight.quant_state"
    _check(row, "weight.quant_state", state, torch.uint8, tuple(state.shape))
    if not _same(table, torch.tensor(TABLES[codebook], device=table.device)):
        raise CorruptCheckpointError(f"{row.name}.weight.quant_map is not the table of {codebook}.", "save it again")
    try:
        found = json.loads(bytes(state.flatten().tolist()))
    except ValueError as error:  # JSON and UTF-8
        raise CorruptCheckpointError(f"{name} can't be read: {error}.", "save it again") from error
    expected = json.loads(bytes(_state(row, codebook).tolist()))
    if found != expected:
        raise CorruptCheckpointError(f"{name} says {found}, the plan says {expected}.", "save it again")


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values."""
    return left.dtype == right.dtype and torch.equal(left, right)


FORMATS.register(BitsAndBytesFormat())
