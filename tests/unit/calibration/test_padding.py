"""Padding is left out of the statistics, whatever a model makes of its rows and tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.apply.planning import plan_model
from hf_compress.calibration.gram import collect
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass, split
from hf_compress.calibration.sources import LiveSource
from hf_compress.core.errors import CalibrationError
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.methods.rtn.method import quantize_scheme
from hf_compress.methods.smoothquant import smooth_model
from tests._utils.tiny import HIDDEN, tiny

SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LENGTHS = (13, 7)
"""Tokens of two rows that are no padding."""


class Counting:
    """Rounds to nearest, and notes how many tokens each weight has seen."""

    reference = False
    call_tokens = 1024

    def __init__(self, sequential: bool) -> None:
        self.sequential = sequential
        self.counts: dict[str, int] = {}

    def compress(self, block) -> None:
        self.counts.update({name: one.tokens for name, one in collect(block).items()})
        for row in block.rows:
            block.install(row, quantize_scheme(block.weight(row), row.quantization))


def counted(model: nn.Module, batch: dict[str, Tensor], sequential: bool, *skip: str) -> dict[str, int]:
    """Tokens that each planned weight has seen of one batch."""
    config = RTNQuantConfig(bits=4, group_size="channel", format="guarded", min_coverage=0.0, skip=skip)
    plan = plan_model(model, config)
    method = Counting(sequential)
    Pass(LiveSource(model), plan, method, [batch], MemoryResults()).run()
    return method.counts


class TimeFirst(nn.Module):
    """Turns around what it is given, as XLNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Normed() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids.T)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)


class Normed(nn.Module):
    """A block with channels that can be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(self.norm(hidden))


def padded(length: int, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """A mask of rows × tokens."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def made(name: str, config: transformers.PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_a_row_with_several_images_is_left_out(sequential: bool) -> None:
    model = tiny("llava")
    ids = torch.full((1, 56), 7)
    ids[:, :48] = 100  # three images of 16 tokens
    pixels = torch.linspace(-1, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32)
    size = model.config.vision_config.image_size
    batch = {"input_ids": ids, "pixel_values": pixels[..., :size, :size], "attention_mask": padded(56, (51,))}
    counts = counted(model, batch, sequential)
    assert {count for name, count in counts.items() if "language_model" in name} == {51}


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_a_decoder_that_reads_an_image_is_left_out(sequential: bool) -> None:
    text = {
        **SIZES,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "encoder_hidden_size": HIDDEN,
        "bos_token_id": 1,
    }
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    config = transformers.BlipConfig(text_config={**text, "sep_token_id": 2, "pad_token_id": 0}, vision_config=vision)
    model = made("BlipForConditionalGeneration", config)
    mask = padded(15)
    batch = {"input_ids": mask * 7, "pixel_values": torch.zeros(2, 3, 16, 16), "attention_mask": mask}
    counts = counted(model, batch, sequential, "*predictions.decoder")
    inside = {name: count for name, count in counts.items() if name.startswith("text_decoder.bert.encoder")}
    read = {count for name, count in inside.items() if ".crossattention.self." in name and "query" not in name}
    assert read == {2 * 5}  # four patches and the class token
    assert {count for name, count in inside.items() if ".intermediate." in name or "query" in name} == {sum(LENGTHS)}


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_what_a_caller_gives_a_decoder_to_read_is_left_out(sequential: bool) -> None:
    config = transformers.BertConfig(
        **SIZES, vocab_size=128, max_position_embeddings=64, is_decoder=True, add_cross_attention=True
    )
    states = torch.linspace(-1, 1, 2 * 15 * HIDDEN).view(2, 15, HIDDEN)
    batch = {
        "input_ids": torch.full((2, 15), 7),
        "encoder_hidden_states": states,
        "encoder_attention_mask": padded(15),
    }
    counts = counted(made("BertLMHeadModel", config), batch, sequential)
    read = {count for name, count in counts.items() if ".crossattention.self." in name and "query" not in name}
    assert read == {sum(LENGTHS)}
    assert {count for name, count in counts.items() if ".intermediate." in name} == {30}


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask", "encoder_attention_mask"])
@pytest.mark.parametrize(("rows", "tokens"), [(6, 1024), (12, 60), (176, 1020), (2, 1024)])
def test_no_batch_has_as_many_rows_as_tokens(name: str, rows: int, tokens: int) -> None:
    length = 2 if rows == 2 else 6
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[::2, -1] = 0
    ids = torch.arange(rows * length).view(rows, length)
    parts = split([{"input_ids": ids, name: mask, "scale": torch.tensor(1)}], tokens)
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), ids)
    assert torch.equal(torch.cat([part[name] for part in parts]), mask)
    for part in parts:
        assert len(part[name]) != length or bool(part[name].all())


def test_no_mask_of_a_batch_has_as_many_rows_as_tokens() -> None:
    masks = {"attention_mask": padded(6, (4,) * 6), "decoder_attention_mask": padded(5, (4,) * 6)}
    parts = split([{"input_ids": torch.full((6, 6), 7), **masks}], 1024)
    assert [len(part["input_ids"]) for part in parts] == [4, 1, 1]


