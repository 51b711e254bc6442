"""Student against teacher: the losses of rows, whatever the padding, the batch and the widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.errors import TeacherError, TrainerError, UnsupportedModelError
from hf_compress.training.distillation.hidden import HiddenConfig, hidden_loss
from hf_compress.training.distillation.matching import Matching, token_mask
from hf_compress.training.distillation.relations import RelationConfig, relation_loss
from hf_compress.training.distillation.student import student_from_teacher
from tests._utils.tiny import tiny, tiny_inputs

NARROW = {"hidden_size": 48, "intermediate_size": 96}


def rows_of(matching: Matching, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with matching.watching() as watched, torch.no_grad():
        matching.student.model(**inputs)
        matching.teacher.model(**inputs)
    return {name: value.detach() for name, value in matching.losses(watched, inputs).items()}


def padded(lengths: tuple[int, ...], side: str, width: int) -> dict[str, Tensor]:
    """Rows of these lengths, padded to a width, the same tokens whatever the side."""
    made = {name: torch.zeros(len(lengths), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    made["position_ids"] = torch.zeros_like(made["input_ids"])
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        made["input_ids"][row, where] = torch.randint(5, 128, (length,), generator=torch.Generator().manual_seed(row))
        made["attention_mask"][row, where] = 1
        made["position_ids"][row, where] = torch.arange(length)
    return made


def both(family: str, **options: Any) -> Matching:
    teacher = tiny(family, num_hidden_layers=4)
    student = tiny(family, **options)
    return Matching(student, teacher, HiddenConfig(weight=2.0), RelationConfig(heads=4))


@pytest.mark.parametrize("options", [{}, NARROW])
@pytest.mark.parametrize("family", ["llama", "bert-mlm"])
def test_rows_do_not_depend_on_padding_or_batch(family: str, options: dict[str, Any]) -> None:
    """Float32 and other shapes of the same products: differences of some roundings, no more."""
    matching = both(family, **options)
    lengths = (7, 4, 9)
    whole = rows_of(matching, padded(lengths, "right", 9))
    assert whole.keys() == {"hidden", "relations"}
    assert all(value.shape == (3,) and bool((value > 0).all()) for value in whole.values())
    for other in (padded(lengths, "left", 9), padded(lengths, "right", 13)):
        for name, value in rows_of(matching, other).items():
            torch.testing.assert_close(value, whole[name], rtol=2e-5, atol=1e-7)
    batch = padded(lengths, "right", 9)
    for row, length in enumerate(lengths):
        one = {name: value[row : row + 1, :length] for name, value in batch.items()}
        for name, value in rows_of(matching, one).items():
            torch.testing.assert_close(value[0], whole[name][row], rtol=2e-5, atol=1e-7)


def test_is_what_the_losses_say() -> None:
    """Against the two losses on what the models return, layer by layer."""
    matching = both("bert-mlm")
    inputs = tiny_inputs(matching.student.model)  # type: ignore[arg-type]
    made = rows_of(matching, inputs)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states for model in _models(matching)]
        config = HiddenConfig()
        pairs = [(1, 2), (2, 4)]
        losses = [hidden_loss(config, states[0][own], states[1][other], mask) for own, other in pairs]
        assert torch.equal(made["hidden"], 2.0 * torch.stack(losses).mean(dim=0))
        parts = []
        for name in ("query", "key", "value"):
            own, other = (
                getattr(model.bert.encoder.layer[-1].attention.self, name)(states[number][-2])
                for number, model in enumerate(_models(matching))
            )
            parts.append(relation_loss(own, other, 4, mask))
        torch.testing.assert_close(made["relations"], torch.stack(parts).sum(dim=0))


def _models(matching: Matching) -> tuple[Any, Any]:
    return matching.student.model, matching.teacher.model


def test_equal_models_lose_nothing() -> None:
    model = tiny("bert", num_hidden_layers=2)
    matching = Matching(model, tiny("bert", num_hidden_layers=2), HiddenConfig(), RelationConfig())
    assert all(not value.any() for value in rows_of(matching, tiny_inputs(model)).values())
    assert list(matching.projections.parameters()) == []


def test_projections_learn_and_stay_out_of_the_student() -> None:
    matching = both("bert-mlm", **NARROW)
    student = matching.student.model
    names = set(student.state_dict())
    inputs = tiny_inputs(student)  # type: ignore[arg-type]
    seen = []
    for _ in range(5):
        with matching.watching(student) as watched:
            student(**inputs)
            with torch.no_grad():
                matching.teacher.model(**inputs)
        loss = matching.losses(watched, inputs)["hidden"].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        seen.append(loss.item())
        matching.projections.step(1e-2)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.9 * seen[0]
    shapes = {name: tuple(value.shape) for name, value in matching.projections.tensors().items() if "." in name}
    assert shapes["stack0.layer1.to2.weight"] == (64, 48)
    assert set(student.state_dict()) == names
    assert all(parameter.grad is None for parameter in matching.teacher.model.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_exclude_the_padding_of_both(family: str) -> None:
    teacher = tiny(family)
    student = student_from_teacher(teacher, layers=1)
    matching = Matching(student, teacher, HiddenConfig(layers=((0, 0), (1, 2))), RelationConfig())
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "input_ids": torch.randint(5, 128, (2, 8), generator=generator),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "labels": torch.randint(5, 128, (2, 6), generator=generator),
    }
    inputs["labels"][1, 4:] = -100
    whole = rows_of(matching, inputs)
    short = {"input_ids": (5,), "attention_mask": (5,), "labels": (4,)}
    alone = rows_of(matching, {name: inputs[name][1:, : length[0]] for name, length in short.items()})
    for name, value in alone.items():
        assert value[0] > 0
        torch.testing.assert_close(value[0], whole[name][1], rtol=2e-5, atol=1e-7)


def test_frames_of_sound_are_told_by_the_model() -> None:
    """Their mask is of samples, which are more than frames."""
    options: dict[str, Any] = {"feat_extract_norm": "layer", "feat_proj_layer_norm": True}
    teacher, student = tiny("wav2vec2", **options), tiny("wav2vec2", num_hidden_layers=1, **options)
    matching = Matching(student, teacher, HiddenConfig(), None)
    inputs = {
        "input_values": torch.randn(2, 160, generator=torch.Generator().manual_seed(1)),
        "attention_mask": torch.ones(2, 160, dtype=torch.long),
    }
    inputs["attention_mask"][1, 80:] = 0
    with matching.watching() as watched, torch.no_grad():
        student(**inputs)
        teacher(**inputs)
    value = watched.student.hidden_of((0, 1))
    mask = token_mask(matching.student, 0, value, inputs, watched.student.masks[0])
    assert mask is not None
    frames = student._get_feat_extract_output_lengths(torch.tensor([160, 80])).tolist()
    assert mask.sum(dim=1).tolist() == frames
    assert rows_of(matching, inputs)["hidden"].shape == (2,)


def test_images_have_no_padding() -> None:
    teacher = tiny("vit", num_hidden_layers=3)
    matching = Matching(student_from_teacher(teacher, layers=1), teacher, HiddenConfig(), RelationConfig())
    made = rows_of(matching, tiny_inputs(teacher))
    assert all(value.shape == (2,) and bool((value > 0).all()) for value in made.values())


def test_two_towers() -> None:
    teacher, student = tiny("clip"), tiny("clip")
    matching = Matching(student_from_teacher(student, layers=1), teacher, HiddenConfig(), RelationConfig())
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "input_ids": torch.randint(5, 128, (2, 17), generator=generator),  # as many as patches and the class token
        "attention_mask": torch.tensor([[1] * 17, [1] * 9 + [0] * 8]),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }
    with matching.watching() as watched, torch.no_grad():
        matching.student.model(**inputs)
        teacher(**inputs)
    masks = [
        token_mask(
            matching.student, stack, watched.student.hidden_of((stack, 1)), inputs, watched.student.masks[stack]
        )
        for stack in range(2)
    ]
    assert masks[0] is not None
    assert masks[0].sum(dim=1).tolist() == [17, 9]
    assert masks[1] is None


def test_what_does_not_fit_is_refused() -> None:
    bert: PreTrainedModel = tiny("bert")
    with pytest.raises(TeacherError, match="1 stacks of blocks"):
        Matching(bert, tiny("bart"), HiddenConfig(), None)
    with pytest.raises(TeacherError, match="layers 0 to 2, the teacher 0 to 2"):
        Matching(bert, tiny("bert"), HiddenConfig(layers=((1, 3),)), None)
    with pytest.raises(TeacherError, match="blocks 1 to 2"):
        Matching(bert, tiny("bert"), None, RelationConfig(layers=(1, 3)))
    with pytest.raises(UnsupportedModelError, match="No layers for queries, keys and values"):
        Matching(tiny("resnet"), tiny("resnet"), None, RelationConfig())
    matching = Matching(bert, tiny("bert"), HiddenConfig(), None)
    with pytest.raises(TrainerError, match="compiled"), matching.watching(torch.compile(bert)):  # type: ignore[arg-type]
        pass
    with matching.watching() as watched, torch.no_grad():
        bert(input_ids=torch.ones(1, 5, dtype=torch.long))
        matching.teacher.model(input_ids=torch.ones(1, 6, dtype=torch.long))
    with pytest.raises(TeacherError, match=r"sees \[1, 5\] rows and tokens, .* \[1, 6\]"):
        matching.losses(watched, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    odd = Matching(bert, tiny("bert"), None, RelationConfig(heads=7))
    with pytest.raises(TeacherError, match="heads=7"):
        rows_of(odd, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
