"""Quality deltas against float64 oracles, on tiny random models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_processing_base import ImageProcessingMixin

from hf_compress.core.errors import EvaluationDataError, MeasurementError, UnsupportedModelError
from hf_compress.evaluation.quality import (
    CausalLMQuality,
    ClassificationQuality,
    EmbeddingQuality,
    QualityResult,
    accuracy_delta,
    embedding_similarity,
    evaluate_quality,
    infer_task,
    mean_pool,
    perplexity,
    perplexity_delta,
    t_quantile,
    text_windows,
)

WORDS = ["[PAD]", "[UNK]", "[BOS]", *"the a cat dog sat ran on mat log good bad very".split()]  # noqa: SIM905
TEXTS = ["the cat sat on the mat", "a dog ran", "very good cat on a very bad log the dog sat", "bad cat"]
LABELLED = [(TEXTS[0], 0), (TEXTS[1], 1), (TEXTS[2], 2), (TEXTS[3], 0)]


@pytest.fixture(autouse=True)
def _own_rng() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def make_tokenizer(bos: bool = False, pad: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token=pad, bos_token="[BOS]" if bos else None
    )


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        **changes,
    )


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **heads, "initializer_range": 0.5, **changes})


Model = TypeVar("Model", bound=nn.Module)


@pytest.fixture
def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(num_labels=3)).eval()


@pytest.fixture
def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


def disturbed(model: Model, scale: float = 0.1) -> Model:
    noisy = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return noisy


def one_hot(classes: list[int], count: int = 3) -> Tensor:
    return torch.eye(count)[classes]


# --- statistics --------------------------------------------------------------------------------------------


# Student's t, two-sided 95 %, from printed tables (and 12.7062 = tan(0.475 pi) exactly).
@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (10, 2.228139),
     (29, 2.045230), (30, 2.042272), (120, 1.979930), (1001, 1.962337)],
)  # fmt: skip
def test_t_quantile(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=2e-6)


# --- classifier --------------------------------------------------------------------------------------------


def test_accuracy_delta_by_hand() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    old, new = [0, 1, 2, 0, 1, 0, 1, 0], [0, 1, 2, 1, 2, 2, 1, 2]
    result = accuracy_delta(one_hot(new), one_hot(old), labels)
    assert (result.baseline_accuracy, result.candidate_accuracy) == (5 / 8, 4 / 8)
    assert (result.lost, result.gained, result.agreement) == (2, 1, 4 / 8)
    assert result.difference == -1 / 8
    width = 1.959963984540054 * math.sqrt((3 / 10 + 2 / 10 - (1 / 10) ** 2) / 10)
    assert result.difference_low == pytest.approx(-0.1 - width)
    assert result.difference_high == pytest.approx(-0.1 + width)


def test_no_changed_prediction_still_has_uncertainty() -> None:
    logits = one_hot([0, 1] * 50)
    result = accuracy_delta(logits, logits, torch.tensor([0, 1] * 50))
    assert result.difference == 0
    assert result.agreement == 1
    assert -0.04 < result.difference_low < -0.02
    assert 0.02 < result.difference_high < 0.04


def binomial(count: int, chance: float, size: int) -> float:
    return math.comb(size, count) * chance**count * (1 - chance) ** (size - count)


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.02, 0.02), (0.1, 0.05), (0.2, 0.0), (0.0, 0.0), (0.3, 0.3)])
def test_interval_covers_the_truth(p_lost: float, p_gained: float) -> None:
    """Exact coverage at 40 examples, over all possible counts, on the library's own numbers."""
    size, covered = 40, 0.0
    labels = torch.zeros(size, dtype=torch.int64)
    for lost in range(size + 1):
        chance = binomial(lost, p_lost, size)
        if chance < 1e-5:
            continue
        for gained in range(size - lost + 1):
            both = chance * binomial(gained, p_gained / (1 - p_lost), size - lost)
            if both < 1e-5:
                continue
            old = [0] * lost + [1] * gained + [0] * (size - lost - gained)
            new = [1] * lost + [0] * gained + [0] * (size - lost - gained)
            result = accuracy_delta(one_hot(new), one_hot(old), labels)
            inside = result.difference_low <= p_gained - p_lost <= result.difference_high
            covered += both * inside
    assert covered > 0.93


classes = st.integers(0, 2)


