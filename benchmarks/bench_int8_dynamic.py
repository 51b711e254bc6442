"""Dynamic INT8 against PyTorch fp32 eager on a BERT-base-shaped encoder, beside torch's own peers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from hf_compress.evaluation.forward import evaluating
from hf_compress.evaluation.latency import LatencyComparison, compare_many
from hf_compress.evaluation.size import resident_bytes
from hf_compress.modules.kernels.choose import kernel_counts

NAME = "int8_dynamic"
LEAST_SPEEDUP = 1.8
SHAPES = ((1, 128), (8, 128))
"""Rows and tokens of the inputs."""
BARS = tuple(
    Bar(name=f"speed-up over fp32, {rows} × {tokens} tokens", at="least", limit=LEAST_SPEEDUP, unit="times")
    for rows, tokens in SHAPES
)
OURS = "hf_compress int8_dynamic"
PAIRS = {1: 60, 8: 25}
"""Timed rounds by rows."""
SMOKE_PAIRS = 8


def bert(smoke: bool) -> BertModel:
    """BERT-base with random weights; speed does not depend on their values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(num_hidden_layers=2 if smoke else 12)).eval()


def torch_dynamic(model: nn.Module) -> nn.Module:
    """PyTorch's own dynamic quantization: uint8 per tensor, reduced range (fbgemm)."""
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def candidates(baseline: BertModel) -> dict[str, nn.Module]:
    """Ours and its peers, each made from a copy of the baseline."""
    return {
        OURS: hfc.quantize(copy.deepcopy(baseline), hfc.Int8DynamicQuantConfig()),
        "torch.ao quantize_dynamic (fbgemm)": torch_dynamic(copy.deepcopy(baseline)),
        "bf16 cast": copy.deepcopy(baseline).to(torch.bfloat16),
    }


def call(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """A call of a model on token ids."""
    return lambda: model(input_ids=ids)


def compare(
    baseline: nn.Module, others: dict[str, nn.Module], rows: int, tokens: int, pairs: int
) -> dict[str, LatencyComparison]:
    """All candidates against the baseline in one interleaved loop."""
    ids = torch.randint(0, 30000, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    with evaluating(baseline, *others.values()):
        return compare_many(
            {name: call(model, ids) for name, model in others.items()}, call(baseline, ids), pairs=pairs
        )


def measure(smoke: bool) -> Measured:
    """Compare at every shape."""
    baseline = bert(smoke)
    others = candidates(baseline)
    found = {}
    for (rows, tokens), bar in zip(SHAPES, BARS, strict=True):
        found[bar.name] = compare(baseline, others, rows, tokens, SMOKE_PAIRS if smoke else PAIRS[rows])
    return Measured(
        settings={
            "model": f"BertModel, {baseline.config.num_hidden_layers} layers, hidden size 768, random weights",
            "shapes": [list(shape) for shape in SHAPES],
        },
        measurements={
            "kernels": dict(kernel_counts(others[OURS])),
            "resident_bytes": {"fp32": resident_bytes(baseline), OURS: resident_bytes(others[OURS])},
            **{
                bar: {name: comparison.model_dump(mode="json") for name, comparison in compared.items()}
                for bar, compared in found.items()
            },
        },
        values={bar: compared[OURS].speedup for bar, compared in found.items()},
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
