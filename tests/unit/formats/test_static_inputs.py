"""Grids of inputs on disk: both layouts that hold them, and what is refused of damaged ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compress.core.errors import CorruptCheckpointError
from hf_compress.core.plan import PlanRow
from hf_compress.formats.base import CheckpointFormat, check_scale_type, format_of
from hf_compress.methods.int8_static import Int8StaticQuantConfig
from hf_compress.modules.packed import PackedTensor, layout_of
from hf_compress.pipeline.planning import plan
from tests._utils.packing import codes_of
from tests._utils.tiny import tiny

PREFIX = {"compressed-tensors": "{row.name}.", "guarded": "{row.key}_"}


def prepared(layout: str, symmetric: bool) -> tuple[CheckpointFormat, PlanRow, PackedTensor, str]:
    made = plan(tiny("bert"), Int8StaticQuantConfig(symmetric_inputs=symmetric, format=layout))
    row = made.quantized[0]
    zero = None if symmetric else torch.tensor([-7], dtype=torch.int8)
    scale = torch.linspace(0.01, 0.02, row.shape[0]).unsqueeze(-1)
    packed = PackedTensor(
        layout_of(row), codes_of(row.shape, 8), scale, input_scale=torch.tensor([0.5]), input_zero_point=zero
    )
    return format_of(made), row, packed, PREFIX[layout].format(row=row)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", list(PREFIX))
def test_decode_undoes_encode(layout: str, symmetric: bool) -> None:
    written, row, packed, prefix = prepared(layout, symmetric)
    tensors = written.encode(row, packed)
    assert sorted(tensors) == sorted(written.keys(row))
    assert written.owned(tensors) == set(tensors)
    assert (f"{prefix}input_zero_point" in tensors) is not symmetric
    again = written.decode(row, tensors).parts()
    assert again.keys() == packed.parts().keys()
    assert all(torch.equal(value, again[part]) for part, value in packed.parts().items())


@pytest.mark.parametrize("layout", list(PREFIX))
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("input_scale", None),
        ("input_scale", torch.tensor([0.0])),
        ("input_scale", torch.tensor([-1.0])),
        ("input_scale", torch.tensor([float("nan")])),
        ("input_scale", torch.tensor([float("inf")])),
        ("input_scale", torch.tensor([1.0, 2.0])),
        ("input_scale", torch.tensor([1])),
        ("input_zero_point", None),
        ("input_zero_point", torch.tensor([3], dtype=torch.int32)),
        ("input_zero_point", torch.tensor([3, 4], dtype=torch.int8)),
    ],
)
def test_damaged_grids_are_refused(layout: str, part: str, value: Tensor | None) -> None:
    written, row, packed, prefix = prepared(layout, symmetric=False)
    tensors = dict(written.encode(row, packed))
    del tensors[f"{prefix}{part}"]
    if value is not None:
        tensors[f"{prefix}{part}"] = value
    with pytest.raises(CorruptCheckpointError, match=part.replace("_", ".")):
        written.decode(row, tensors)


@pytest.mark.parametrize("layout", list(PREFIX))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scale_of_another_type_is_refused(layout: str, dtype: torch.dtype) -> None:
    """As for weights' scales: it would change the type of what the layer computes."""
    written, row, packed, prefix = prepared(layout, symmetric=False)
    tensors = dict(written.encode(row, packed))
    check_scale_type(row, written.decode(row, tensors))
    tensors[f"{prefix}input_scale"] = tensors[f"{prefix}input_scale"].to(dtype)
    with pytest.raises(
        CorruptCheckpointError, match=f"The input scale of {row.name} is {dtype}, the plan says float32"
    ):
        check_scale_type(row, written.decode(row, tensors))


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_stock_is_told(symmetric: bool) -> None:
    made = plan(tiny("bert"), Int8StaticQuantConfig(symmetric_inputs=symmetric))
    config = format_of(made).quantization_config(made)
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["symmetric"]) == (False, "tensor", symmetric)
    assert config["format"] == "int-quantized"