@given(st.lists(st.tuples(classes, classes, classes), min_size=1, max_size=30))
@settings(deadline=None)
def test_accuracy_delta_is_antisymmetric_and_holds_its_estimate(rows: list[tuple[int, int, int]]) -> None:
    old, new = one_hot([a for a, _, _ in rows]), one_hot([b for _, b, _ in rows])
    labels = torch.tensor([label for _, _, label in rows])
    result, mirrored = accuracy_delta(new, old, labels), accuracy_delta(old, new, labels)
    assert result.difference_low <= result.difference <= result.difference_high
    assert mirrored.difference == -result.difference
    assert mirrored.difference_low == pytest.approx(-result.difference_high)
    assert (mirrored.lost, mirrored.gained) == (result.gained, result.lost)
    assert result.difference == pytest.approx(result.candidate_accuracy - result.baseline_accuracy)


@pytest.mark.parametrize(
    ("baseline", "candidate", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), torch.tensor([0, 1]), r"\(3, 3\) and \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0]), r"labels \(1,\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "no examples"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 3"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([-100, 1]), "from -100"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "float32"),
    ],
)
def test_accuracy_delta_refuses(baseline: Tensor, candidate: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(EvaluationDataError, match=message) as caught:
        accuracy_delta(candidate, baseline, labels)
    assert caught.value.code == "HFC502"


def test_logits_that_are_no_numbers() -> None:
    broken = torch.tensor([[0.0, math.nan]])
    with pytest.raises(MeasurementError, match="candidate's classification is nan"):
        accuracy_delta(broken, torch.zeros(1, 2), torch.tensor([0]))


def test_evaluate_classifier_is_what_the_models_say(classifier: BertForSequenceClassification) -> None:
    other, tokenizer = disturbed(classifier), make_tokenizer()
    result = evaluate_quality(other, classifier, LABELLED, tokenizer, batch_size=3)
    logits = []
    for model in (other, classifier):
        alone = [tokenizer(text, return_tensors="pt") for text, _ in LABELLED]
        with torch.no_grad():
            logits.append(torch.cat([model(**inputs).logits for inputs in alone]))
    assert result.task == "classification"
    assert result.result == accuracy_delta(logits[0], logits[1], torch.tensor([0, 1, 2, 0]))
    assert (result.truncated, result.max_length) == (0, 32)


def test_forms_of_data_agree(classifier: BertForSequenceClassification) -> None:
    other, tokenizer = disturbed(classifier), make_tokenizer()
    columns = Dataset.from_dict({"text": TEXTS, "label": [label for _, label in LABELLED], "id": [1, 2, 3, 4]})
    forms: list[Any] = [LABELLED, tuple(LABELLED), [list(pair) for pair in LABELLED], columns]
    results = [evaluate_quality(other, classifier, data, tokenizer) for data in forms]
    assert all(result == results[0] for result in results)


def test_truncated_texts_are_counted(classifier: BertForSequenceClassification) -> None:
    result = evaluate_quality(classifier, classifier, LABELLED, make_tokenizer(), max_length=5)
    assert (result.truncated, result.max_length) == (2, 5)


def test_image_classifier() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=2)
    model = ViTForImageClassification(config).eval()
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).logits.argmax(-1)
    result = evaluate_quality(model, model, list(zip(images, labels.tolist(), strict=True)), batch_size=2)
    assert isinstance(result.result, ClassificationQuality)
    assert result.result.baseline_accuracy == 1
    assert result.max_length is None
    with pytest.raises(EvaluationDataError, match="AutoImageProcessor"):
        evaluate_quality(model, model, [(object(), 0)])  # type: ignore[list-item]
    with pytest.raises(EvaluationDataError, match="have shapes"):
        evaluate_quality(model, model, [(images[0], 0), (images[0, :, :4], 1)])


class Scaler(ImageProcessingMixin):
    """A small image processor: rows of whole numbers to [0, 1]."""

    def __call__(self, image: list[list[int]], return_tensors: str) -> BatchFeature:
        pixels = torch.tensor(image, dtype=torch.float32) / 255
        return BatchFeature({"pixel_values": pixels[None, None]}, tensor_type=return_tensors)


