"""The reference models and data: safe to fetch, split without leaks, and unchanged by the rotation."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetForImageClassification,
)

from examples.reference import ReferenceUnavailable, digits, lstm
from examples.reference.cache import build_once, folder_size
from examples.reference.packages import PackageSpec, fetch, unpack
from examples.reference.ratings import Row, near_duplicate_groups, rated_texts, split
from examples.reference.sentiment import accuracy, classifier, held_out, training_rows
from examples.reference.smollm2 import (
    off_grid_smollm2,
    plain_smollm2,
    relative_change,
    rotate_residual_stream,
)
from examples.reference.texts import excerpt, news_snippets, technical_prose, token_windows
from examples.reference.training import batches, train
from tests._utils.tiny import tiny_tokenizer


def zip_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        for name, target in (links or {}).items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = tarfile.SYMTYPE, target
            archive.addfile(header)
    return buffer.getvalue()


def spec_of(content: bytes, nested: tuple[str, ...] = ()) -> PackageSpec:
    return PackageSpec("thing", "1.0", hashlib.sha256(content).hexdigest(), nested=nested)


def giving(content: bytes) -> Callable[[PackageSpec, Path], Path]:
    def download(spec: PackageSpec, folder: Path) -> Path:
        archive = folder / "thing-1.0.bin"
        archive.write_bytes(content)
        return archive

    return download


def refusing(spec: PackageSpec, folder: Path) -> Path:
    raise ReferenceUnavailable(str(spec), "the network was asked")


def left_behind(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name != ".locks"]


def available(get: Callable[..., Any], *arguments: Any) -> Any:
    """What `get` returns, or a skip that says why it can't be had here."""
    try:
        return get(*arguments)
    except ReferenceUnavailable as error:
        pytest.skip(str(error))


class TestFetch:
    def test_unpacks_nested_archives_and_keeps_nothing_else(self, tmp_path: Path) -> None:
        inner = tar_bytes({"data/rows.txt": b"1\t2.0\tgood"})
        content = zip_bytes({"thing/inner.tar.gz": inner, "thing/readme": b"hello"})
        folder = fetch(spec_of(content, ("thing/inner.tar.gz",)), downloader=giving(content), root=tmp_path)
        assert (folder / "thing/data/rows.txt").read_bytes() == b"1\t2.0\tgood"
        assert [path.name for path in folder.iterdir()] == ["thing"]
        assert left_behind(tmp_path) == [folder]

    def test_second_call_asks_no_network(self, tmp_path: Path) -> None:
        content = zip_bytes({"thing/readme": b"hello"})
        first = fetch(spec_of(content), downloader=giving(content), root=tmp_path)
        assert fetch(spec_of(content), downloader=refusing, root=tmp_path) == first

    def test_wrong_digest_is_refused_and_leaves_nothing(self, tmp_path: Path) -> None:
        content = zip_bytes({"thing/readme": b"hello"})
        with pytest.raises(ReferenceUnavailable, match=r"thing==1\.0 .*sha256 of thing-1\.0\.bin is"):
            fetch(spec_of(b"something else"), downloader=giving(content), root=tmp_path)
        assert left_behind(tmp_path) == []

    def test_failed_download_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ReferenceUnavailable, match="the network was asked"):
            fetch(spec_of(b""), downloader=refusing, root=tmp_path)
        assert left_behind(tmp_path) == []

    @pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..\\x", "C:\\x"])
    @pytest.mark.parametrize("pack", [zip_bytes, tar_bytes])
    def test_member_outside_the_archive_is_refused(
        self, tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], name: str
    ) -> None:
        content = pack({"good": b"", name: b"evil"})
        root = tmp_path / "cache"
        with pytest.raises(ReferenceUnavailable, match="points outside"):
            fetch(spec_of(content), downloader=giving(content), root=root)
        assert left_behind(root) == []
        assert left_behind(tmp_path) == [root]

    def test_link_outside_the_archive_is_refused(self, tmp_path: Path) -> None:
        archive = tmp_path / "links.tar.gz"
        archive.write_bytes(tar_bytes({}, links={"link": "../../etc/passwd"}))
        folder = tmp_path / "into"
        folder.mkdir()
        with pytest.raises(ReferenceUnavailable, match="can't be unpacked safely"):
            unpack(archive, folder)
        assert left_behind(folder) == []

    def test_not_an_archive_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ReferenceUnavailable, match="can't be unpacked safely"):
            fetch(spec_of(b"text"), downloader=giving(b"text"), root=tmp_path)

    def test_error_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(ReferenceUnavailable("thing", "why")))  # noqa: S301
        assert (error.what, error.reason) == ("thing", "why")


class TestCache:
    def test_loser_of_a_race_takes_the_winners_folder(self, tmp_path: Path) -> None:
        def build(folder: Path) -> None:
            (folder / "mine").touch()
            winner = tmp_path / "name"
            winner.mkdir()
            (winner / "theirs").touch()

        folder = build_once("name", build, tmp_path)
        assert [path.name for path in folder.iterdir()] == ["theirs"]
        assert left_behind(tmp_path) == [folder]

    def test_size_counts_all_files(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "a").write_bytes(b"12")
        (tmp_path / "sub" / "b").write_bytes(b"345")
        assert folder_size(tmp_path) == 5


