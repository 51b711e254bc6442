"""Students of a stock configuration: equal to the teacher with blocks taken out, before and after a stock reload."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.core.errors import AlreadyQuantizedError, ConfigError, UnsupportedModelError
from hf_compress.training.distillation.student import evenly, student_from_teacher
from tests._utils.tiny import MORE, output, tiny, tiny_inputs

DEEP: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 4},  # and 4 heads, which must stay 4
    "bert-classifier": {"num_hidden_layers": 4},
    "roberta": {"num_hidden_layers": 4},
    "distilbert": {"n_layers": 4},
    "deberta": {"num_hidden_layers": 4},
    "modernbert": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "opt": {"num_hidden_layers": 4},
    "llama-tied": {"num_hidden_layers": 4},
    "qwen2": {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3-moe": {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
    "gemma": {"num_hidden_layers": 4},
    "phi": {"num_hidden_layers": 4},
    "mixtral": {"num_hidden_layers": 4},
    "vit": {"num_hidden_layers": 4},
    "wav2vec2": {"num_hidden_layers": 4},
}
"""Families of one stack, with four blocks."""

PAIRED: dict[str, dict[str, Any]] = {
    "t5": {"num_layers": 4, "num_decoder_layers": 3},
    "bart": {"encoder_layers": 4, "decoder_layers": 4},
    "whisper": {"encoder_layers": 4, "decoder_layers": 3},
}
"""Encoder-decoders."""


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    if model.config.model_type != "wav2vec2":
        return tiny_inputs(model)
    return {"input_values": torch.randn(2, 160, generator=torch.Generator().manual_seed(3))}


def without(model: PreTrainedModel, path: str, kept: tuple[int, ...]) -> PreTrainedModel:
    """A copy of a model whose other blocks are taken out of their list."""
    copied = copy.deepcopy(model)
    blocks = copied.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    outside, _, name = path.rpartition(".")
    setattr(copied.get_submodule(outside), name, nn.ModuleList(blocks[index] for index in kept))
    types = vars(copied.config).get("layer_types")
    if types is not None:  # models look masks up by the number of the block
        copied.config.layer_types = [types[index] for index in kept]
    if "use_cache" in vars(copied.config):
        copied.config.use_cache = False  # caches are numbered by block
    return copied


def stack_of(model: PreTrainedModel, count: int, part: str = "") -> str:
    """Path of the list of so many blocks."""
    lists = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return next(path for path in lists if part in path)


DRAWS = {"wav2vec2": pytest.param("wav2vec2", marks=pytest.mark.touches_rng)}  # in each forward pass, for LayerDrop


@pytest.mark.parametrize("family", [DRAWS.get(family, family) for family in DEEP])
def test_equals_the_teacher_without_the_other_blocks(family: str, tmp_path: Path) -> None:
    teacher = tiny(family, **DEEP[family])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = student_from_teacher(teacher, layers=[0, 3])
    inputs = inputs_of(teacher)
    expected = output(without(teacher, stack_of(teacher, 4), (0, 3)), inputs)
    assert type(student) is type(teacher)
    assert torch.equal(output(student, inputs), expected)
    assert not torch.equal(output(teacher, inputs), expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    student.save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(output(again.eval(), inputs), expected)


@pytest.mark.parametrize("family", PAIRED)
def test_encoder_and_decoder(family: str, tmp_path: Path) -> None:
    teacher = tiny(family, **PAIRED[family])
    decoders = 4 if family == "bart" else 3
    student = student_from_teacher(teacher, layers={"encoder": 2, "decoder": [0, 1]})
    cut = without(teacher, stack_of(teacher, 4, "encoder"), (0, 3))
    expected = output(without(cut, stack_of(cut, decoders, "decoder"), (0, 1)), tiny_inputs(teacher))
    assert torch.equal(output(student, tiny_inputs(teacher)), expected)
    student.save_pretrained(tmp_path)
    assert torch.equal(output(type(student).from_pretrained(tmp_path).eval(), tiny_inputs(teacher)), expected)

    one = student_from_teacher(teacher, layers={"decoder": 1})
    assert len(one.get_submodule(stack_of(teacher, 4, "encoder"))) == 4  # type: ignore[arg-type]
    both = student_from_teacher(teacher, layers=2)
    assert output(both, tiny_inputs(teacher)).isfinite().all()


def test_two_towers(tmp_path: Path) -> None:
    values = MORE["clip"][2]
    deep = {part: {**values[part], "num_hidden_layers": 4} for part in ("text_config", "vision_config")}
    teacher = tiny("clip", **deep)
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "input_ids": torch.randint(5, 128, (2, 9), generator=generator),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }
    student = student_from_teacher(teacher, layers={"text_model": 1, "vision_model": "every_other"})
    assert student.config.text_config.num_hidden_layers == 1
    assert student.config.vision_config.num_hidden_layers == 2
    cut = without(teacher, "text_model.encoder.layers", (0,))
    cut = without(cut, "vision_model.encoder.layers", (0, 2))
    with torch.no_grad():
        expected = cut(**inputs).logits_per_image
        assert torch.equal(student(**inputs).logits_per_image, expected)
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).logits_per_image, expected)
    with pytest.raises(ConfigError, match="a part of"):
        student_from_teacher(teacher, layers={"encoder": 1})


def test_backbones_whose_blocks_have_names(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        teacher = transformers.Dinov2ForImageClassification(config).eval()
    student = student_from_teacher(teacher, layers=[0, 2])
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    expected = output(without(teacher, "dinov2.encoder.layer", (0, 2)), inputs)
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(output(student, inputs), expected)
    assert torch.equal(output(again, inputs), expected)
    assert student.config.stage_names == ["stem", "stage1", "stage2"]
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]


def test_lists_with_an_entry_per_block_are_cut() -> None:
    teacher = tiny("qwen2", **DEEP["qwen2"])
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    student = student_from_teacher(teacher, layers=[1, 2, 3])
    assert student.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert student.config.num_hidden_layers == 3
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1, 2]
    moe = student_from_teacher(tiny("qwen3-moe", **DEEP["qwen3-moe"]), layers=[0, 3])
    assert moe.config.mlp_only_layers == [1]


def test_other_fields_of_the_same_number_stay(tmp_path: Path) -> None:
    """Four blocks and four heads: only the blocks become fewer."""
    teacher = tiny("bert", **DEEP["bert"])
    student_from_teacher(teacher, layers=2).save_pretrained(tmp_path)
    teacher.save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "config.json").read_text())
    whole = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert {name for name in whole if config.get(name) != whole[name]} == {"num_hidden_layers"}
    assert config["num_hidden_layers"] == 2


def test_a_first_block_that_serves_all_others_lends_what_it_has() -> None:
    """T5's relative positions lie in the first block."""
    teacher = tiny("t5", **PAIRED["t5"])
    student = student_from_teacher(teacher, layers={"encoder": [1, 2]})
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.get_parameter(table), teacher.get_parameter(table))
    query = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    assert torch.equal(student.get_parameter(query.format(0)), teacher.get_parameter(query.format(1)))


