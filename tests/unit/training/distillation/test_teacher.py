"""A teacher: what it is given, and which ones are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
)

from hf_compress.core.errors import LossError, TeacherError, UnsupportedModelError
from hf_compress.training.distillation import DistillationConfig
from hf_compress.training.distillation.distiller import Distiller
from hf_compress.training.distillation.losses import Divergence
from hf_compress.training.distillation.tasks import Pair, compare, task_of
from hf_compress.training.distillation.teacher import (
    Teacher,
    check_finite,
    check_pair,
    tokenizer_beside,
    without_labels,
)
from tests._utils.tiny import FAMILIES, output, tiny, tiny_inputs, tiny_tokenizer
from tests.unit.training.distillation.runs import CASES, difference, distilled, parameters, stacked


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.add_tokens(list(more))
    return made


def test_same_vocabulary_of_the_same_size() -> None:
    assert check_pair(tiny("llama", num_hidden_layers=1), Teacher(tiny("llama"))) is None
    assert check_pair(tiny("vit", num_hidden_layers=1), Teacher(tiny("vit"))) is None
    known = Teacher(tiny("llama"), tokenizer())
    assert check_pair(tiny("llama"), known, tokenizer()) is None


def test_padded_vocabularies_are_cut_to_their_tokens(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = tiny("llama", vocab_size=120, num_hidden_layers=1), tiny("llama")
    size = len(tokenizer())
    for known in (Teacher(teacher), Teacher(teacher, tokenizer())):
        with caplog.at_level(logging.INFO, logger="hf_compress"):
            assert check_pair(student, known, tokenizer()) == size
    assert f"over the {size} that are tokens" in caplog.text
    distiller = Distiller(teacher)
    distiller.prepare(student, tokenizer())
    batch = tiny_inputs(student)
    batch["input_ids"] = batch["input_ids"] % size
    batch["labels"] = batch["input_ids"]
    own, other = student(**{k: v for k, v in batch.items() if k != "labels"}), distiller.teach(student, batch, ())
    loss = distiller.loss(student, own, other, batch)
    both = [one.logits[:, :-1, :size].double().div(2).softmax(-1) for one in (own, other)]
    expected = 0.5 * 4 * (both[1] * (both[1] / both[0]).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert float(student.lm_head.weight.grad[size:].abs().max()) == 0


def test_other_vocabularies_are_refused() -> None:
    student = tiny("llama", vocab_size=120)
    with pytest.raises(TeacherError, match=r"\[HFC410\].*120 entries, the teacher's 128, and no tokenizer"):
        check_pair(student, Teacher(tiny("llama")))
    with pytest.raises(TeacherError, match=r"1 of 101 tokens of the student.*'<new>'"):
        check_pair(student, Teacher(tiny("llama"), tokenizer()), tokenizer("<new>"))
    with pytest.raises(TeacherError, match="100 tokens, but the smaller of both vocabularies 90"):
        check_pair(tiny("llama", vocab_size=90), Teacher(tiny("llama")), tokenizer())
    words = {token: (index + 1) % 100 for token, index in tokenizer().get_vocab().items()}
    turned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")))
    with pytest.raises(TeacherError, match="100 of 100 tokens"):
        check_pair(tiny("llama"), Teacher(tiny("llama"), turned), tokenizer())


def test_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    assert tokenizer_beside(model) is None
    model.save_pretrained(tmp_path)
    model.config.name_or_path = model.name_or_path = str(tmp_path)
    assert tokenizer_beside(model) is None
    tokenizer().save_pretrained(tmp_path)
    found = tokenizer_beside(model)
    assert found is not None
    assert found.get_vocab() == tokenizer().get_vocab()
    with pytest.raises(TeacherError, match="<new>"):
        check_pair(tiny("llama"), Teacher(model), tokenizer("<new>"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert tokenizer_beside(model) is None
    model.name_or_path = "somebody/not-in-the-cache"
    assert tokenizer_beside(model) is None


def test_labels_of_another_number_or_order() -> None:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    names, turned = ({"num_labels": 2, **one} for one in (names, turned))
    student = tiny("bert-classifier", **names)
    check_pair(student, Teacher(tiny("bert-classifier", **names)))
    check_pair(student, Teacher(tiny("bert-classifier", num_labels=2)))
    with pytest.raises(TeacherError, match=r"bad, good.*good, bad"):
        check_pair(student, Teacher(tiny("bert-classifier", **turned)))
    backwards = {"id2label": {1: "good", 0: "bad"}, "label2id": {"good": 1, "bad": 0}, "num_labels": 2}
    check_pair(student, Teacher(tiny("bert-classifier", **backwards)))
    listed_alike = {"id2label": {1: "bad", 0: "good"}, "label2id": {"bad": 1, "good": 0}, "num_labels": 2}
    with pytest.raises(TeacherError, match=r"bad, good.*good, bad"):
        check_pair(student, Teacher(tiny("bert-classifier", **listed_alike)))
    with pytest.raises(TeacherError, match="LABEL_2"):
        check_pair(student, Teacher(tiny("bert-classifier")))


def test_blanks() -> None:
    with pytest.raises(TeacherError, match="blank is 0, the teacher's 3"):
        check_pair(tiny("wav2vec2", pad_token_id=0), Teacher(tiny("wav2vec2", pad_token_id=3)))


def test_shared_memory() -> None:
    student, teacher = tiny("bert-classifier"), tiny("bert-classifier")
    with pytest.raises(TeacherError, match="the student itself"):
        check_pair(student, Teacher(student))
    teacher.classifier.weight = student.classifier.weight
    with pytest.raises(TeacherError, match=r"teacher's classifier.weight is the student's classifier.weight"):
        check_pair(student, Teacher(teacher))


def test_no_model_and_no_values() -> None:
    with pytest.raises(TeacherError, match="is a dict"):
        Teacher({})  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="meta"):
        Teacher(torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(TeacherError, match="no teacher"):
        Distiller(None)


def test_rows_that_are_too_long(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = tiny("bert-classifier"), Teacher(tiny("bert-classifier", max_position_embeddings=8))
    check_pair(student, teacher)
    assert "reads at most 8 tokens, the student 64" in caplog.text
    with pytest.raises(TeacherError, match="Rows of 9 tokens in input_ids, but the teacher reads at most 8"):
        teacher(tiny_inputs(student), student)


def rows_of(count: int) -> dict[str, Any]:
    ids = torch.full((1, count), 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_positions_under_another_name_or_counted_from_padding() -> None:
    """As many tokens as fit are read; one more is refused, where torch would raise an IndexError."""
    gpt2 = tiny("gpt2", n_positions=16)
    roberta = tiny("roberta", max_position_embeddings=18, pad_token_id=1)
    for model in (gpt2, roberta):
        teacher = Teacher(model)
        teacher(rows_of(16), model)
        with pytest.raises(TeacherError, match="Rows of 17 tokens in input_ids, but the teacher reads at most 16"):
            teacher(rows_of(17), model)


def test_decoders_that_read_less() -> None:
    for name in ("bart", "whisper"):
        student, option = tiny(name), {"bart": "max_position_embeddings", "whisper": "max_target_positions"}[name]
        teacher = Teacher(tiny(name, **{option: 9}))
        inputs = {key: value for key, value in tiny_inputs(student).items() if key != "decoder_input_ids"}
        inputs = {key: value[:, :9] if name == "bart" else value for key, value in inputs.items()}
        teacher(inputs | {"decoder_input_ids": torch.full((2, 9), 7)}, student)
        with pytest.raises(TeacherError, match="10 tokens in decoder_input_ids, but the teacher reads at most 9"):
            teacher(inputs | {"decoder_input_ids": torch.full((2, 10), 7)}, student)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_blame(bad: float) -> None:
    check_finite({"logits": torch.tensor([1.0, -torch.inf]), "ids": torch.tensor([1])})
    with pytest.raises(LossError, match="teacher's logits hold NaN or infinity"):
        check_finite({"logits": torch.tensor([1.0, bad])})


@pytest.mark.touches_rng
def test_the_object_stays_as_it_was(tmp_path: Path) -> None:
    """Also under mixed precision; and the student learns from what the teacher computes under it."""
    case = CASES["sequence"]
    used, attributes = case.build(2), set(vars(case.build(2)))
    batch = stacked([{key: value for key, value in row.items() if key != "labels"} for row in case.rows()])
    with torch.no_grad():
        before = used(**batch).logits
    half = distilled(tmp_path, case.build(1), used, case.rows(), options={"bf16": True})
    assert set(vars(used)) == attributes
    with torch.no_grad():
        assert torch.equal(used(**batch).logits, before)
        taught = half.distiller.teach(half.model, batch, ())
    assert taught["logits"].dtype == torch.bfloat16
    runs = [distilled(tmp_path, case.build(1), teacher, case.rows()) for teacher in (used, case.build(2))]
    assert difference(parameters(runs[0]), parameters(runs[1])) == 0.0


class Asked(torch.nn.Module):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")  # draws nothing
        self.layer.weight.data.fill_(1.0)
        self.seen: dict[str, Any] = {}

    def forward(self, input_ids: Any, use_cache: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        self.seen = {"input_ids": input_ids, "use_cache": use_cache, **kwargs}
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        return {"logits": self.layer(input_ids.float().unsqueeze(-1))}


def test_arguments() -> None:
    """Labels never; what only the student knows by name neither; what goes past both, such as lengths, does."""
    model = Asked().train()
    teacher = Teacher(model)
    student = tiny("bert-classifier")
    model.train()  # somebody does so later
    batch = tiny_inputs(student) | {"token_type_ids": torch.zeros(2, 9), "cu_seq_lens_q": torch.tensor([0, 9])}
    given = without_labels(student, {**batch, "labels": torch.tensor([0, 1]), "num_items_in_batch": 2})
    made = teacher(given, student)
    assert set(model.seen) == {"input_ids", "use_cache", "cu_seq_lens_q"}
    assert model.seen["use_cache"] is False
    assert not model.training
    assert not made["logits"].requires_grad
    (made["logits"] * torch.ones(1, requires_grad=True)).sum().backward()  # not an inference tensor


def test_tuples_are_refused() -> None:
    teacher = Teacher(tiny("bert-classifier"))
    teacher.plain.config.return_dict = False
    student = tiny("bert-classifier")
    with pytest.raises(TeacherError, match="returns a tuple"):
        teacher(tiny_inputs(student), student)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_decoder_reads_what_the_student_makes_of_labels(name: str) -> None:
    """With and without transformers' own method for it: the same logits as with labels."""
    model = tiny(name)
    inputs = {key: value for key, value in tiny_inputs(model).items() if key != "decoder_input_ids"}
    labels = torch.randint(5, 128, (2, 6), generator=torch.Generator().manual_seed(1))
    labels[1, 4:] = -100
    with torch.no_grad():
        expected = model(**inputs, labels=labels).logits
    given = without_labels(model, {**inputs, "labels": labels})
    assert "labels" not in given
    assert torch.equal(output(model, given), expected)
    kept = without_labels(model, {**inputs, "labels": labels, "decoder_input_ids": labels.clamp(min=0)})
    assert torch.equal(kept["decoder_input_ids"], labels.clamp(min=0))
    assert name != "whisper" or isinstance(model, WhisperForConditionalGeneration)


