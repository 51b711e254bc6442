from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTImageProcessorPil

from hf_compress.calibration.data import prepare
from hf_compress.calibration.distilled import distilled_images, statistics_distance
from hf_compress.calibration.generated_text import GREEDY
from hf_compress.core.config import Calibration
from hf_compress.core.errors import CalibrationError
from tests._utils.tiny import tiny, tiny_tokenizer


def tokens(model: nn.Module, **options: Any) -> Tensor:
    result = prepare(Calibration.generated(**{"rows": 10, "sequence_length": 32, **options}), model)
    assert result.record.source == "self-generated"
    return torch.cat([batch["input_ids"] for batch in result.batches])


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    return {name: value.clone() for name, value in model.state_dict().items()}, [m.training for m in model.modules()]


def unchanged(model: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> bool:
    values, modes = state(model)
    same = all(torch.equal(value, before[0][name]) for name, value in values.items())
    return same and modes == before[1] and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generated_text_starts_anywhere_and_goes_on_with_the_likeliest_tokens(family: str) -> None:
    model = tiny(family).train()
    before = state(model)
    ids = tokens(model)
    assert unchanged(model, before)
    assert ids.shape == (10, 32)
    assert len(set(ids[:, 0].tolist())) > 5
    assert not {0, 1, 2} & set(ids[:, 0].tolist()) or family == "gpt2"
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits  # in one pass, without cache
    likeliest = logits.argmax(dim=-1)
    assert torch.equal(ids[:, 1:GREEDY], likeliest[:, : GREEDY - 1])
    assert not torch.equal(ids[:, GREEDY + 1 :], likeliest[:, GREEDY:-1])


def test_later_tokens_follow_the_models_probabilities() -> None:
    """A model whose next token depends on nothing: counts against its softmax."""
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[7:11] = model.model.norm.weight.data.sign()
    model.model.norm.weight.data.zero_()  # the logits are 0 for all tokens
    drawn = tokens(model, rows=64, sequence_length=64)[:, GREEDY + 1 :].flatten()
    counts = torch.bincount(drawn, minlength=model.config.vocab_size).double()
    expected = drawn.numel() / model.config.vocab_size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 127 + 4 * (2 * 127) ** 0.5  # 127 degrees of freedom, four deviations above the mean


def test_generated_text_follows_from_the_seed() -> None:
    model = tiny("llama")
    assert torch.equal(tokens(model), tokens(model))
    assert not torch.equal(tokens(model), tokens(model, seed=1))


def test_generated_text_begins_as_the_tokenizer_begins() -> None:
    ids = tokens(tiny("llama"), tokenizer=tiny_tokenizer())
    assert ids[:, 0].tolist() == [1] * 10
    assert not set(range(5)) & set(ids[:, 1].tolist())


def test_a_model_with_nan_logits_writes_nothing() -> None:
    model = tiny("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        tokens(model)


def trained(family: str = "resnet") -> nn.Module:
    """A network whose running statistics are those of some data."""
    model = tiny(family).train()
    data = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.7
    with torch.no_grad():
        for _ in range(40):
            model(pixel_values=data)
    return model


def test_distilled_images_have_the_statistics_that_the_network_has_learned() -> None:
    model = trained()
    before = state(model)
    batches = distilled_images(model, Calibration(rows=12, image_size=32), None, steps=60)
    assert unchanged(model, before)
    assert [len(batch["pixel_values"]) for batch in batches] == [8, 4]
    model.eval()
    images = torch.cat([batch["pixel_values"] for batch in batches])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert statistics_distance(model, images) < 0.05 * statistics_distance(model, noise)


def test_distilled_images_follow_from_the_seed_and_have_the_size_asked_for() -> None:
    model = trained()
    request = Calibration(rows=2, image_size=(16, 24))
    (first,) = distilled_images(model, request, None, steps=3)
    (second,) = distilled_images(model, request, None, steps=3)
    (other,) = distilled_images(model, Calibration(rows=2, image_size=(16, 24), seed=1), None, steps=3)
    assert first["pixel_values"].shape == (2, 3, 16, 24)
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_the_distance_of_statistics_against_float64() -> None:
    model = trained().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    seen: list[tuple[Tensor, nn.BatchNorm2d]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, arguments: seen.append((arguments[0].double(), module)))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(pixel_values=images)
        for handle in handles:
            handle.remove()
        measured = float(statistics_distance(model, images))
    total = 0.0
    for value, norm in seen:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        flat = value.transpose(0, 1).flatten(1)
        means = (flat.mean(1) - mean.double()) ** 2
        deviations = (flat.std(1, correction=0) - variance.double().sqrt()) ** 2
        total += float(((means + deviations) / variance.double()).mean())
    assert len(seen) > 3
    assert measured == pytest.approx(total, rel=1e-3)  # float32, and 1e-6 under the root


@pytest.mark.parametrize("family", ["efficientnet", "mobilenet"])
def test_images_have_the_size_that_the_config_tells(family: str) -> None:
    (batch,) = distilled_images(tiny(family), Calibration(rows=2), None, steps=1)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)


def test_pixels_stay_within_what_the_image_processor_makes() -> None:
    model = tiny("resnet")
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 20}, image_mean=[0.5, 0.5, 0.2], image_std=[0.5, 1, 1]
    )
    (batch,) = distilled_images(model, Calibration(rows=8, tokenizer=processor), None, steps=2)
    pixels = batch["pixel_values"]
    assert pixels.shape == (8, 3, 16, 20)
    white = processor(np.full((16, 20, 3), 255, dtype=np.uint8), return_tensors="pt")["pixel_values"][0, :, 0, 0]
    black = processor(np.zeros((16, 20, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"][0, :, 0, 0]
    # noise of deviation 1 reaches beyond both ends of the first two channels; float32
    assert torch.allclose(pixels.amax((0, 2, 3))[:2], white[:2], atol=1e-6)
    assert torch.allclose(pixels.amin((0, 2, 3)), black, atol=1e-6)
    assert (pixels.amax((0, 2, 3)) <= white + 1e-6).all()


def test_a_network_with_batch_normalisation_makes_its_own_images() -> None:
    model = tiny("resnet", hidden_sizes=[16], depths=[1])
    record = prepare(Calibration.generated(rows=2, image_size=16), model).record
    assert (record.source, record.rows, record.tokens) == ("distilled", 2, None)