class TestSplit:
    def test_groups_are_those_of_all_pairs(self) -> None:
        texts = [" ".join("abcdefgh"[(i * j) % 8] * 2 for j in range(1 + i % 5)) for i in range(60)]
        groups = near_duplicate_groups(texts, similarity=0.6)
        sets = [set(text.split()) for text in texts]
        slow = list(range(len(texts)))
        for i, first in enumerate(sets):
            for j, second in enumerate(sets):
                if len(first & second) >= 0.6 * len(first | second):
                    slow = [slow[i] if group == slow[j] else group for group in slow]
        for i in range(len(texts)):
            for j in range(len(texts)):
                assert (groups[i] == groups[j]) == (slow[i] == slow[j])

    def test_punctuation_case_and_user_names_make_no_difference(self) -> None:
        groups = near_duplicate_groups(["@anonymous LOVE it!!", "love it", "hate it", ":)", ":("])
        assert groups[0] == groups[1]
        assert len(set(groups)) == 4

    def test_group_stays_on_one_side_and_seed_decides(self) -> None:
        everything = [Row("tweets", f"word{n // 3} other{n // 3}", n % 2) for n in range(90)]
        training, held = split(everything, held_out_per_domain=20, seed=1)
        assert len(held) == 18  # whole groups of three only
        assert len(training) + len(held) == 90
        assert not {row.text for row in training} & {row.text for row in held}
        assert split(everything, held_out_per_domain=20, seed=1) == (training, held)
        assert split(everything, held_out_per_domain=20, seed=2) != (training, held)

    def test_real_split_has_no_near_duplicates_across(self) -> None:
        training, held = available(training_rows), available(held_out)
        assert (len(training), len(held)) == (5217, 1200)
        texts = [text for text, _ in training + held]
        groups = near_duplicate_groups(texts)
        assert not set(groups[: len(training)]) & set(groups[len(training) :])
        assert held_out("tweets") + held_out("amazon") == held

    def test_unknown_domain_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'movies'"):
            held_out("movies")  # type: ignore[arg-type]

    def test_rating_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.txt"
        file.write_bytes(b"1\t2.5\tgood &amp; cheap\ttoo \r\n1_2\t-0.9\tbad\r\n")
        assert rated_texts(file) == [(2.5, "good & cheap\ttoo"), (-0.9, "bad")]


class TestSmolLM2:
    @pytest.mark.parametrize("tied", [True, False])
    def test_rotation_keeps_the_function(self, tied: bool) -> None:
        model = tiny_llama(tied)
        ids = torch.arange(12).reshape(1, -1)
        with torch.inference_mode():
            before = model(input_ids=ids).logits
        old = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        rotate_residual_stream(model)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.inference_mode():
            assert relative_change(before, model(input_ids=ids).logits) < 1e-5
        for name, value in model.state_dict().items():
            assert not torch.allclose(value, old[name]), name
        assert not model.config.tie_word_embeddings
        assert model.lm_head.weight is not model.model.embed_tokens.weight

    def test_biases_are_refused(self) -> None:
        with pytest.raises(ValueError, match="without biases"):
            rotate_residual_stream(tiny_llama(tied=True, attention_bias=True))

    @pytest.mark.slow
    @pytest.mark.timeout(1200)  # the first call builds the model
    def test_rotated_computes_the_same_and_is_off_the_grid(self) -> None:
        rotated_folder, plain_folder = available(off_grid_smollm2), available(plain_smollm2)
        for folder, tied in ((plain_folder, True), (rotated_folder, False)):
            config = json.loads((folder / "config.json").read_text())
            assert "quantization_config" not in config
            assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", tied)
        plain = AutoModelForCausalLM.from_pretrained(plain_folder).eval()
        rotated = AutoModelForCausalLM.from_pretrained(rotated_folder).eval()
        ids = AutoTokenizer.from_pretrained(rotated_folder)("Water boils at", return_tensors="pt").input_ids
        with torch.inference_mode():
            assert relative_change(plain(ids).logits, rotated(ids).logits) < 1e-4
        assert distinct_values_per_group(plain) <= 16
        assert distinct_values_per_group(rotated) > 30


class TestSentiment:
    @pytest.mark.slow
    @pytest.mark.timeout(1200)  # the first call builds the model
    def test_accuracy_is_the_recorded_one(self) -> None:
        folder = available(classifier)
        recorded = json.loads((folder / "reference.json").read_text())["held_out_accuracy"]
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert recorded["tweets"] > 0.93
        assert recorded["amazon"] > 0.80
        for domain, share in recorded.items():
            assert accuracy(model, tokenizer, held_out(domain)) == pytest.approx(share, abs=0.005)


