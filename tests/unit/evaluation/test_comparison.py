"""Comparisons as data: the front, the table, the picture, the files."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from PIL import Image

from hf_compress.checkpoint.record import Proof
from hf_compress.core.errors import CheckpointNotFoundError, CorruptCheckpointError
from hf_compress.evaluation.comparison import (
    ORIGINAL,
    Comparison,
    Entry,
    Estimate,
    Failure,
    Original,
    panels,
    quality_of,
    speed_of,
    standings,
)
from hf_compress.evaluation.comparison_files import (
    comparison_markdown,
    fronts,
    markdown_table,
    read_comparison,
    title,
    write_comparison,
    write_picture,
)
from hf_compress.evaluation.environment import environment
from hf_compress.evaluation.latency import LatencyComparison, SideTiming
from hf_compress.evaluation.plots import DRAWN_FROM, PIXELS, digest
from hf_compress.evaluation.quality_results import (
    CausalLMQuality,
    ClassificationQuality,
    EmbeddingQuality,
    QualityResult,
)
from hf_compress.evaluation.report_schema import Coverage, KeptWeight, Report, SchemeCount, Size
from hf_compress.evaluation.size import DiskBytes

SIDE = SideTiming(p50_ms=10, p95_ms=12, min_ms=9, iqr_ms=1)
HERE = environment()


def timing(speedup: float, low: float, high: float) -> LatencyComparison:
    verdict: Any = "slower" if high < 1 else "faster" if low > 1 else "same"
    return LatencyComparison(
        pairs=20, warmup=3, baseline=SIDE, candidate=SIDE, speedup=speedup, speedup_low=low, speedup_high=high,
        confidence=0.99, verdict=verdict,
    )  # fmt: skip


def accuracy(value: float, spread: float, base: float = 0.9) -> QualityResult:
    difference = value - base
    result = ClassificationQuality(
        examples=600, baseline_accuracy=base, candidate_accuracy=value, difference=difference,
        difference_low=difference - spread, difference_high=difference + spread, lost=1, gained=1, agreement=0.99,
    )  # fmt: skip
    return QualityResult(task="classification", result=result, max_length=32)


def perplexity(ratio: float) -> QualityResult:
    result = CausalLMQuality(
        windows=9, tokens=900, baseline_perplexity=10, candidate_perplexity=10 * ratio, ratio=ratio,
        ratio_low=ratio - 0.01, ratio_high=ratio + 0.01, kl=0.1, agreement=0.9,
    )  # fmt: skip
    return QualityResult(task="causal-lm", result=result, max_length=64)


def cosine(mean: float) -> QualityResult:
    result = EmbeddingQuality(texts=9, mean=mean, mean_low=mean - 0.01, mean_high=mean + 0.005, min=0.8, p5=0.81)
    return QualityResult(task="embedding", result=result, max_length=64)


def report(disk: int, quality: QualityResult | None, *timings: LatencyComparison) -> Report:
    """A report of a model of 100 MB."""
    return Report(
        model="bert",
        architecture="BertForSequenceClassification",
        method="rtn",
        request={"bits": 4},
        format="compressed-tensors",
        size=Size(
            disk=DiskBytes(total=disk + 10, weights=disk, files=3),
            baseline_disk_weights=100_000_000,
            resident=disk - 1_000_000,
            baseline_resident=101_000_000,
            stock_resident_before=disk,
            stock_resident_after=101_500_000,
        ),
        coverage=Coverage(
            fraction=0.95,
            by_scheme={
                "int4-g64": SchemeCount(weights=1, parameters=95),
                "kept": SchemeCount(weights=1, parameters=5),
            },
            kept=(KeptWeight(name="head", parameters=5, reason="default rule: head", in_scope=True),),
        ),
        kernels={"reference": 3, "int8-matmul": 2},
        latency={f"input_ids {index}×128": one for index, one in enumerate(timings, 1)},
        quality=quality,
        proof=Proof(level="full"),
        environment=HERE,
    )


def comparison(baseline_quality: float | None, reports: dict[str, Report], failed: bool = True) -> Comparison:
    entries = [Entry(name=name, request={"method": "rtn"}, report=one) for name, one in reports.items()]
    failure = Failure(code="HFC401", message="group_size=48 | no.", fix="group_size=64")
    return Comparison(
        model="bert",
        architecture="BertForSequenceClassification",
        environment=HERE,
        baseline=Original(
            dtype="float32", disk_weights=100_000_000, resident=101_000_000, quality=baseline_quality
        ),
        entries=(*entries, *([Entry(name="rtn-g48", request={}, error=failure)] if failed else [])),
        notes=("Texts cut at 32 tokens: 7.",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifiers() -> Comparison:
    fast, slow = timing(2.0, 1.9, 2.1), timing(0.5, 0.45, 0.55)
    return comparison(
        0.9,
        {
            "small": report(40_000_000, accuracy(0.89, 0.005), slow, timing(0.9, 0.8, 1.1)),
            "good": report(60_000_000, accuracy(0.91, 0.02), fast, timing(1.5, 1.2, 1.6)),
            "unclear": report(61_000_000, accuracy(0.905, 0.03), timing(1.1, 0.9, 1.3)),
            "bad": report(70_000_000, accuracy(0.5, 0.03), slow),
        },
    )


# --- the front ---------------------------------------------------------------------------------------------

SPANS = st.tuples(
    st.integers(-5, 5), st.integers(0, 3), st.integers(0, 3)
).map(lambda found: Estimate(found[0], found[0] - found[1], found[0] + found[2]))  # fmt: skip
POINTS = st.lists(st.tuples(SPANS, SPANS), min_size=1, max_size=8)


def by_name(points: list[tuple[Estimate, Estimate]]) -> dict[str, tuple[Estimate, Estimate]]:
    return {str(index): point for index, point in enumerate(points)}


def better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def values(point: tuple[Estimate, Estimate]) -> tuple[float, float]:
    return point[0].value, point[1].value


@given(POINTS)
def test_front_is_what_no_estimate_beats_and_beats_all_else(points: list[tuple[Estimate, Estimate]]) -> None:
    found = standings(by_name(points))
    front = [point for name, point in by_name(points).items() if found[name] == "front"]
    assert front
    for name, point in by_name(points).items():
        assert any(better(values(other), values(point)) for other in front) == (found[name] != "front")


@given(POINTS)
def test_beaten_is_what_is_beaten_wherever_the_truth_lies_in_the_intervals(
    points: list[tuple[Estimate, Estimate]],
) -> None:
    found, named = standings(by_name(points)), by_name(points)
    for name, (x, y) in named.items():
        certain = any(
            all(better((a, b), (c, d)) for a in (p.low, p.high) for b in (q.low, q.high) for c in (x.low, x.high)
                for d in (y.low, y.high))
            for other, (p, q) in named.items() if other != name
        )  # fmt: skip
        assert certain == (found[name] == "beaten")


@given(POINTS)
def test_exact_points_leave_nothing_open(points: list[tuple[Estimate, Estimate]]) -> None:
    exact = [(Estimate.exact(x.value), Estimate.exact(y.value)) for x, y in points]
    assert "open" not in standings(by_name(exact)).values()


@given(POINTS, st.randoms(use_true_random=False))
def test_order_does_not_matter(points: list[tuple[Estimate, Estimate]], random: Any) -> None:
    named = list(by_name(points).items())
    shuffled = random.sample(named, len(named))
    assert standings(dict(shuffled)) == standings(dict(named))


def test_equal_points_share_the_front() -> None:
    one = (Estimate.exact(1.0), Estimate.exact(1.0))
    assert standings({"a": one, "b": one}) == {"a": "front", "b": "front"}


def test_panels_judge_less_bytes_and_more_quality_as_better(classifiers: Comparison) -> None:
    size, speed = panels(classifiers)
    assert size.standings() == {
        ORIGINAL: "open", "small": "front", "good": "front", "unclear": "open", "bad": "beaten",
    }  # fmt: skip
    assert speed.standings() == {
        ORIGINAL: "open", "small": "beaten", "good": "front", "unclear": "open", "bad": "beaten",
    }  # fmt: skip
    assert size.points["small"][0] == Estimate.exact(40.0)
    assert astuple(size.points["small"][1]) == pytest.approx((89.0, 88.5, 89.5))


def test_less_perplexity_is_better() -> None:
    found = comparison(10.0, {"a": report(50_000_000, perplexity(1.1)), "b": report(60_000_000, perplexity(1.3))})
    size = panels(found)[0]
    assert not size.y.rising
    assert size.standings() == {ORIGINAL: "front", "a": "front", "b": "beaten"}
    assert astuple(size.points["b"][1]) == pytest.approx((13.0, 12.9, 13.1))


def test_without_quality_speed_is_drawn_over_size() -> None:
    found = comparison(None, {"a": report(50_000_000, None, timing(0.5, 0.4, 0.6))})
    (panel,) = panels(found)
    assert (panel.x.key, panel.y.key) == ("size", "speed")
    assert panel.standings() == {ORIGINAL: "front", "a": "front"}


def test_speed_is_that_of_the_slowest_input() -> None:
    found = report(1, None, timing(0.9, 0.5, 1.4), timing(0.8, 0.7, 0.95), timing(2.0, 1.5, 3.0))
    assert speed_of(found) == Estimate(0.8, 0.5, 0.95)
    assert speed_of(report(1, None)) is None


def test_quality_has_the_interval_of_the_difference() -> None:
    assert astuple(quality_of(accuracy(0.88, 0.01))) == pytest.approx((0.88, 0.87, 0.89))
    assert astuple(quality_of(perplexity(1.2))) == pytest.approx((12.0, 11.9, 12.1))
    assert astuple(quality_of(cosine(0.98))) == pytest.approx((0.98, 0.97, 0.985))


# --- the table ---------------------------------------------------------------------------------------------


def test_table(classifiers: Comparison) -> None:
    assert markdown_table(classifiers).split("\n") == [
        "|  | disk, MB | in memory here, MB | in memory in stock, MB | accuracy<br>(95 % interval of the difference) "
        "| times the original's speed<br>(99 % interval) | coverage | kernels | proof |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| original, float32 | 100.0 | 101.0 |  | 90.0% | 1 |  |  |  |",
        "| small | 40.0 | 39.0 | 101.5 | 89.0% (-1.5 to -0.5) | 1×128: SLOWER 0.50 (0.45 to 0.55)<br>2×128: 0.90 "
        "(0.80 to 1.10) | 95.0% | 3 × reference<br>2 × int8-matmul | full |",
        "| good | 60.0 | 59.0 | 101.5 | 91.0% (-1.0 to +3.0) | 1×128: 2.00 (1.90 to 2.10)<br>2×128: 1.50 "
        "(1.20 to 1.60) | 95.0% | 3 × reference<br>2 × int8-matmul | full |",
        "| unclear | 61.0 | 60.0 | 101.5 | 90.5% (-2.5 to +3.5) | 1×128: 1.10 (0.90 to 1.30) | 95.0% | "
        "3 × reference<br>2 × int8-matmul | full |",
        "| bad | 70.0 | 69.0 | 101.5 | 50.0% (-43.0 to -37.0) | 1×128: SLOWER 0.50 (0.45 to 0.55) | 95.0% | "
        "3 × reference<br>2 × int8-matmul | full |",
        "| rtn-g48 | failed: HFC401 |  |  |  |  |  |  |  |",
    ]  # fmt: skip


def test_fronts_in_words(classifiers: Comparison) -> None:
    assert fronts(classifiers) == (
        "Size and accuracy: on the front: small, good; not told apart from it by this measurement: original, unclear; "
        "beaten: bad.",
        "Speed and accuracy: on the front: good; not told apart from it by this measurement: original, unclear; "
        "beaten: small, bad.",
    )


def test_page_tells_notes_failures_and_where(classifiers: Comparison) -> None:
    page = comparison_markdown(classifiers)
    assert page.startswith(
        "# BertForSequenceClassification `bert`, compressed in 5 ways\n\n- Texts cut at 32 tokens: 7.\n"
    )
    assert "\n- rtn-g48: [HFC401] group_size=48 | no. Fix: group_size=64\n" in page
    assert HERE.processor in page
    assert "![Pareto fronts](pareto.png)" in page
    without = comparison_markdown(comparison(0.9, {"a": report(1_000_000, accuracy(0.9, 0.1))}, failed=False))
    assert "Failed" not in without


@pytest.mark.parametrize(
    ("quality", "base", "cells"),
    [
        (perplexity(1.2), 10.0, ("perplexity<br>(95 % interval of the ratio)", "10", "12 (× 1.190 to 1.210)")),
        (cosine(0.98), None, ("cosine with the original<br>(95 % interval)", "1", "0.9800 (0.9700 to 0.9850)")),
        (None, None, ("quality", "", "")),
    ],
)
def test_quality_cells(quality: QualityResult | None, base: float | None, cells: tuple[str, ...]) -> None:
    lines = markdown_table(comparison(base, {"a": report(1_234_000, quality)})).split("\n")
    column = [line.split(" | ")[4].strip() for line in lines]
    assert (column[0], column[2], column[3]) == cells
    assert lines[3].startswith("| a | 1.23 | 0.234 |")


# --- the picture -------------------------------------------------------------------------------------------


def test_picture_is_a_png_of_the_size_with_something_on_it(classifiers: Comparison, tmp_path: Path) -> None:
    write_picture(classifiers, tmp_path / "two.png")
    pixels = imread(tmp_path / "two.png")
    assert pixels.shape == (PIXELS[1], PIXELS[0], 4)
    white = (pixels[..., :3] > 0.99).all(-1)
    assert 0.01 < 1 - white.mean() < 0.3
    for edge in (white[:4], white[-4:], white[:, :4], white[:, -4:]):
        assert edge.all()  # nothing is cut off
    for half in (pixels[:, : PIXELS[0] // 2], pixels[:, PIXELS[0] // 2 :]):
        for colour in ((0x0B, 0x6E, 0x4F), (0xC7, 0x7D, 0x0A), (0x8A, 0x8A, 0x8A)):  # front, open, beaten
            assert (np.abs(half[..., :3] * 255 - colour).max(-1) < 3).sum() > 50


def test_one_panel_is_half_as_wide(tmp_path: Path) -> None:
    write_picture(comparison(None, {"a": report(50_000_000, None, timing(0.5, 0.4, 0.6))}), tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape == (PIXELS[1], PIXELS[0] // 2, 4)


def test_same_points_same_bytes_and_the_file_says_which(classifiers: Comparison, tmp_path: Path) -> None:
    write_picture(classifiers, tmp_path / "a.png")
    write_picture(classifiers, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {DRAWN_FROM: digest(panels(classifiers), title(classifiers))}
    moved = comparison(0.9, {"small": report(40_000_001, accuracy(0.89, 0.005), timing(0.5, 0.4, 0.6))})
    assert digest(panels(moved), title(moved)) != digest(panels(classifiers), title(classifiers))


# --- files -------------------------------------------------------------------------------------------------


def test_files_read_back_the_same(classifiers: Comparison, tmp_path: Path) -> None:
    write_comparison(classifiers, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"comparison.json", "comparison.md", "pareto.png"}
    assert read_comparison(tmp_path) == read_comparison(tmp_path / "comparison.json") == classifiers
    assert json.loads((tmp_path / "comparison.json").read_text())["entries"][4]["error"]["code"] == "HFC401"


def test_unreadable_comparisons(classifiers: Comparison, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no comparison at .*comparison\.json"):
        read_comparison(tmp_path)
    file, whole = tmp_path / "comparison.json", json.loads(classifiers.model_dump_json())
    damaged: dict[str, object] = {
        "no whole JSON": '{"schema_version": 1',
        "is no comparison": "[]",
        "schema_version 2": {**whole, "schema_version": 2},
        "doesn't fit at entries.0: Value error, an entry has either": {
            **whole, "entries": [{"name": "a", "request": {}}],
        },
        "doesn't fit at extra": {**whole, "extra": 1},
    }  # fmt: skip
    for words, content in damaged.items():
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(CorruptCheckpointError) as caught:
            read_comparison(file)
        assert words.replace("no whole", "not whole") in caught.value.message
