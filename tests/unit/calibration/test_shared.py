"""Parameters that several blocks own are scaled for none of them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.shared import Sharing
from tests._utils.tiny import tiny

WIDTH, VOCABULARY = 32, 64


class _Config(PreTrainedConfig):
    model_type = "shared-by-blocks"

    def __init__(self, shared: str = "", massive: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.shared, self.massive = shared, massive
        self.hidden_size, self.vocab_size = WIDTH, VOCABULARY


class _Layer(nn.Module):
    def __init__(self, norm: nn.Module, down: nn.Module, leak: bool) -> None:
        super().__init__()
        self.norm, self.down, self.leak = norm, down, leak
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        made: Tensor = self.down(self.up(normed) * nn.functional.silu(self.gate(normed)))
        return hidden + made + normed if self.leak else hidden + made


class Model(PreTrainedModel):
    """Three gated blocks; `shared` names what they share. With `massive`, norms leak beside one huge channel."""

    config_class = _Config

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        norms = [nn.LayerNorm(WIDTH) for _ in range(3)]
        downs = [nn.Linear(2 * WIDTH, WIDTH) for _ in range(3)]
        norms = norms[:1] * 3 if config.shared == "norm" else norms
        downs = downs[:1] * 3 if config.shared == "down" else downs
        for norm in norms if config.shared == "gain" else ():
            norm.weight = norms[0].weight
        pairs = zip(norms, downs, strict=True)
        self.layers = nn.ModuleList(_Layer(norm, down, config.massive) for norm, down in pairs)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden: Tensor = self.embed_tokens(input_ids)
        if self.config.massive:
            hidden = hidden.clone()
            hidden[:, 0, 5] += 3000
        for layer in self.layers:
            hidden = layer(hidden)
        return {"logits": self.head(hidden)}


def model(shared: str = "", massive: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        made = Model(_Config(shared, massive)).eval()
    for name, value in made.named_parameters():
        uneven = torch.rand(value.shape, generator=generator) * 3 + 0.1
        plain = torch.randn(value.shape, generator=generator) * (1.0 if "embed" in name else 0.15)
        value.data = uneven if name.endswith("norm.weight") else plain
    made.to(dtype)
    for layer in made.layers if shared == "memory" else ():
        layer.norm.weight.data = made.layers[0].norm.weight.data
    return made


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed))}


def data() -> hfc.Calibration:
    return hfc.Calibration([batch(1), batch(2)], min_rows=1, min_tokens=1)


@torch.no_grad()
def logits(made: nn.Module) -> Tensor:
    """All but the first token's, which the massive one drowns."""
    found: Tensor = made(**batch())["logits"]
    return found[:, 1:].float()


def change(made: nn.Module, before: Tensor) -> float:
    return float((logits(made) - before).norm() / before.norm())


@pytest.mark.parametrize("shared", ["", "norm", "gain", "memory", "down"])
def test_smoothing_keeps_the_function_of_blocks_that_share(shared: str) -> None:
    made = model(shared)
    before, weights = logits(made), deepcopy(made.state_dict())
    hfc.smooth(made, data())
    assert change(made, before) < 1e-5  # a dozen float32 roundings
    assert any(not torch.equal(value, weights[name]) for name, value in made.state_dict().items())


def test_smoothing_sees_a_leak_beside_a_massive_channel() -> None:
    made = model(massive=True, dtype=torch.bfloat16)
    before = logits(made)
    hfc.smooth(made, data())
    # Only gate and up rows may be scaled, all by roundings of bfloat16, 2^-9, in three blocks.
    assert change(made, before) < 0.05


@pytest.mark.parametrize("shared", ["", "norm", "gain", "memory", "down"])
def test_awq_at_eight_bits_stays_near_models_that_share(shared: str) -> None:
    made = model(shared)
    before = logits(made)
    config = hfc.AWQQuantConfig(bits=8, group_size=32, min_coverage=0.0, format="guarded", calibration=data())
    # Eight bits leave 0.3 % of a group's range; scales that reach another block's norm changed logits by 40 %.
    assert change(hfc.quantize(made, config), before) < 0.02


def test_what_is_shared_is_found_on_a_live_model() -> None:
    made = model("norm")
    sharing = Sharing(made)
    assert sharing.of_block("layers.1") == {"layers.1.norm.weight", "layers.1.norm.bias"}
    assert sharing.outside(["layers.0", "layers.1", "layers.2"]) == frozenset()
    assert sharing.outside(["layers.0"]) >= {"layers.1.norm.weight", "layers.2.norm.bias"}
    assert Sharing(model()).of_block("layers.1") == frozenset()


def test_overlapping_memory_counts() -> None:
    assert Sharing(model("memory")).of_block("layers.1") == {"layers.1.norm.weight"}
    made = model()
    first, second = made.layers[0].norm, made.layers[1].norm
    values = torch.ones(3 * WIDTH // 2)
    first.weight.data, second.weight.data = values[:WIDTH], values[-WIDTH:]
    assert Sharing(made).of_block("layers.0") == {"layers.0.norm.weight"}


def test_neighbours_in_one_storage_share_nothing() -> None:
    made = model()
    values = torch.ones(2 * WIDTH)
    made.layers[0].norm.weight.data, made.layers[1].norm.weight.data = values.chunk(2)
    assert Sharing(made).of_block("layers.0") == frozenset()


def test_one_memory_under_two_objects_of_a_block_is_left_alone() -> None:
    """A float32 copy of the block would have it twice, so that a trial could not see what a change reaches."""
    made = model()
    made.layers[0].down.bias.data = made.layers[0].norm.weight.data
    assert Sharing(made).of_block("layers.0") == {"layers.0.down.bias", "layers.0.norm.weight"}


def test_on_meta_objects_are_told_apart() -> None:
    with torch.device("meta"):
        plain, gain = Model(_Config()), Model(_Config("gain"))
    assert Sharing(plain).of_block("layers.1") == frozenset()
    assert Sharing(gain).of_block("layers.1") == {"layers.1.norm.weight"}


def test_a_second_name_of_the_same_block_is_no_other_owner() -> None:
    made = model()
    made.blocks = made.layers
    assert Sharing(made).of_block("layers.1") == frozenset()


def test_ties_of_the_plan_count_without_values() -> None:
    made = tiny("llama-tied").to("meta")
    made.lm_head.weight = nn.Parameter(made.lm_head.weight.clone())
    plan = plan_model(tiny("llama-tied"), hfc.RTNQuantConfig(group_size=16))
    assert Sharing(made, plan.rows).of_block("lm_head") == {"lm_head.weight"}
