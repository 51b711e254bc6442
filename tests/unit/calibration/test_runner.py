"""The sequential pass: what reaches each block is what the model gives it, whatever the architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call, first_tensor
from hf_compress.calibration.capture import find_stacks
from hf_compress.calibration.gram import collect
from hf_compress.calibration.padding import key_mask
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass, split
from hf_compress.calibration.sources import LiveSource
from hf_compress.checkpoint.inputs import example_inputs
from hf_compress.core.errors import CalibrationError
from hf_compress.core.plan import Plan
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.methods.rtn.method import quantize_scheme
from tests._utils.tiny import FAMILIES, MORE, tiny

EVERY = sorted({*FAMILIES, *MORE} - {"encodec"})  # for which there are no example inputs


class Rounding:
    """Rounds to nearest, and notes the activations that each block was given."""

    call_tokens = 1024

    def __init__(self, reference: bool = False, sequential: bool = True) -> None:
        self.reference = reference
        self.sequential = sequential
        self.seen: list[str] = []
        self.inputs: dict[str, list[Tensor]] = {}
        self.references: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def compress(self, block: Block) -> None:
        self.seen.append(block.path)
        self.inputs[block.path] = [call.hidden.clone() for call in block.calls if call.hidden is not None]
        if self.reference:
            pairs = [(call.reference, call.target) for call in block.calls]
            self.references[block.path] = [(a.clone(), b.clone()) for a, b in pairs if a is not None and b is not None]
        for row in block.rows:
            assert row.quantization is not None
            block.install(row, quantize_scheme(block.weight(row), row.quantization))


def planned(model: nn.Module, **fields: object) -> Plan:
    options = {"bits": 4, "group_size": "channel", "format": "guarded", "min_coverage": 0.0, **fields}
    return plan_model(model, RTNQuantConfig(**options))


def run(model: nn.Module, plan: Plan, method: Rounding, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    finished = Pass(LiveSource(model), plan, method, batches, MemoryResults()).run()
    return {name: packed.dense() for name, packed in finished.packed.items()}


@torch.no_grad()
def traced(model: PreTrainedModel, paths: list[str], batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each block is given when the model simply runs."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[path].append((args[0] if args else kwargs["hidden_states"]).clone())

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in paths]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", EVERY)
def test_blocks_see_what_the_compressed_model_gives_them(name: str) -> None:
    model = tiny(name)
    before = copy.deepcopy(model.state_dict())
    plan, batches = planned(model), example_inputs(model)
    method = Rounding()
    results = run(model, plan, method, batches)
    own = [row for row in plan.quantized if row.tied_to is None]
    assert set(results) == {row.name for row in own}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {type(module).__name__ for module in model.modules()} == {
        type(module).__name__ for module in tiny(name).modules()
    }
    compressed = copy.deepcopy(model)
    blocks = [path for path in method.seen if path]
    for row in own:  # what lies outside of blocks is compressed after them
        if row.module.startswith(tuple(f"{path}." for path in blocks)):
            compressed.get_parameter(row.key).data.copy_(results[row.name])
    for path, given in traced(compressed, blocks, batches).items():
        assert len(given) == len(batches)
        for expected, got in zip(given, method.inputs[path], strict=True):
            # The second decoder block of Switch was seen to differ by 1e-6, the last bits of values up to 4.
            torch.testing.assert_close(got, expected, rtol=0, atol=4e-6 if name == "switch" else 0)


STACKS = {"llama": 1, "bert": 1, "t5": 2, "bart": 2, "whisper": 2, "vit": 1, "gpt2": 1, "qwen3-moe": 1}
WITHOUT = {"albert": 0, "resnet": 0}


@pytest.mark.parametrize(("name", "stacks"), {**STACKS, **WITHOUT, "llava": 1}.items())
def test_stacks_are_found_and_walked_in_order(name: str, stacks: int) -> None:
    model = tiny(name)
    plan = planned(model)
    method = Rounding()
    run(model, plan, method, example_inputs(model))
    blocks = [path for path in method.seen if path]
    assert len({path.rpartition(".")[0] for path in blocks}) == stacks
    found = [path for stack in find_stacks(model, [row.module for row in plan.quantized]) for path in stack.paths]
    assert blocks == [path for path in found if path in blocks]


def test_what_is_left_is_compressed_in_one_last_pass() -> None:
    model = tiny("llama", tie_word_embeddings=False)
    method = Rounding()
    results = run(model, planned(model, default_rules=False, skip=["*embed*"]), method, example_inputs(model))
    assert method.seen[-1] == ""
    assert "lm_head" in results


def test_a_method_without_order_gets_the_whole_model() -> None:
    model = tiny("bert")
    method = Rounding(sequential=False)
    results = run(model, planned(model), method, example_inputs(model))
    assert method.seen == [""]
    again = run(model, planned(model), Rounding(), example_inputs(model))
    assert all(torch.equal(results[name], again[name]) for name in again)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_references_are_the_uncompressed_model(name: str) -> None:
    model = tiny(name)
    method, batches = Rounding(reference=True), example_inputs(model)
    run(model, planned(model), method, batches)
    blocks = [path for path in method.seen if path]
    expected = traced(model, blocks, batches)
    for path, after in zip(blocks, [*blocks[1:], None], strict=True):
        stacked = after is not None and after.rpartition(".")[0] == path.rpartition(".")[0]
        if name == "t5" and path.startswith("decoder"):
            continue  # its cross-attention reads the compressed encoder
        for number, (reference, target) in enumerate(method.references[path]):
            assert torch.equal(reference, expected[path][number])
            if stacked:
                assert torch.equal(target, expected[str(after)][number])


def test_a_failure_leaves_the_model_as_it_was() -> None:
    class Failing(Rounding):
        def compress(self, block: Block) -> None:
            super().compress(block)
            if block.index == 1:
                raise ValueError("on purpose")

    model = tiny("llama")
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="on purpose"):
        run(model, planned(model), Failing(), example_inputs(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds


def test_data_that_does_not_reach_a_weight_is_refused() -> None:
    class Lazy(Rounding):
        def compress(self, block: Block) -> None:
            for row in block.rows[:-1]:
                assert row.quantization is not None
                block.install(row, quantize_scheme(block.weight(row), row.quantization))

    model = tiny("llama")
    with pytest.raises(CalibrationError, match=r"never reaches model\.layers\.0\.mlp\.down_proj"):
        run(model, planned(model), Lazy(), example_inputs(model))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    model.get_input_embeddings().weight.data[3] = float("nan")
    batch = {"input_ids": torch.full((1, 8), 3)}
    with pytest.raises(CalibrationError, match=r"what reaches model\.layers\.0 holds 512 values"):
        run(model, planned(model), Rounding(), [batch])


def test_padding_is_left_out() -> None:
    value = torch.arange(12.0).view(2, 3, 2)
    call = Call(value, mask=torch.tensor([[True, True, False], [True, False, False]]))
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]])
    assert torch.equal(call.tokens(value), expected)
    assert torch.equal(call.tokens(value.reshape(6, 2)), expected)
    assert torch.equal(call.tokens(value[:, 0]), value[:, 0])  # a pooler's input has no tokens to leave out


def test_first_tensor_of_outputs() -> None:
    value = torch.ones(1)
    assert first_tensor((None, value)) is value
    assert first_tensor({"a": None, "b": value}) is value


def test_batches_are_split_by_tokens_along_rows() -> None:
    ids = torch.arange(32).view(4, 8)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    parts = split(batches, 16)
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 8), (2, 8)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), ids)
    assert len(split(batches, 4)) == 4  # a row stays whole
    images = [{"pixel_values": torch.zeros(4, 3, 8, 8)}]
    assert [len(part["pixel_values"]) for part in split(images, 1)] == [4]
    scalar = [{"input_ids": ids, "logits_to_keep": torch.tensor(1)}]
    assert [int(part["logits_to_keep"]) for part in split(scalar, 16)] == [1, 1]
    uneven = [{"input_ids": ids, "pixel_values": torch.zeros(3, 3, 8, 8)}]
    assert len(split(uneven, 1)) == 1


class Counting(Rounding):
    """Notes how many tokens each weight has seen."""

    def __init__(self, sequential: bool = True) -> None:
        super().__init__(sequential=sequential)
        self.counts: dict[str, int] = {}

    def compress(self, block: Block) -> None:
        self.counts.update({name: one.tokens for name, one in collect(block).items()})
        super().compress(block)


def counted(model: nn.Module, batch: dict[str, Tensor], sequential: bool = True) -> dict[str, int]:
    """Tokens that each planned weight has seen of one batch."""
    method = Counting(sequential)
    run(model, planned(model), method, [batch])
    return method.counts


SHORT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
IDS = torch.arange(3, 15).view(2, 6)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(("length", "mask"), [(6, True), (6, False), (5, False)])
def test_padding_of_an_encoder_is_not_taken_for_that_of_its_decoder(sequential: bool, length: int, mask: bool) -> None:
    ids = IDS[:, :length]
    batch = {"input_ids": IDS, "attention_mask": SHORT, "decoder_input_ids": ids}
    if mask:
        batch["decoder_attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor(5), 0)
    counts = counted(tiny("bart"), batch, sequential)
    own = 10 if mask else 2 * length
    assert counts["model.encoder.layers.1.fc1"] == counts["model.decoder.layers.0.encoder_attn.k_proj"] == 8
    assert counts["model.decoder.layers.1.fc1"] == counts["model.decoder.layers.0.encoder_attn.q_proj"] == own


CAUSAL = SHORT[:, None, None].bool() & torch.ones(6, 6, dtype=torch.bool).tril()
MASKS = {
    "pairs": CAUSAL[:, 0].long(),
    "bool": CAUSAL,
    "heads": CAUSAL.expand(2, 4, 6, 6),
    "added": torch.zeros(2, 1, 6, 6).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "infinite": torch.zeros(2, 1, 6, 6).masked_fill(~CAUSAL, -torch.inf),
    "ones": CAUSAL.float(),
    "flat": SHORT.float(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_of_any_form_tells_what_is_padding(mask: Tensor) -> None:
    kept = key_mask(mask, 2)
    assert kept is not None
    assert torch.equal(kept, SHORT.bool())
    everywhere = key_mask(torch.zeros(1, 1, 6, 6), 2)  # added to the scores, it hides nothing
    assert everywhere is not None
    assert everywhere.all()


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_a_mask_of_pairs_is_left_out(sequential: bool) -> None:
    counts = counted(tiny("llama"), {"input_ids": IDS, "attention_mask": MASKS["added"]}, sequential)
    assert set(counts.values()) == {8}


class TimeFirst(nn.Module):
    """Turns around what it is given, as XLNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids.T)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)


class Residual(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class Largest(Rounding):
    """Notes the largest input of each weight, padding left out."""

    def compress(self, block: Block) -> None:
        self.largest = {name: one.gram.abs().amax() for name, one in collect(block).items()}
        super().compress(block)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("length", [6, 2])
def test_padding_is_left_out_where_time_comes_first(sequential: bool, length: int) -> None:
    with torch.random.fork_rng(devices=[]):
        model = TimeFirst()
    model.embed.weight.data[0] = 1e6  # what padding holds
    mask = SHORT[:, :length] if length == 6 else torch.tensor([[1, 0], [1, 1]])
    batch = {"input_ids": (IDS[:, :length] % 15) + 1, "attention_mask": mask}
    batch["input_ids"] = batch["input_ids"] * mask
    method = Largest(sequential=sequential)
    run(model, planned(model, default_rules=False, skip=["embed"]), method, split([batch], 1024))
    assert method.largest
    assert all(value < 1e6 for value in method.largest.values())
