"""Run all benchmarks, each in a process of its own, and print one table of PASS and FAIL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, SMOKE_RESULTS, Result, arguments, show


def main() -> int:
    """Run, show, and return the exit status: 1 if a bar does not hold or a script failed."""
    options = arguments(__doc__)
    folder: Path = options.out or (SMOKE_RESULTS if options.smoke else RESULTS)
    results, broken = [], []
    for script in sorted(ROOT.glob("bench_*.py")):
        path = folder / f"{script.stem.removeprefix('bench_')}.json"
        path.unlink(missing_ok=True)
        subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False)
        if path.is_file():
            results.append(Result.read(path))
        else:
            broken.append(script.name)
    show(results)
    if broken:
        print(f"No result from {', '.join(broken)}: see the error above.")
    return 0 if not broken and all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