def test_images_go_through_the_processor() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=2)
    ).eval()
    other = disturbed(model, 0.5)
    images = torch.randint(0, 256, (5, 8, 8))
    labels = [0, 1, 0, 1, 0]
    rows: Any = list(zip(images.tolist(), labels, strict=True))
    pixels = list(zip(images[:, None] / 255, labels, strict=True))
    assert evaluate_quality(other, model, rows, Scaler()) == evaluate_quality(other, model, pixels)


# --- language model ----------------------------------------------------------------------------------------


def oracle_window(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Log-probabilities [tokens - 1, vocabulary], one window at a time and unpadded."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=window[None]).logits[0, :-1]
    return logits.double().log_softmax(-1)


def windows_of(*lengths: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(0, len(WORDS), (length,)) for length in lengths]


def test_perplexity_counts_no_padding(language_model: LlamaForCausalLM) -> None:
    windows = windows_of(7, 2, 12, 5)
    result = perplexity(language_model, windows, batch_size=3)
    losses = [-oracle_window(language_model, w).gather(1, w[1:, None]).squeeze(1) for w in windows]
    assert result.tokens == 6 + 1 + 11 + 4
    assert result.window_nll == pytest.approx([float(loss.mean()) for loss in losses], rel=1e-5)
    assert result.nll == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(language_model: LlamaForCausalLM) -> None:
    nn.init.zeros_(language_model.lm_head.weight)
    assert perplexity(language_model, windows_of(9, 4)).perplexity == pytest.approx(len(WORDS), rel=1e-14)


def test_perplexity_delta_of_equal_windows_is_the_paired_t_interval(language_model: LlamaForCausalLM) -> None:
    other, windows = disturbed(language_model, 0.05), windows_of(9, 9, 9, 9, 9)
    result = perplexity_delta(other, language_model, windows, batch_size=2)
    old, new = (perplexity(model, windows, batch_size=2) for model in (language_model, other))
    differences = torch.tensor(new.window_nll, dtype=torch.float64) - torch.tensor(old.window_nll, dtype=torch.float64)
    mean, error = float(differences.mean()), float(differences.std()) / math.sqrt(5)
    assert result.ratio == pytest.approx(new.perplexity / old.perplexity)
    assert result.ratio == pytest.approx(math.exp(mean))
    assert result.ratio_low == pytest.approx(math.exp(mean - 2.776445 * error), rel=1e-6)
    assert result.ratio_high == pytest.approx(math.exp(mean + 2.776445 * error), rel=1e-6)
    assert (result.baseline_perplexity, result.candidate_perplexity) == pytest.approx((old.perplexity, new.perplexity))


def test_kl_and_agreement(language_model: LlamaForCausalLM) -> None:
    other, windows = disturbed(language_model, 0.05), windows_of(8, 3, 11)
    result = perplexity_delta(other, language_model, windows, batch_size=2)
    p, q = (torch.cat([oracle_window(model, w) for w in windows]) for model in (language_model, other))
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert result.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert result.ratio_low < result.ratio < result.ratio_high


def test_a_model_equals_itself(language_model: LlamaForCausalLM) -> None:
    result = perplexity_delta(copy.deepcopy(language_model), language_model, windows_of(8, 3, 11))
    assert (result.ratio, result.ratio_low, result.ratio_high) == (1, 1, 1)
    assert (result.kl, result.agreement) == (0, 1)


def test_batch_size_does_not_matter(language_model: LlamaForCausalLM) -> None:
    windows = windows_of(7, 2, 12, 5)
    values = [perplexity(language_model, windows, batch_size=size).nll for size in (1, 2, 4, 9)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_windows_cover_each_text_once() -> None:
    windows, dropped = text_windows([TEXTS[2], "cat", "", TEXTS[1]], make_tokenizer(), 5)
    assert [len(window) for window in windows] == [5, 5, 3]
    assert dropped == 3
    whole = make_tokenizer()(TEXTS[2])["input_ids"]
    assert torch.cat(windows[:2]).tolist() == whole[:10]


def test_windows_begin_with_bos_if_texts_do() -> None:
    windows, dropped = text_windows([TEXTS[2], "cat"], make_tokenizer(bos=True), 5)
    assert [window[0].item() for window in windows] == [2] * len(windows)
    assert [len(window) for window in windows] == [5, 5, 4, 2]
    assert dropped == 0
    body = torch.cat([window[1:] for window in windows[:3]]).tolist()
    assert body == make_tokenizer()(TEXTS[2])["input_ids"]


def test_evaluate_language_model(language_model: LlamaForCausalLM) -> None:
    other, tokenizer = disturbed(language_model, 0.05), make_tokenizer(pad=None)
    result = evaluate_quality(other, language_model, TEXTS, tokenizer, max_length=6, batch_size=2)
    windows, dropped = text_windows(TEXTS, tokenizer, 6)
    assert result.task == "causal-lm"
    assert result.dropped == dropped == 0
    assert result.result == perplexity_delta(other, language_model, windows, 2)
    assert evaluate_quality(other, language_model, LABELLED, tokenizer, max_length=6, batch_size=2) == result
    column = Dataset.from_dict({"text": TEXTS})
    assert evaluate_quality(other, language_model, column, tokenizer, max_length=6, batch_size=2) == result


def test_language_model_refusals(language_model: LlamaForCausalLM) -> None:
    for windows, message in (
        ([], "no windows"),
        (windows_of(5), "1 window"),
        ([torch.tensor([1]), torch.tensor([1, 2])], r"windows\[0\] has shape \(1,\)"),
        ([torch.tensor([[1, 2]]), torch.tensor([1, 2])], r"shape \(1, 2\)"),
        ([torch.tensor([1.0, 2.0]), torch.tensor([1, 2])], "float32"),
        ([torch.tensor([1, 2]), torch.tensor([1, 99])], "to 99, but the model has 15"),
    ):
        with pytest.raises(EvaluationDataError, match=message):
            perplexity_delta(language_model, language_model, windows)
    with pytest.raises(EvaluationDataError, match="batch_size=0"):
        perplexity(language_model, windows_of(5), batch_size=0)


def test_broken_language_models(language_model: LlamaForCausalLM) -> None:
    wider = LlamaForCausalLM(llama_config(vocab_size=len(WORDS) + 1))
    with pytest.raises(MeasurementError, match="vocabulary is 15 and the candidate's 16"):
        perplexity_delta(wider, language_model, windows_of(5, 6))
    broken = copy.deepcopy(language_model)
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(MeasurementError, match="NaN"):
        perplexity_delta(broken, language_model, windows_of(5, 6))
    with pytest.raises(MeasurementError, match="NaN"):
        perplexity(broken, windows_of(5, 6))
    nn.init.normal_(broken.lm_head.weight, std=1e6)
    with pytest.raises(MeasurementError, match="above 1e308"):
        perplexity(broken, windows_of(5, 6))


# --- embedder ----------------------------------------------------------------------------------------------


def test_mean_pool_sees_no_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [math.nan, math.inf]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]
    assert mean_pool(hidden[:, :2], torch.tensor([[0, 1]])).dtype == torch.float64


def test_embedding_similarity_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    turned = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    result = embedding_similarity(turned, torch.tensor([[1.0, 0.0]] * 4))
    cosines = angles.cos()
    assert result.mean == pytest.approx(float(cosines.mean()), rel=1e-12)
    assert result.min == pytest.approx(math.cos(0.3), rel=1e-12)
    assert result.p5 == pytest.approx(0.85 * math.cos(0.3) + 0.15 * math.cos(0.2), rel=1e-12)
    width = 3.182446 * float(cosines.std()) / 2
    assert result.mean_low == pytest.approx(float(cosines.mean()) - width, abs=1e-6)
    assert result.mean_high == min(1.0, pytest.approx(float(cosines.mean()) + width, abs=1e-6).expected)


@given(st.integers(2, 12), st.integers(0, 2**31), st.floats(0.01, 100))
@settings(deadline=None)
def test_cosines_are_ordered_and_ignore_scale(count: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    result = embedding_similarity(first, second)
    assert -1 <= result.min <= result.p5 + 1e-15
    assert result.mean <= 1
    assert result.mean_low <= result.mean <= result.mean_high
    assert embedding_similarity(first * scale, second).mean == pytest.approx(result.mean, abs=1e-12)
    assert embedding_similarity(first, first).min == pytest.approx(1, abs=1e-12)


def test_embedding_refusals() -> None:
    with pytest.raises(EvaluationDataError, match="not one"):
        embedding_similarity(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(EvaluationDataError, match="1 text"):
        embedding_similarity(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(MeasurementError, match="zero or not finite"):
        embedding_similarity(torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("build", [lambda: BertModel(bert_config()), lambda: LlamaModel(llama_config())])
def test_evaluate_embedder(build: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    other, tokenizer = disturbed(model), make_tokenizer()
    result = evaluate_quality(other, model, TEXTS, tokenizer, batch_size=3)
    sides = []
    for side in (model, other):
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
            sides.append(torch.cat([side(input_ids=i).last_hidden_state.mean(1) for i in ids]))
    oracle = nn.functional.cosine_similarity(*(side.double() for side in sides))
    assert isinstance(result.result, EmbeddingQuality)
    assert result.task == "embedding"
    assert result.result.mean == pytest.approx(float(oracle.mean()), abs=1e-6)
    assert result.result.min == pytest.approx(float(oracle.min()), abs=1e-6)


def test_padding_does_not_shift_absolute_positions() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2Model(config).eval()
    other, tokenizer = disturbed(model, 0.3), make_tokenizer()
    tokenizer.padding_side = "left"
    together, alone = (evaluate_quality(other, model, TEXTS, tokenizer, batch_size=size).result for size in (4, 1))
    assert isinstance(together, EmbeddingQuality)
    assert isinstance(alone, EmbeddingQuality)
    assert together.min == pytest.approx(alone.min, abs=1e-6)
    assert together.mean == pytest.approx(alone.mean, abs=1e-6)


def test_embedding_on_request_uses_the_body(classifier: BertForSequenceClassification) -> None:
    other, tokenizer = disturbed(classifier), make_tokenizer()
    asked = evaluate_quality(other, classifier, TEXTS, tokenizer, "embedding")
    assert asked.result == evaluate_quality(other.bert, classifier.bert, TEXTS, tokenizer).result


# --- the way in --------------------------------------------------------------------------------------------


def test_infer_task(classifier: BertForSequenceClassification, language_model: LlamaForCausalLM) -> None:
    class Mine(LlamaForCausalLM):
        pass

    assert infer_task(classifier) == "classification"
    assert infer_task(language_model) == "causal-lm"
    assert infer_task(Mine(llama_config())) == "causal-lm"
    assert infer_task(BertModel(bert_config())) == "embedding"
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is not known"):
        infer_task(BertForMaskedLM(bert_config()))
    with pytest.raises(UnsupportedModelError, match="A Linear is no transformers model"):
        infer_task(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="for causal-lm, its baseline for classification"):
        evaluate_quality(language_model, classifier, TEXTS, make_tokenizer())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "it is empty"),
        (Dataset.from_dict({"text": [], "label": []}), "it is empty"),
        ("the cat", "data is a str"),
        ({"text": TEXTS}, "data is a dict"),
        (Dataset.from_dict({"sentence": TEXTS}), "none is 'text'"),
        (TEXTS, "needs labels"),
        (["a cat", ("a dog", 1)], r"data\[0\] is a str"),
        ([("a", 0, 1)], r"data\[0\] is a tuple"),
        ([("a cat", 0), (torch.zeros(1, 2, 2), 0)], "of type Tensor, str"),
        ([("a cat", 0), ("a dog", 3)], r"data\[1\] is 3, but the model has num_labels=3"),
        ([("a cat", -1)], "is -1"),
        ([("a cat", "good")], "'good', no integer"),
        ([("a cat", None)], "None, no integer"),
        ([("", 0)], r"data\[0\] has no tokens"),
    ],
)
def test_data_that_does_not_fit(data: Any, message: str, classifier: BertForSequenceClassification) -> None:
    with pytest.raises(EvaluationDataError, match=message) as caught:
        evaluate_quality(classifier, classifier, data, make_tokenizer())
    assert caught.value.fix


def test_arguments_that_do_not_fit(
    classifier: BertForSequenceClassification, language_model: LlamaForCausalLM
) -> None:
    def refuse(message: str, error: type[Exception] = EvaluationDataError, **arguments: Any) -> None:
        call = {"model": classifier, "baseline": classifier, "data": LABELLED, "tokenizer": make_tokenizer()}
        with pytest.raises(error, match=message):
            evaluate_quality(**{**call, **arguments})

    refuse("tokenizer is a NoneType", tokenizer=None)
    refuse("tokenizer is a Scaler", tokenizer=Scaler())
    refuse("no padding token", tokenizer=make_tokenizer(pad=None))
    refuse("batch_size=0", batch_size=0)
    refuse("max_length=33 is not from 2 to the model's 32", max_length=33)
    refuse("max_length=1 ", max_length=1)
    refuse("batch_size='8' is a str", batch_size="8")
    refuse("batch_size=True is a bool", batch_size=True)
    refuse("max_length=9.0 is a float", max_length=9.0)
    refuse("task='clasification' .*Did you mean 'classification'", task="clasification")
    refuse("task='' ", task="")
    refuse("task=3 ", task=3)
    images = [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 2), 1)]
    refuse(r"can't run the data as", data=images)
    refuse("Images can't measure", data=[(torch.zeros(1, 2, 2), 0)], task="embedding")
    regression = BertForSequenceClassification(bert_config(num_labels=1))
    refuse("num_labels=1", UnsupportedModelError, model=regression, baseline=regression, data=[("a cat", 0)])
    refuse("gave no last_hidden_state|gave no logits", UnsupportedModelError, task="causal-lm",
           model=classifier.bert, baseline=classifier.bert)  # fmt: skip
    refuse("gave no logits of 3 dimensions", UnsupportedModelError, task="causal-lm")
    refuse("gave no logits of 2 dimensions", UnsupportedModelError, task="classification", batch_size=1,
           model=language_model, baseline=language_model, data=[("the cat", 0), ("a", 1)])  # fmt: skip
    alone = evaluate_quality(classifier, classifier, LABELLED, make_tokenizer(pad=None), batch_size=1)
    assert isinstance(alone.result, ClassificationQuality)


def test_decoder_classifier_reads_the_last_token() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=3, pad_token_id=0)).eval()
    other, tokenizer = disturbed(model, 0.3), make_tokenizer()
    together, alone = (evaluate_quality(other, model, LABELLED, tokenizer, batch_size=size) for size in (4, 1))
    assert together == alone
    tokenizer.padding_side = "left"
    assert evaluate_quality(other, model, LABELLED, tokenizer, batch_size=4) == alone
    for pad in (None, 1):
        model.config.pad_token_id = pad
        with pytest.raises(EvaluationDataError, match=f"pads with id 0, but the model's pad_token_id is {pad}"):
            evaluate_quality(other, model, LABELLED, tokenizer)


