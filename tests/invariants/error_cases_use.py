"""Failures of evaluating, and of the command line."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

import hf_compress as hfc
from tests._utils.tiny import tiny, tiny_tokenizer

from .error_cases import TEXTS, Act, Arena, Case, edit_json
from .error_cases_files import _file, _flipped, _folder_with_notes, _truncated
from .error_cases_models import BNB, _nan, with_config, with_weights

LABELLED = list(zip(TEXTS, (0, 1), strict=True))
SHORT = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
tokenizer = functools.cache(tiny_tokenizer)


def one_thread(act: Act) -> Act:
    """Timing comes before the data is looked at; on a busy machine, two threads wait for each other."""

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            act()
        finally:
            torch.set_num_threads(threads)

    return alone


def evaluate(data: Any = None, family: str = "bert-classifier", **options: Any) -> Any:
    """A row's call: evaluating a quantized model on data that don't fit."""

    def provoke(arena: Arena) -> Act:
        model, baseline = arena.packed(family), arena.live(family)
        given = {"tokenizer": tokenizer(), "pairs": 8, "inputs": dict(SHORT), **options}
        return one_thread(lambda: hfc.evaluate(model, baseline, data, **given))

    return provoke


def pair(model: Callable[[Arena], Any], baseline: Callable[[Arena], Any], **options: Any) -> Any:
    """A row's call: evaluating two things that are no pair."""

    def provoke(arena: Arena) -> Act:
        sides = model(arena), baseline(arena)
        return lambda: hfc.evaluate(*sides, **options)

    return provoke


def _with_checkpoint(prepare: Callable[[Arena], Any]) -> Any:
    def provoke(arena: Arena) -> Act:
        model, baseline, path = arena.packed(), arena.live(), prepare(arena)
        return one_thread(lambda: hfc.evaluate(model, baseline, path=path, pairs=8, inputs=dict(SHORT)))

    return provoke


def _nan_outputs(arena: Arena) -> Act:
    model, baseline = arena.packed(), arena.live()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return one_thread(lambda: hfc.evaluate(model, baseline, TEXTS, tokenizer=tokenizer(), pairs=8, inputs=dict(SHORT)))


def _other_vocabulary(arena: Arena) -> Act:
    model, baseline = arena.watch(hfc.quantize(tiny("llama", vocab_size=20), hfc.RTNQuantConfig())), tiny("llama")
    return one_thread(lambda: hfc.evaluate(model, baseline, TEXTS, tokenizer=tokenizer(), pairs=8, inputs=dict(SHORT)))


def quantize(prepare: Callable[[Arena], Any], *words: str) -> Any:
    """A row's call: `hf-compress quantize`."""

    def provoke(arena: Arena) -> Act:
        method = () if "--method" in words else ("--method", "rtn")
        return arena.cli("quantize", prepare(arena), arena.out, *method, *words)

    return provoke


def to(prepare: Callable[[Arena], Any], *words: str) -> Any:
    """A row's call: `hf-compress quantize` to what is prepared."""

    def provoke(arena: Arena) -> Act:
        return arena.cli("quantize", arena.dense(), prepare(arena), "--method", "rtn", *words)

    return provoke


def run(name: str, prepare: Callable[[Arena], Any], *words: str) -> Any:
    """A row's call: another command."""
    return lambda arena: arena.cli(name, prepare(arena), *words)


def _dense(arena: Arena) -> Any:
    return arena.dense()


def _missing(arena: Arena) -> Any:
    return arena.folder / "none"


def _newer(arena: Arena) -> Any:
    return edit_json(arena.checkpoint() / "hf_compress.json", lambda record: record.update(schema_version=2)).parent


