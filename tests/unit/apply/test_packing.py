from __future__ import annotations

import pytest
import torch

import hf_compress as hfc
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import WeightValueError
from tests._utils.tiny import tiny
from tests.conformance.helpers import same_states


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (hfc.RTNQuantConfig(group_size=32), torch.float32),
        (hfc.RTNQuantConfig(group_size=32), torch.bfloat16),
        (hfc.RTNQuantConfig(group_size=32, symmetric=False, format="guarded"), torch.float16),
        (hfc.HQQQuantConfig(group_size=32, symmetric=False, format="guarded"), torch.float16),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else value.method,
)
def test_weight_whose_packed_form_overflows_is_refused(config: QuantConfig, dtype: torch.dtype) -> None:
    """Scale and code are finite, their product is not: nothing measures the noise, and nothing is changed."""
    model, twin = (tiny("llama").to(dtype) for _ in range(2))
    for one in (model, twin):
        with torch.no_grad():
            one.model.layers[0].mlp.up_proj.weight[0, 0] = -torch.finfo(dtype).max
    with pytest.raises(WeightValueError, match=f"range of .*up_proj is too wide for {dtype}: a code times") as caught:
        hfc.quantize(model, config)
    assert 'skip=["model.layers.0.mlp.up_proj"]' in caught.value.fix
    assert same_states(model, twin)