class TestTraining:
    def test_every_epoch_has_every_row_once_in_an_order_of_its_own(self) -> None:
        recipe = digits.Recipe(epochs=3, batch_size=4)
        order = [row for batch in batches(10, recipe) for row in batch]
        epochs = [order[start : start + 10] for start in (0, 10, 20)]
        assert [sorted(epoch) for epoch in epochs] == [[*range(10)]] * 3
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert [len(batch) for batch in batches(10, recipe)] == [4, 4, 2] * 3
        assert list(batches(10, recipe)) == list(batches(10, recipe))

    def test_finds_the_least_squares_solution(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs, wanted = torch.randn(64, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
        found = torch.nn.Parameter(torch.zeros(3))
        recipe = digits.Recipe(epochs=60, batch_size=16, learning_rate=0.1, weight_decay=0.0)
        train("line", [found], lambda rows: (inputs[rows] @ (found - wanted)).square().mean(), 64, recipe)
        assert torch.allclose(found.detach(), wanted, atol=1e-3)


class TestDigits:
    def test_accuracy_is_the_recorded_one(self) -> None:
        images = available(digits.held_out)
        folder = available(digits.classifier)
        recorded = json.loads((folder / "reference.json").read_text())["held_out_accuracy"]["digits"]
        model = ResNetForImageClassification.from_pretrained(folder).eval()
        assert len(images) == 600
        assert recorded >= 0.97
        assert digits.accuracy(model, images) == pytest.approx(recorded, abs=0.005)
        pixels = images[0][0]
        assert (pixels.shape, pixels.dtype) == ((1, 32, 32), torch.float32)
        assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1


class TestLSTM:
    @pytest.mark.timeout(600)  # the first call trains the model
    def test_accuracy_is_the_recorded_one(self) -> None:
        folder = available(lstm.classifier)
        recorded = json.loads((folder / "reference.json").read_text())["held_out_accuracy"]
        model, tokenizer = lstm.load(folder), lstm.tokenizer(folder)
        assert recorded["tweets"] > 0.81
        assert recorded["amazon"] > 0.74
        for domain, share in recorded.items():
            assert lstm.accuracy(model, tokenizer, held_out(domain)) == pytest.approx(share, abs=0.005)

    def test_padding_changes_nothing(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = lstm.LSTMClassifier(words=20, embedding_size=8, hidden_size=6).eval()
        ids = torch.tensor([[3, 7, 5, 0, 0], [2, 4, 6, 8, 9]])
        with torch.inference_mode():
            together, alone = model(ids), model(ids[:1, :3])
            nothing = model(torch.zeros(1, 2, dtype=torch.long))
        assert torch.allclose(together[:1], alone, atol=1e-6)
        assert not torch.allclose(together[0], together[1])
        assert torch.isfinite(nothing).all()

    def test_text_without_words_is_one_unknown_word(self) -> None:
        words = lstm._tokenizer([("good good", 1), ("bad! bad!", 0)], lstm.Recipe())
        assert lstm.encode(words, ["  ", "Good bad", "never"]).tolist() == [
            [1, 0],
            [words.vocab["good"], words.vocab["bad"]],
            [1, 0],
        ]
        assert sorted(words.vocab) == ["!", "[PAD]", "[UNK]", "bad", "good"]


class TestTexts:
    def test_excerpt_ends_with_a_token(self) -> None:
        text = "one two  three, four"
        assert excerpt(tiny_tokenizer(), text, 7) == "one two"
        assert excerpt(tiny_tokenizer(), text, len(text)) == text
        for tokens in (0, 21):
            with pytest.raises(ValueError, match="tokens were asked for, the text has 20"):
                excerpt(tiny_tokenizer(), text, tokens)

    def test_prose_is_long_and_in_a_fixed_order(self) -> None:
        assert len(technical_prose()) > 300_000
        assert technical_prose() == technical_prose()

    def test_news_has_no_repeated_sentence(self) -> None:
        sentences = available(news_snippets)
        assert len(sentences) == len(set(sentences)) > 5000

    def test_windows_are_consecutive(self) -> None:
        windows = token_windows(character_tokenizer(), "abcdefgh", length=3, count=2)
        assert windows == [[97, 98, 99], [100, 101, 102]]

    @pytest.mark.parametrize(("length", "count"), [(3, 3), (0, 1), (1, 0)])
    def test_impossible_windows_are_refused(self, length: int, count: int) -> None:
        with pytest.raises(ValueError, match=r"windows of|must be positive"):
            token_windows(character_tokenizer(), "abcdefgh", length=length, count=count)


def tiny_llama(tied: bool, attention_bias: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" in name:
                    value.uniform_(0.5, 2.0)
    return model


def distinct_values_per_group(model: LlamaForCausalLM) -> int:
    """Most distinct values in any of the first groups of 32 of one projection."""
    groups = model.model.layers[3].mlp.up_proj.weight.detach().reshape(-1, 32)[:200]
    return max(len(group.unique()) for group in groups)


def character_tokenizer() -> Any:
    """A callable like a tokenizer whose ids are code points."""
    return lambda text, add_special_tokens, verbose: {"input_ids": [ord(character) for character in text]}