CASES = (
    # Evaluation data.
    Case(name="evaluate-no-examples", provoke=evaluate([]), code="HFC502", words=("empty", "data=")),
    Case(name="evaluate-number", provoke=evaluate(42), code="HFC502", words=("int", "datasets.Dataset")),
    Case(name="evaluate-no-labels", provoke=evaluate(TEXTS), code="HFC502", words=("labels", "data=")),
    Case(name="evaluate-label-range", provoke=evaluate([("a", 0), ("b", 7)]), code="HFC502", words=("data[1]", "7")),
    Case(name="evaluate-label-word", provoke=evaluate([("a", "good")]), code="HFC502", words=("data[0]", "'good'")),
    Case(name="evaluate-mixed", provoke=evaluate([("a", 0), 3]), code="HFC502", words=("data[1]", "int")),
    Case(
        name="evaluate-columns",
        provoke=evaluate(Dataset.from_dict({"sentence": TEXTS})),
        code="HFC502",
        words=("sentence", "rename_column"),
    ),
    Case(name="evaluate-no-tokenizer", provoke=evaluate(LABELLED, tokenizer=None), code="HFC502", words=("NoneType",)),
    Case(name="evaluate-tokenizer-id", provoke=evaluate(LABELLED, tokenizer="bert"), code="HFC502", words=("str",)),
    Case(name="evaluate-task", provoke=evaluate(LABELLED, task="clasification"), code="HFC502", words=("'clasif",)),
    Case(name="evaluate-batch-zero", provoke=evaluate(LABELLED, batch_size=0), code="HFC502", words=("batch_size=0",)),
    Case(name="evaluate-batch-word", provoke=evaluate(LABELLED, batch_size="8"), code="HFC502", words=("batch_size",)),
    Case(name="evaluate-length", provoke=evaluate(LABELLED, max_length=9999), code="HFC502", words=("9999", "64")),
    Case(name="evaluate-length-word", provoke=evaluate(LABELLED, max_length="9"), code="HFC502", words=("max_len",)),
    Case(name="evaluate-one-text", provoke=evaluate(["ab"], "llama"), code="HFC502", words=("at least 2",)),
    Case(name="evaluate-vocabulary", provoke=_other_vocabulary, code="HFC502", words=("embeddings", "tokenizer")),
    Case(name="evaluate-inputs", provoke=evaluate(inputs={"x": torch.ones(1)}), code="HFC503", words=("'x'",)),
    Case(name="evaluate-inputs-text", provoke=evaluate(inputs="a text"), code="HFC503", words=("text", "tensors")),
    Case(
        name="evaluate-inputs-ids",
        provoke=evaluate(inputs={"input_ids": torch.full((1, 4), 10**6)}),
        code="HFC503",
        words=("input_ids",),
    ),
    # Evaluation of the wrong things.
    Case(name="evaluate-pairs", provoke=evaluate(pairs=3), code="HFC601", words=("pairs=3", "at least 8")),
    Case(name="evaluate-pairs-word", provoke=evaluate(pairs="many"), code="HFC601", words=("pairs",)),
    Case(
        name="evaluate-clock",
        provoke=evaluate(clock=functools.partial(next, itertools.count(0, -1))),
        code="HFC601",
        words=("monotone", "perf_counter"),
    ),
    Case(name="evaluate-nan", provoke=_nan_outputs, code="HFC601", words=("NaN",)),
    Case(
        name="evaluate-dense",
        provoke=pair(lambda a: a.live(), lambda a: a.live()),
        code="HFC403",
        words=("LlamaForCausalLM", "not compressed"),
    ),
    Case(
        name="evaluate-packed-baseline",
        provoke=pair(lambda a: a.packed(), lambda a: a.packed()),
        code="HFC403",
        words=("baseline", "compressed too", "deepcopy"),
    ),
    Case(
        name="evaluate-other-class",
        provoke=pair(lambda a: a.packed(), lambda a: a.live("bert")),
        code="HFC403",
        words=("LlamaForCausalLM", "BertModel"),
    ),
    Case(
        name="evaluate-meta",
        provoke=pair(lambda a: a.packed(), lambda a: a.watch(tiny("llama").to("meta"))),
        code="HFC403",
        words=("meta device",),
    ),
    Case(name="evaluate-none", provoke=pair(lambda a: None, lambda a: a.live()), code="HFC403", words=("NoneType",)),
    Case(
        name="evaluate-no-baseline", provoke=pair(lambda a: a.packed(), lambda a: None), code="HFC403", words=("No",)
    ),
    Case(name="evaluate-path", provoke=_with_checkpoint(_missing), code="HFC705", words=("none",)),
    Case(
        name="evaluate-other-checkpoint",
        provoke=_with_checkpoint(lambda arena: arena.checkpoint(symmetric=False, group_size=32)),
        code="HFC403",
        words=("another compression", "hf_compress.load"),
    ),
    # The command line.
    Case(name="cli-model-missing", provoke=quantize(_missing), code="HFC406", words=("none", "check the path")),
    Case(name="cli-id", provoke=quantize(lambda arena: "no/such-model"), code="HFC406", words=("no/such-model",)),
    Case(name="cli-method", provoke=quantize(_dense, "--method", "gtpq"), code="HFC204", words=("gtpq", "rtn")),
    Case(name="cli-bits", provoke=quantize(_dense, "--bits", "99"), code="HFC202", words=("bits=99",)),
    Case(name="cli-group-word", provoke=quantize(_dense, "--group-size", "row"), code="HFC202", words=("'row'",)),
    Case(name="cli-group-size", provoke=quantize(_dense, "--group-size", "48"), code="HFC401", words=("48", "64")),
    Case(name="cli-dtype", provoke=quantize(_dense, "--dtype", "fp16"), code="HFC202", words=("'dtype'",)),
    Case(name="cli-skip", provoke=quantize(_dense, "--skip", "lm_haed"), code="HFC201", words=("lm_haed", "lm_head")),
    Case(name="cli-regex", provoke=quantize(_dense, "--skip", "re:("), code="HFC201", words=("re:(",), fix=False),
    Case(name="cli-nothing", provoke=quantize(_dense, "--skip", "re:.*"), code="HFC101", words=("0 of",)),
    Case(name="cli-coverage", provoke=quantize(_dense, "--skip", "mlp"), code="HFC102", words=("min_coverage",)),
    Case(name="cli-min-coverage", provoke=quantize(_dense, "--min-coverage", "3"), code="HFC202", words=("=3.0",)),
    Case(
        name="cli-format",
        provoke=quantize(lambda arena: arena.dense("gpt2"), "--format", "compressed-tensors"),
        code="HFC801",
        words=("Conv1D", "guarded"),
    ),
    Case(name="cli-nan", provoke=quantize(with_weights(_nan)), code="HFC402", words=("1 NaN", "down_proj")),
    Case(name="cli-twice", provoke=quantize(lambda arena: arena.checkpoint()), code="HFC405", words=("already",)),
    Case(name="cli-bnb", provoke=quantize(with_config(quantization_config=BNB)), code="HFC405", words=("already",)),
    Case(name="cli-exists", provoke=to(lambda arena: arena.checkpoint()), code="HFC701", words=("--overwrite",)),
    Case(name="cli-file", provoke=to(_file), code="HFC701", words=("is a file",)),
    Case(name="cli-below-file", provoke=to(lambda arena: _file(arena) / "out"), code="HFC704", words=("file/out",)),
    Case(name="cli-notes", provoke=to(_folder_with_notes, "--overwrite"), code="HFC701", words=("no checkpoint",)),
    Case(name="cli-json", provoke=quantize(_dense, "--bits", "9", "--json"), code="HFC202", words=('"fix"', "bits=9")),
    Case(name="cli-dry-run", provoke=quantize(_dense, "--skip", "x", "--dry-run"), code="HFC201", words=("'x'",)),
    Case(name="cli-inspect", provoke=run("inspect", _missing), code="HFC705", words=("none", "check the path")),
    Case(name="cli-inspect-dense", provoke=run("inspect", _dense), code="HFC705", words=("not written by",)),
    Case(name="cli-inspect-newer", provoke=run("inspect", _newer), code="HFC702", words=("upgrade",)),
    Case(
        name="cli-inspect-plan",
        provoke=run("inspect", _dense, "--method", "rtn", "--skip", "lm_haed"),
        code="HFC201",
        words=("lm_haed",),
    ),
    Case(name="cli-verify", provoke=run("verify", _missing), code="HFC705", words=("none",)),
    Case(name="cli-verify-flipped", provoke=run("verify", _flipped), code="HFC702", words=("Changed since",)),
    Case(name="cli-verify-truncated", provoke=run("verify", _truncated), code="HFC702", words=("model.safetensors",)),
)
