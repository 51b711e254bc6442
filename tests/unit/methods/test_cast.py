from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compress.core.errors import WeightValueError
from hf_compress.methods.cast import CastConfig
from hf_compress.pipeline.quantize import quantize
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_cast_is_what_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Not `model.to`, which also casts the rotary frequencies."""
    model = quantize(tiny("llama"), CastConfig(dtype=name))
    expected = AutoModelForCausalLM.from_pretrained(tiny_dir("llama", tmp_path), dtype=dtype)
    inputs = tiny_inputs(model)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert torch.equal(output(model, inputs), output(expected, inputs))


def test_overflow_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(WeightValueError, match=r"up_proj.weight has values up to 1e\+06, beyond .* float16"):
        quantize(model, CastConfig(dtype="fp16"))


def test_overflow_leaves_the_model_as_it_was() -> None:
    """`quantize` promises that nothing was changed when it raises."""
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(WeightValueError):
        quantize(model, CastConfig(dtype="fp16"))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert float(model.model.layers[0].mlp.up_proj.weight[0, 0].detach()) == 1e6