@pytest.mark.parametrize("pad", [None, 5])
def test_encoder_classifier_goes_by_the_mask(classifier: BertForSequenceClassification, pad: int | None) -> None:
    other, tokenizer = disturbed(classifier), make_tokenizer()
    expected = evaluate_quality(other, classifier, LABELLED, tokenizer, batch_size=1)
    for model in (classifier, other):
        model.config.pad_token_id = pad
    assert evaluate_quality(other, classifier, LABELLED, tokenizer, batch_size=4) == expected


def test_positions_under_another_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert evaluate_quality(model, model, TEXTS, make_tokenizer()).max_length == 8
    with pytest.raises(EvaluationDataError, match="the model's 8 positions"):
        evaluate_quality(model, model, TEXTS, make_tokenizer(), max_length=9)


def test_training_flags_come_back(classifier: BertForSequenceClassification) -> None:
    other = disturbed(classifier).train()
    other.bert.encoder.layer[0].eval()
    before = [module.training for module in other.modules()]
    first, second = (evaluate_quality(other, classifier, LABELLED, make_tokenizer()) for _ in range(2))
    assert first == second  # dropout was off
    assert [module.training for module in other.modules()] == before
    assert not classifier.training
    with pytest.raises(EvaluationDataError):
        evaluate_quality(other, classifier, [("a cat", 7)], make_tokenizer())
    assert [module.training for module in other.modules()] == before


def test_results_are_strict_json(classifier: BertForSequenceClassification, language_model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    results = [
        evaluate_quality(classifier, classifier, LABELLED, tokenizer),
        evaluate_quality(language_model, language_model, TEXTS, tokenizer),
        evaluate_quality(classifier.bert, classifier.bert, TEXTS, tokenizer),
    ]
    kinds = [type(QualityResult.model_validate_json(result.model_dump_json()).result) for result in results]
    assert kinds == [ClassificationQuality, CausalLMQuality, EmbeddingQuality]
    with pytest.raises(ValueError, match="extra"):
        QualityResult.model_validate({**results[0].model_dump(), "score": 1})
    with pytest.raises(ValueError, match="frozen"):
        results[0].truncated = 1  # type: ignore[misc]
