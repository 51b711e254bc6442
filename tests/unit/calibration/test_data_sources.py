from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import ViTImageProcessorPil, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor, WhisperProcessor

from hf_compress.calibration.data import CalibrationSet, digest, prepare
from hf_compress.calibration.data_batches import ready_batches
from hf_compress.core.config import Calibration
from tests._utils.tiny import output, tiny, tiny_tokenizer

TEXTS = [f"the text number {number} of all" for number in range(24)]
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)


class Torch(TorchDataset[Any]):
    """Texts with labels."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return TEXTS[index], index % 2


def made(data: Any, family: str = "bert", **options: Any) -> CalibrationSet:
    options.setdefault("tokenizer", tiny_tokenizer())
    return prepare(Calibration(data, **options), tiny(family))


def txt(folder: Path) -> Path:
    path = folder / "x.txt"
    path.write_text("\ufeff" + "\n\n".join(TEXTS), encoding="utf-8")
    return path


def jsonl(folder: Path) -> str:
    path = folder / "x.jsonl"
    path.write_text("\n".join(json.dumps({"id": 3, "text": text}) for text in TEXTS))
    return str(path)


def parquet(folder: Path) -> Path:
    Dataset.from_dict({"label": [0] * len(TEXTS), "text": TEXTS}).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def stream(folder: Path) -> Iterator[str]:
    return (text for text in TEXTS)


FORMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "list": (lambda folder: TEXTS, "texts"),
    "tuple": (lambda folder: tuple(TEXTS), "texts"),
    "labelled": (lambda folder: [(text, 1) for text in TEXTS], "texts"),
    "objects": (lambda folder: [{"text": text, "id": 3} for text in TEXTS], "texts"),
    "stream": (stream, "texts"),
    "txt": (txt, "file"),
    "jsonl": (jsonl, "file"),
    "parquet": (parquet, "file"),
    "dataset": (lambda folder: Dataset.from_dict({"label": [0] * len(TEXTS), "text": TEXTS}), "dataset"),
    "streamed-dataset": (lambda folder: Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), "dataset"),
    "torch-dataset": (lambda folder: Torch(), "dataset"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_texts_in_any_form_give_the_same_batches(form: str, tmp_path: Path) -> None:
    make, source = FORMS[form]
    found, expected = made(make(tmp_path), rows=16), made(TEXTS, rows=16)
    assert found.record.source == source
    assert found.record.sha256 == expected.record.sha256
    assert found.record.rows == 16


def test_a_named_column_is_taken() -> None:
    data = Dataset.from_dict({"text": ["no"] * len(TEXTS), "body": TEXTS})
    assert made(data, column="body").record.sha256 == made(TEXTS).record.sha256


def test_rows_of_ids_in_a_dataset_are_taken_with_their_mask() -> None:
    encoded = tiny_tokenizer()(TEXTS, padding=True)
    data = Dataset.from_dict({**encoded, "labels": [0] * len(TEXTS)})
    assert made(data).record.sha256 == made(TEXTS).record.sha256


def images(kind: str) -> Any:
    forms: dict[str, Callable[[], Any]] = {
        "pil": lambda: [Image.fromarray(pixels) for pixels in PIXELS],
        "arrays": lambda: list(PIXELS),
        "array": lambda: PIXELS,
        "bytes": lambda: [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in PIXELS],
        "labelled": lambda: [(pixels, 3) for pixels in PIXELS],
        "column": lambda: [{"image": Image.fromarray(pixels), "label": 3} for pixels in PIXELS],
    }
    return forms[kind]()


@pytest.mark.parametrize("kind", ["pil", "arrays", "array", "bytes", "labelled", "column"])
def test_images_of_any_form_go_through_the_image_processor(kind: str) -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    result = made(images(kind), "vit", tokenizer=processor, rows=12, batch_size=5)
    assert result.record.source == "images"
    assert (result.record.tokens, result.record.sequence_length) == (None, None)
    assert [len(batch["pixel_values"]) for batch in result.batches] == [5, 5, 2]
    wanted = {digest([{"x": processor(pixels, return_tensors="pt")["pixel_values"][0]}]) for pixels in PIXELS}
    assert {digest([{"x": row}]) for batch in result.batches for row in batch["pixel_values"]} == wanted


def test_floating_tensors_are_pixels_already() -> None:
    pixels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = made(pixels, "vit")
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in whole.batches]), pixels)
    assert made(list(pixels), "vit").record.rows == 12


def test_sound_goes_through_the_feature_extractor_at_the_models_rate() -> None:
    sound = np.sin(np.arange(800, dtype=np.float64) / 7)
    extractor = Wav2Vec2FeatureExtractor()
    result = made([sound] * 9, "wav2vec2", tokenizer=extractor)
    named = made([{"array": sound, "sampling_rate": 16000}] * 9, "wav2vec2", tokenizer=extractor)
    assert result.record.sha256 == named.record.sha256
    assert result.record.source == "sound"
    expected = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
    assert torch.allclose(result.batches[0]["input_values"][0], expected[0], atol=1e-6)  # float32 against float64


def test_a_decoder_behind_sound_gets_its_start_token() -> None:
    features = torch.randn(8, 8, 24, generator=torch.Generator().manual_seed(0))
    (batch,) = made([{"input_features": features}], "whisper").batches
    assert batch["decoder_input_ids"].tolist() == [[1]] * 8


def test_a_decoder_behind_sound_gets_what_is_said() -> None:
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=3840, chunk_length=1, hop_length=160)
    processor = WhisperProcessor(extractor, tiny_tokenizer())
    sound = np.sin(np.arange(3840, dtype=np.float32) / 7)
    spoken = ["one", "three"] * 4
    data = [{"audio": {"array": sound, "sampling_rate": 3840}, "text": text} for text in spoken]
    result = made(data, "whisper", tokenizer=processor, batch_size=2, rows=8)
    one, three = (tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in spoken[:2])
    for batch in result.batches:
        assert all(row in ([1, *one, 2, 0], [1, *three]) for row in batch["decoder_input_ids"].tolist())
        assert batch["input_features"].shape == (2, 8, 24)
        assert output(tiny("whisper"), batch).isfinite().all()
    assert made(data, "whisper", tokenizer=extractor).batches[0]["decoder_input_ids"].shape == (8, 1)


def batches_of(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 100, (6, 40), generator=generator)} for _ in range(count)]


def test_a_loader_is_read_in_its_order_which_follows_from_the_seed() -> None:
    ids = torch.cat([batch["input_ids"] for batch in batches_of(4)])
    rows = [{"input_ids": row, "labels": torch.tensor(1)} for row in ids]
    loader: Any = DataLoader(rows, batch_size=6, shuffle=True)  # type: ignore[arg-type]
    first = made(loader, rows=12, batch_size=4)
    assert first.record.rows == 12
    assert made(loader, rows=12, batch_size=4).record == first.record
    assert made(loader, rows=12, batch_size=4, seed=1).record.sha256 != first.record.sha256
    assert [set(batch) for batch in first.batches] == [{"input_ids"}] * len(first.batches)
    pairs: Any = DataLoader([(row, 1) for row in ids], batch_size=6)  # type: ignore[arg-type]
    assert torch.equal(made(pairs, rows=6, batch_size=6, min_tokens=1).batches[0]["input_ids"], ids[:6])


def test_ready_batches_are_split_and_cut_but_keep_their_rows() -> None:
    ids = batches_of(1)[0]["input_ids"]
    result = made({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}, rows=5, batch_size=2, min_tokens=1)
    assert [len(batch["input_ids"]) for batch in result.batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in result.batches]), ids[:5])
    assert all(batch["token_type_ids"].shape == batch["input_ids"].shape for batch in result.batches)


def test_rows_of_padding_alone_are_dropped_with_all_that_belongs_to_them() -> None:
    ids = batches_of(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[2] = 0
    mask[3, 20:] = 0
    result = made([{"input_ids": ids, "attention_mask": mask}], rows=5, min_tokens=1)
    assert torch.equal(result.batches[0]["input_ids"], ids[[0, 1, 3, 4, 5]])
    assert result.record.tokens == 4 * 40 + 20


def test_a_batch_with_other_things_than_rows_stays_whole() -> None:
    batch = {"input_ids": torch.full((3, 8), 7), "pixel_values": torch.ones(5, 3, 16, 16)}
    (whole,) = ready_batches([batch], tiny("llava"), rows=2, batch_size=2)
    assert {name: len(value) for name, value in whole.items()} == {"input_ids": 3, "pixel_values": 5}


def test_floating_inputs_get_the_models_data_type() -> None:
    model = tiny("vit", dtype=torch.bfloat16)
    (batch,) = prepare(Calibration([{"pixel_values": np.zeros((8, 3, 16, 16))}]), model).batches
    assert batch["pixel_values"].dtype == torch.bfloat16