def test_smooth_splits_batches_with_as_many_rows_as_tokens() -> None:
    with torch.random.fork_rng(devices=[]):
        model = TimeFirst()
    model.embed.weight.data[0] = torch.eye(8)[0] * 1e6  # what padding holds: the largest that a norm lets through
    mask = padded(6, (6, 2, 3, 6, 1, 4))
    ids = (torch.arange(36).view(6, 6) % 15 + 1) * mask
    plan = plan_model(model, RTNQuantConfig(group_size="channel", format="guarded", min_coverage=0.0, skip=["embed"]))
    expected = copy.deepcopy(model)
    rows = [
        {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
        for row, length in enumerate(mask.sum(1).tolist())
    ]
    groups = smooth_model(expected, plan.quantized, rows, 0.5)
    assert groups
    smooth_model(model, plan.quantized, [{"input_ids": ids, "attention_mask": mask}], 0.5)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_up_to_a_window_is_left_out(sequential: bool) -> None:
    config = transformers.LongformerConfig(**SIZES, vocab_size=128, max_position_embeddings=64, attention_window=4)
    mask = padded(14)
    counts = counted(made("LongformerModel", config), {"input_ids": mask * 7, "attention_mask": mask}, sequential)
    assert {count for name, count in counts.items() if ".intermediate." in name} == {sum(LENGTHS)}


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_sound_is_left_out(sequential: bool) -> None:
    model = tiny("wav2vec2")
    model.config.mask_time_prob = 0.0
    mask = padded(400, (400, 200))
    frames = [int(model._get_feat_extract_output_lengths(length)) for length in (400, 200)]
    batch = {"input_values": torch.linspace(-1, 1, 800).view(2, 400) * mask, "attention_mask": mask}
    counts = counted(model, batch, sequential)
    assert {count for name, count in counts.items() if ".encoder.layers." in name} == {sum(frames)}


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_sound_that_a_decoder_reads_is_left_out(sequential: bool) -> None:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.Speech2TextConfig(
        **layers,
        d_model=HIDDEN,
        vocab_size=128,
        input_feat_per_channel=8,
        conv_channels=32,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=64,
        max_target_positions=64,
    )
    model = made("Speech2TextForConditionalGeneration", config)
    mask = padded(40, (40, 20))
    features = torch.linspace(-1, 1, 2 * 40 * 8).view(2, 40, 8) * mask[..., None]
    batch = {"input_features": features, "attention_mask": mask, "decoder_input_ids": torch.full((2, 10), 7)}
    counts = counted(model, batch, sequential, "lm_head")
    frames = 10 + 5  # two convolutions of stride 2
    read = {count for name, count in counts.items() if name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))}
    assert read == {frames}
    assert {count for name, count in counts.items() if "encoder.layers" in name} == {frames}
    assert counts["model.decoder.layers.1.encoder_attn.q_proj"] == counts["model.decoder.layers.1.fc1"] == 20


class Shortening(nn.Module):
    """Blocks that see every second token, and a mask of all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Masked() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)[:, ::2]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return hidden


class Masked(Normed):
    """A block that is given a mask."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(hidden)


def test_a_mask_of_other_tokens_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Shortening()
    mask = padded(14)
    with pytest.raises(
        CalibrationError, match=r"layers\.0 reads has 2 × 7 tokens, its attention_mask 2 × 14"
    ) as caught:
        counted(model, {"input_ids": mask * 7, "attention_mask": mask}, True, "embed")
    assert "equal length" in caught.value.fix
    counts = counted(model, {"input_ids": mask * 7, "attention_mask": torch.ones_like(mask)}, True, "embed")
    assert set(counts.values()) == {14}


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("sequential", [True, False])
def test_padding_of_a_decoder_is_not_taken_for_that_of_what_it_reads(name: str, sequential: bool) -> None:
    mask = padded(14)
    ids = torch.full((2, 14), 7)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    counts = counted(tiny(name), batch, sequential)
    read = (".EncDecAttention.k", ".EncDecAttention.v", ".encoder_attn.k_proj", ".encoder_attn.v_proj")
    assert {count for key, count in counts.items() if key.endswith(read)} == {28}
    assert {count for key, count in counts.items() if key.endswith((".fc1", ".wi")) and "decoder" in key} == {20}


@pytest.mark.parametrize("sequential", [True, False])
def test_towers_without_a_mask_have_no_padding(sequential: bool) -> None:
    model, mask = tiny("clip"), padded(14)
    size = model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)
    counts = counted(model, {"input_ids": mask * 7, "attention_mask": mask, "pixel_values": pixels}, sequential)
    tokens = 2 * (1 + (size // model.config.vision_config.patch_size) ** 2)
    assert {count for key, count in counts.items() if key.startswith("vision_model.encoder")} == {tokens}
    assert {count for key, count in counts.items() if key.startswith("text_model.encoder")} == {sum(LENGTHS)}
