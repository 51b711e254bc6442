"""What `import hf_compress` adds to importing torch and the parts of transformers that it plugs into."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benchmarks.common import Bar, Measured, run, summary

NAME = "import"
MOST_SECONDS = 0.3
BARS = (
    Bar(name="import hf_compress, added", at="most", limit=MOST_SECONDS, unit="s"),
    Bar(name="CUDA initialised by the import", at="most", limit=0, unit="times"),
)
ROUNDS = 11
BASE = """
import json, time
start = time.perf_counter()
import torch, transformers.modeling_utils, transformers.quantizers
base = time.perf_counter()
"""
OURS = "import hf_compress\n"
TELL = """
end = time.perf_counter()
print(json.dumps({"total": end - start, "added": end - base, "cuda": torch.cuda.is_initialized()}))
"""


def import_times(script: str) -> dict[str, float]:
    """Run a script in a fresh interpreter; seconds in all, seconds after the base, whether CUDA is initialised."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def measure(smoke: bool) -> Measured:
    """Fresh interpreters with and without us, in turns; the first of each fills the file cache."""
    scripts = (BASE + TELL, BASE + OURS + TELL)
    without, ours = [], []
    for index in range(1 + (2 if smoke else ROUNDS)):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        times = {which: import_times(scripts[which]) for which in order}
        if index:
            without.append(times[0])
            ours.append(times[1])
    added = [one["added"] for one in ours]
    differences = [one["total"] - other["total"] for one, other in zip(ours, without, strict=True)]
    return Measured(
        settings={"base": "torch, transformers.modeling_utils, transformers.quantizers", "rounds": len(ours)},
        measurements={
            "base_s": summary([one["total"] for one in without]),
            "added_s": summary(added),
            "difference_of_pairs_s": summary(differences),
        },
        values={
            BARS[0].name: statistics.median(added),
            BARS[1].name: sum(one["cuda"] for one in ours),
        },
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