def test_ties_stay_and_nothing_is_shared() -> None:
    teacher = tiny("llama-tied", **DEEP["llama-tied"])
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    student = student_from_teacher(teacher, layers="every_other")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in student.parameters())
    places = {value.data_ptr() for value in (*teacher.parameters(), *teacher.buffers())}
    assert not places & {value.data_ptr() for value in (*student.parameters(), *student.buffers())}
    assert not student.training


def test_a_cut_decoder_generates() -> None:
    """Caches are numbered by block."""
    student = student_from_teacher(tiny("llama", num_hidden_layers=4), layers=[0, 3])
    ids = torch.randint(5, 128, (1, 4), generator=torch.Generator().manual_seed(1))
    made = student.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, student(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_half_precision_stays() -> None:
    student = student_from_teacher(tiny("llama", dtype=torch.bfloat16), layers=1)
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("count", "kept", "expected"),
    [(12, 6, (0, 2, 4, 7, 9, 11)), (12, 1, (0,)), (4, 4, (0, 1, 2, 3)), (6, 2, (0, 5)), (3, 2, (0, 2))],
)
def test_evenly_keeps_first_and_last(count: int, kept: int, expected: tuple[int, ...]) -> None:
    assert evenly(count, kept) == expected


@pytest.mark.parametrize("layers", [0, 5, -1, True, [], [0, 4], [1, 0], [0, 0], [-1], "half", [0.0], 2.0])
def test_impossible_choices(layers: Any) -> None:
    with pytest.raises(ConfigError, match="4 blocks"):
        student_from_teacher(tiny("bert", num_hidden_layers=4), layers=layers)


def test_unknown_stack() -> None:
    with pytest.raises(ConfigError, match=r"no part of encoder\.layer"):
        student_from_teacher(tiny("bert"), layers={"decoder": 1})


def test_shared_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="share weights"):
        student_from_teacher(tiny("albert"), layers=1)


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "efficientnet"])
def test_stages_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError):
        student_from_teacher(tiny(family), layers=1)


def test_blocks_that_no_configuration_gives_are_refused() -> None:
    """A dense block in the place of a sparse one: the step between them is a rule, not a list."""
    teacher = tiny("qwen3-moe", num_hidden_layers=4, decoder_sparse_step=2)
    with pytest.raises(UnsupportedModelError, match="blocks differ from those that are kept"):
        student_from_teacher(teacher, layers=[1, 2])


def test_other_windows_are_refused_although_shapes_fit() -> None:
    teacher = tiny("bert", num_hidden_layers=4)
    teacher.encoder.layer[3].attention.self.scaling = 0.5
    with pytest.raises(UnsupportedModelError, match=r"scaling=0\.25.*scaling=0\.5"):
        student_from_teacher(teacher, layers=[0, 3])


def test_no_model_and_quantized_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no transformers model"):
        student_from_teacher(nn.Linear(2, 2, device="meta"), layers=1)  # type: ignore[arg-type]
    quantized = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=8, group_size=32))
    with pytest.raises(AlreadyQuantizedError):
        student_from_teacher(quantized, layers=1)
