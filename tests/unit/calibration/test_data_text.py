from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_compress.calibration.data import CalibrationSet, prepare
from hf_compress.calibration.data_model import position_limit
from hf_compress.calibration.data_sources import order
from hf_compress.calibration.data_text import padded
from hf_compress.core.config import Calibration
from hf_compress.core.errors import CalibrationError
from tests._utils.tiny import VOCABULARY, output, tiny, tiny_tokenizer

BOS, EOS, PAD = 1, 2, 0
TEXTS = [f"number {number} " + "word " * (number % 13) for number in range(60)]
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def made(data: Any, family: str = "llama", **options: Any) -> CalibrationSet:
    options.setdefault("tokenizer", tiny_tokenizer())
    return prepare(Calibration(data, **options), tiny(family))


def rows(result: CalibrationSet) -> list[list[int]]:
    """The ids of every row, padding left out."""
    found = []
    for batch in result.batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found += [ids[seen].tolist() for ids, seen in zip(batch["input_ids"], mask, strict=True)]
    return found


def plain(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_packed_rows_are_cut_from_the_texts_in_drawn_order_with_the_end_token_between() -> None:
    stream = [token for index in order(len(TEXTS), 3) for token in [*plain(TEXTS[index]), EOS]]
    whole = [[BOS, *stream[start : start + 30], EOS] for start in range(0, len(stream) - 29, 30)]
    packed = made(TEXTS, rows=10, sequence_length=32, seed=3)
    assert packed.record.packed
    assert [len(row) for row in rows(packed)] == [32] * 10
    kept = [whole.index(row) for row in rows(packed)]
    assert len(set(kept)) == 10
    assert kept != sorted(kept)
    assert made(TEXTS, rows=10, sequence_length=32, seed=4).record.sha256 != packed.record.sha256


def test_a_text_that_ends_with_the_end_token_gets_no_second_one() -> None:
    ids = rows(made(["abc[EOS]"] * 300, sequence_length=32, rows=8))[0]
    assert [EOS, EOS] not in [ids[index : index + 2] for index in range(30)]


def test_unpacked_rows_are_what_the_tokenizer_makes_of_each_text() -> None:
    unpacked = made(TEXTS, "bert", rows=len(TEXTS))
    tokenizer = tiny_tokenizer()
    assert not unpacked.record.packed
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = [ids if len(ids) <= 64 else [*ids[:63], EOS] for ids in expected]
    assert max(map(len, expected)) == 64
    assert sorted(rows(unpacked)) == sorted(expected)
    assert unpacked.record.tokens == sum(map(len, expected))


def test_padding_is_on_the_right_and_masked_and_only_where_needed() -> None:
    batches = padded([[5, 6, 7], [8], [9, 9, 9]], pad=0, batch_size=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[8, 0, 0], [5, 6, 7]], [[9, 9, 9]]]
    assert batches[0]["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert "attention_mask" not in batches[1]


def test_padding_on_the_left_and_no_padding_token_make_no_difference() -> None:
    other = tiny_tokenizer()
    other.padding_side = "left"
    assert made(TEXTS, "bert", tokenizer=other).record == made(TEXTS, "bert").record
    other.pad_token = None
    assert rows(made(TEXTS, "bert", tokenizer=other)) == rows(made(TEXTS, "bert"))


def test_padded_batches_give_what_single_rows_give() -> None:
    model = tiny("bert")
    batches = made(TEXTS, "bert", rows=8).batches
    assert any("attention_mask" in batch for batch in batches)
    for batch in batches:
        together = output(model, batch)
        for number, ids in enumerate(rows(CalibrationSet((batch,), made(TEXTS).record))):
            alone = output(model, {"input_ids": torch.tensor([ids])})[0]
            # float32, two layers: sums in another order
            assert torch.allclose(together[number, : len(ids)], alone, atol=1e-5)


def test_conversations_are_written_by_the_template_without_more_special_tokens() -> None:
    talks = [[{"role": "user", "content": f"Hi {number}"}, {"role": "bot", "content": "Yes"}] for number in range(80)]
    result = made(talks, "llama", rows=8, sequence_length=40, chat_template=TEMPLATE)
    stream = [token for index in order(80, 0) for token in [*plain(f"<user>Hi {index}<bot>Yes"), EOS]]
    whole = [stream[start : start + 40] for start in range(0, len(stream) - 39, 40)]
    assert result.record.source == "conversations"
    assert all(row in whole for row in rows(result))
    assert made(Dataset.from_dict({"messages": talks}), rows=8, sequence_length=40, chat_template=TEMPLATE).batches


def test_one_conversation_is_data_too() -> None:
    talk = [{"role": "user", "content": "word " * 40}, {"role": "bot", "content": "Yes"}]
    assert made(talk, rows=2, sequence_length=64, chat_template=TEMPLATE, min_tokens=1).record.rows == 2


def test_rows_of_token_ids_lose_what_their_mask_hides_and_nothing_else() -> None:
    encoded = tiny_tokenizer()(TEXTS[:9], padding=True, padding_side="left")
    result = made(encoded, rows=9)
    assert result.record.source == "token ids"
    assert sorted(rows(result)) == sorted(tiny_tokenizer()(TEXTS[:9])["input_ids"])
    assert max(map(len, rows(made(encoded, rows=9, sequence_length=12, min_tokens=1)))) == 12


def test_a_decoder_gets_the_text_itself_moved_behind_its_start_token() -> None:
    model = tiny("bart")
    result = made(TEXTS[:12], "bart", rows=12, batch_size=4)
    assert any("decoder_attention_mask" in batch for batch in result.batches)
    for batch in result.batches:
        assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 4
        assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
        if "attention_mask" in batch:
            assert torch.equal(batch["decoder_attention_mask"][:, 1:], batch["attention_mask"][:, :-1])
        assert output(model, batch).isfinite().all()


def test_labels_become_decoder_inputs_as_the_model_itself_makes_them() -> None:
    model = tiny("bart")
    labels = torch.randint(5, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))
    labels[3, 4:] = -100
    batch = {"input_ids": torch.full((8, 40), 7), "labels": labels}
    (made_,) = prepare(Calibration([batch]), model).batches
    assert torch.equal(made_["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels))
    assert made_["decoder_attention_mask"].tolist()[3] == [1, 1, 1, 1, 1, 0]
    assert "labels" not in made_


@pytest.mark.parametrize("family", ["roberta", "bert", "gpt2"])
def test_the_position_limit_is_the_longest_row_that_a_model_reads(family: str) -> None:
    model = tiny(family)
    limit = position_limit(model)
    assert limit is not None
    ids = torch.full((1, limit), 7)
    output(model, {"input_ids": ids})
    with pytest.raises((IndexError, RuntimeError)):
        output(model, {"input_ids": torch.cat([ids, ids[:, :1]], dim=1)})


def test_rows_are_at_most_512_tokens_unless_asked_for() -> None:
    model = tiny("llama", max_position_embeddings=2048)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4096
    assert prepare(Calibration(TEXTS * 30, tokenizer=tokenizer), model).record.sequence_length == 512
    assert prepare(Calibration(TEXTS * 90, tokenizer=tokenizer, sequence_length=2048), model).record.rows >= 8


def test_too_few_rows_of_a_small_request_are_what_was_asked_for() -> None:
    assert made(TEXTS[:2], "bert", rows=2, min_tokens=1).record.rows == 2
    with pytest.raises(CalibrationError, match="1 usable rows of 2 texts, 1 without any token"):
        made([TEXTS[0], " "], "bert", rows=2, min_tokens=1)


def test_without_data_a_language_model_gets_the_text_of_python(caplog: pytest.LogCaptureFixture) -> None:
    result = prepare(Calibration(tokenizer=tiny_tokenizer(), rows=16), tiny("llama"))
    assert result.record.model_dump(exclude={"sha256"}) == {
        "source": "default",
        "rows": 16,
        "tokens": 16 * 64,
        "sequence_length": 64,
        "seed": 0,
        "packed": True,
    }
    assert "pydoc_data.topics" in caplog.text
    assert prepare(Calibration(tokenizer=tiny_tokenizer(), rows=16), tiny("bert-mlm")).record.source == "default"


def test_the_models_own_tokenizer_is_read(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert prepare(Calibration(TEXTS), tiny("llama"), tmp_path).record == made(TEXTS).record
    assert made(TEXTS, tokenizer=str(tmp_path)).record == made(TEXTS).record


def test_the_draw_is_the_same_in_every_process_and_version() -> None:
    """Every run of the tests has another hash seed."""
    assert made(TEXTS, rows=10).record.sha256 == "3174bf17c076e2e5d52a0b57b71d1af4524cadc12223cde0c35414a0a4eee361"
    assert made(TEXTS, "bert").record.sha256 == "061e3714888e003510f698c2a9c255eeec9c23a5e9ce00c2dc39f951a9fca495"


def test_a_live_model_is_not_changed() -> None:
    model = tiny("llama")
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(Calibration(TEXTS, tokenizer=tiny_tokenizer()), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
