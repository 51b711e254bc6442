"""Compare methods of this package and of two others on the sentiment classifier; docs/compare.md shows the result.

python benchmarks/compare_sentiment.py      # writes benchmarks/comparison.json
python scripts/compare_docs.py              # then docs/compare.md and its picture
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_compress as hfc
from benchmarks.common import QUIET_PERCENT, ROOT, SMOKE_RESULTS, arguments
from examples.reference import sentiment
from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.comparison_files import MARKER, comparison_markdown

ROWS, SMOKE_ROWS = 600, 60
"""Held-out texts, half tweets and half product reviews, as in the demo."""
PAIRS, SMOKE_PAIRS = 20, 8
SHAPES, SMOKE_SHAPES = ((1, 128), (8, 128)), ((1, 32),)
"""Rows and tokens that speed is measured on."""
BATCH_SIZE = 32
HEAD = ["classifier"]
"""Kept by default here; transformers' own defaults would quantize it, which bitsandbytes' 4-bit kernel can't."""
SMOKE_NOTE = "Small settings, to try the script: these numbers prove nothing."
BUSY_NOTE = "Other programs used the processors before measuring"


def configs() -> list[QuantizationConfigMixin]:
    """What is compared, named after what it does."""
    from torchao.quantization import Int8WeightOnlyConfig  # here, so that the rest is there without it

    return [
        hfc.RTNQuantConfig(bits=8, group_size="channel"),
        hfc.RTNQuantConfig(bits=4, group_size=64),
        hfc.HQQQuantConfig(bits=4, group_size=64),
        hfc.CodebookQuantConfig(codebook="nf4", group_size=64),
        hfc.CodebookQuantConfig(codebook="kmeans", bits=4, group_size=64),
        hfc.Int8DynamicQuantConfig(),
        TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEAD),
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEAD),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEAD),
    ]


def inputs(shapes: Sequence[tuple[int, int]], words: int) -> list[dict[str, Tensor]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, words, shape, generator=generator) for shape in shapes]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def measure(smoke: bool) -> Comparison:
    """Compare on the classifier."""
    source = sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    count = SMOKE_ROWS if smoke else ROWS
    rows = [*sentiment.held_out("tweets")[: count // 2], *sentiment.held_out("amazon")[: count // 2]]
    busy = psutil.cpu_percent(interval=1)
    found = hfc.compare(
        source,
        configs(),
        rows,
        tokenizer=tokenizer,
        inputs=inputs(SMOKE_SHAPES if smoke else SHAPES, len(tokenizer)),
        pairs=SMOKE_PAIRS if smoke else PAIRS,
        max_length=sentiment.Recipe.max_length,
        batch_size=BATCH_SIZE,
        progress=lambda done, total: print(f"{done} of {total}", file=sys.stderr),
    )
    doubts = [SMOKE_NOTE] if smoke else []
    if busy > QUIET_PERCENT:
        doubts.append(f"{BUSY_NOTE}: {busy:.0f} % of them.")
    return found.model_copy(update={"notes": (*doubts, *found.notes)})


def main() -> int:
    """Measure, write, show; the exit status is 1 if a configuration failed."""
    options = arguments(__doc__)
    logging.disable_progress_bar()
    folder: Path = options.out or (SMOKE_RESULTS if options.smoke else ROOT)
    found = measure(options.smoke)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(comparison_markdown(found))
    print(folder / MARKER)
    return 0 if len(found.reports) == len(found.entries) else 1


if __name__ == "__main__":
    sys.exit(main())