EXPECTED = {
    "bert": "embeddings",
    "bert-classifier": "classification",
    "bert-mlm": "masked_lm",
    "distilbert": "classification",
    "t5": "seq2seq_lm",
    "bart": "seq2seq_lm",
    "whisper": "seq2seq_lm",
    "vit": "classification",
    "resnet": "classification",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_task(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        made = model(**tiny_inputs(model))
    assert task_of(model, made, None) == EXPECTED.get(name, "causal_lm")


def test_task_of_labels() -> None:
    model, made = tiny("bert-classifier"), {"logits": torch.zeros(2, 3)}
    assert task_of(model, made, torch.tensor([0, 1])) == "classification"
    assert task_of(model, made, torch.zeros(2, 3)) == "multi_label"
    model.config.problem_type = "multi_label_classification"
    assert task_of(model, made, None) == "multi_label"
    model.config.problem_type = "regression"
    assert task_of(model, made, None) == "regression"
    assert task_of(torch.nn.Identity(), {"logits": torch.zeros(2, 1)}, None) == "regression"


def test_task_that_can_not_be_told() -> None:
    with pytest.raises(UnsupportedModelError, match=r"task of Identity.*logits: \(2, 3, 4\)"):
        task_of(torch.nn.Identity(), {"logits": torch.zeros(2, 3, 4)}, None)
    with pytest.raises(UnsupportedModelError, match="returns masks"):
        task_of(torch.nn.Identity(), {"masks": torch.zeros(2)}, None)


def pair(own: Any, other: Any, **batch: Any) -> Pair:
    config = batch.pop("config", DistillationConfig())
    return Pair(own, other, batch, torch.nn.Identity(), config)


def test_frames_of_a_model_that_does_not_count_them() -> None:
    config = DistillationConfig(task="ctc")
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = compare(pair({"logits": logits}, {"logits": logits.flip(-1)}, config=config))
    assert found.items.tolist() == [6, 6]
    with pytest.raises(UnsupportedModelError, match="how many frames"):
        compare(pair({"logits": logits}, {"logits": logits}, attention_mask=torch.ones(2, 40), config=config))


@pytest.mark.parametrize("pooling", ["mean", "pooled"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_embeddings(loss: Any, pooling: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 4, generator=draw)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    config = DistillationConfig(task="embeddings", embedding=loss, pooling=pooling)
    both = [{"last_hidden_state": one, "pooler_output": one[:, 0]} for one in (own, other)]
    found = compare(pair(*both, input_ids=mask, attention_mask=mask, config=config))
    a, b = (
        one[:, 0] if pooling == "pooled" else torch.stack((one[0, :2].mean(0), one[1, 1:].mean(0)))
        for one in (own, other)
    )
    expected = (a - b).square().mean(-1) if loss == "mse" else 1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    assert float(found.total) == pytest.approx(float(expected.sum()), rel=1e-5)
    narrow = {"last_hidden_state": other[..., :2], "pooler_output": other[:, 0, :2]}
    with pytest.raises(TeacherError, match="4 features, the teacher's 2"):
        compare(pair(both[0], narrow, input_ids=mask, config=config))
    with pytest.raises(TeacherError, match="no embedding"):
        compare(pair({"other": own}, both[1], input_ids=mask, config=config))


def test_answers_without_a_mask_use_all_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = ({f"{e}_logits": torch.randn(2, 5, generator=draw) for e in ("start", "end")} for _ in range(2))
    found = compare(pair(own, other))
    kind = Divergence.of(DistillationConfig())
    expected = sum(kind(own[name], other[name], torch.arange(2)).sum() for name in own) / 2
    assert float(found.total) == pytest.approx(float(expected), rel=1e-6)


def test_packed_rows_with_shifted_labels() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(1, 6, 4, generator=draw), torch.randn(1, 6, 4, generator=draw)
    config = DistillationConfig(task="causal_lm")
    shifted = torch.tensor([[1, 2, -100, 3, 0, -100]])
    labels = torch.tensor([[-100, 1, 2, -100, 3, 0]])
    made = [
        compare(pair({"logits": own}, {"logits": other}, config=config, **given))
        for given in ({"shift_labels": shifted, "labels": labels}, {"labels": labels})
    ]
    assert torch.equal(made[0].total, made[1].total)
    assert made[0].items.tolist() == [4]
