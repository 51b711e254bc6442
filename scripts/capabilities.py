"""Probes which packaged recipe works on which model, in which checkpoint format, and writes it down.

python scripts/capabilities.py                                # probe everything, write the data, README and docs
python scripts/capabilities.py --recipe nf4 --family gpt2     # probe some cells again, keep the others
python scripts/capabilities.py --failed                       # probe again what failed or was not probed yet
python scripts/capabilities.py --docs                         # README and docs from the data
python scripts/capabilities.py --check                        # fail if data, README or docs are out of date

Cells of other package versions are not kept: after an upgrade everything is probed.

A cell quantizes a tiny random model, saves it with proof, loads it, and compares all outputs on inputs that the
proof has not seen. It is `ok` when they are bit-equal, `refused` when a typed error says what to do, else `failed`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hf_compress as hfc  # noqa: E402
from hf_compress.checkpoint.handover import plan_of  # noqa: E402
from hf_compress.checkpoint.inputs import InputSet, example_inputs  # noqa: E402
from hf_compress.checkpoint.proof_worker import run_inputs  # noqa: E402
from hf_compress.checkpoint.worker import CleanWorker  # noqa: E402
from hf_compress.core.config import Format, QuantConfig  # noqa: E402
from hf_compress.core.errors import GroupSizeError, HFCompressError  # noqa: E402
from hf_compress.core.registry import untrained  # noqa: E402
from hf_compress.core.weights import list_weights  # noqa: E402
from hf_compress.modules.kernels.choose import reference_kernels  # noqa: E402
from hf_compress.pipeline.capabilities import FILE, Capabilities, Cell, Family, Recipe  # noqa: E402
from hf_compress.pipeline.recipes import recipe_names  # noqa: E402
from tests._utils.tiny import FAMILIES, HIDDEN, MORE, SEED, tiny  # noqa: E402

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "capabilities.md"
BEGIN = "<!-- probed: made by scripts/capabilities.py from hf_compress/capabilities.json -->"
END = "<!-- end -->"
PACKAGES = ("hf-compress", "torch", "transformers", "compressed-tensors", "bitsandbytes", "gptqmodel")
ASKED: tuple[str, ...] = get_args(Format)
"""What a request can ask for."""
GROUPS = (64, 32, 16, "channel")
"""Group sizes; a family gets the first that divides the columns of all its weights."""

Key = tuple[str, str, str]


class Net(nn.Module):
    """A plain module: recurrent or convolutional layers and a linear one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        """The head on every step, or on the mean over the image."""
        made = self.body(input)
        return self.head(made[0] if isinstance(made, tuple) else made.mean((-2, -1)))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "plain-conv": lambda: nn.Sequential(nn.Conv2d(8, HIDDEN, 3), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 3)),
    "plain-gru": lambda: nn.GRU(HIDDEN, HIDDEN, batch_first=True),
    "plain-lstm": lambda: nn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True),
}
MODELS = tuple(sorted((*FAMILIES, *MORE, *PLAIN)))
"""Every family of `tests/_utils/tiny.py`, and plain modules."""


def main() -> int:
    """Probe, write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=recipe_names())
    parser.add_argument("--family", action="append", choices=list(MODELS))
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        problems = [*check_data(read()), *(f"{path.name} is out of date" for path in written(read(), write=False))]
        sys.stderr.writelines(f"{problem}: run python scripts/capabilities.py\n" for problem in problems)
        return bool(problems)
    if not given.docs:
        wanted = keys(given.recipe, given.family)
        if changed := other_versions(wanted):
            parser.error(f"the other cells were probed with {changed}; probe everything")
        done = {cell.key for cell in before() if cell.result != "failed"} if given.failed else set()
        probe_all([key for key in wanted if key not in done], given.jobs)
    found = read()
    written(found, write=True)
    failed = [cell for cell in found.cells if cell.result == "failed"]
    print(*(f"FAILED {' '.join(cell.key)}: {cell.message}" for cell in failed), sep="\n")
    return bool(failed)


# --- probing ---


def keys(recipes: Iterable[str] | None = None, families: Iterable[str] | None = None) -> list[Key]:
    """All cells that there are today, sorted, or those of some recipes and families."""
    rows, models = recipes or recipe_names(), families or list(MODELS)
    return sorted((recipe, family, asked) for recipe in rows for family in models for asked in ASKED)


def probe_all(wanted: list[Key], jobs: int) -> None:
    """Probe cells, each family in one of several processes, and write each family's cells when they are there."""
    start = time.monotonic()
    families = {family: [key for key in wanted if key[1] == family] for _, family, _ in wanted}
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        tasks = {pool.submit(probe_family, chosen): family for family, chosen in families.items()}
        for task in as_completed(tasks):
            write(merged(task.result()))
            print(f"{tasks[task]}: {len(task.result())} cells, {time.monotonic() - start:.0f} s so far", flush=True)


def probe_family(wanted: list[Key]) -> list[Cell]:
    """Some cells of one family."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with CleanWorker(threads=1) as worker:
        return [probe(key, worker) for key in wanted]


def probe(key: Key, worker: CleanWorker) -> Cell:
    """One cell."""
    recipe, family, asked = key
    place = {"recipe": recipe, "family": family, "asked": asked}
    try:
        model = build(family)
        config = fitted(model, recipe, asked)
        if config.spec.needs_data:
            config.calibration = hfc.Calibration(inputs_of(family, model, SEED), min_rows=1, min_tokens=1)
        return Cell(**place, **_outcome(family, config, worker))
    except HFCompressError as error:
        known = {"code": error.code, "message": error.message, "fix": error.fix}
        wrong = error.code in ("HFC702", "HFC703", "HFC706") or not error.fix
        return Cell(**place, result="failed" if wrong else "refused", **known)
    except Exception as error:  # noqa: BLE001 - an error that isn't typed is what this looks for
        return Cell(**place, result="failed", message=f"{type(error).__name__}: {error}")


def fitted(model: nn.Module, recipe: str, asked: str) -> QuantConfig:
    """The recipe with a format, and with the first group size that divides this model's columns."""
    config = hfc.load_config(recipe)
    fields = {**config.fields.model_dump(exclude_unset=True), "format": asked}
    kind = type(config)
    if "iterations" in kind.fields_type.model_fields:
        fields["iterations"] = 2
    if config.fields.model_dump().get("group_size") != GROUPS[0]:
        return kind(**fields)
    for size in GROUPS[:-1]:
        try:
            hfc.plan(model, kind(**{**fields, "group_size": size, "format": "guarded", "min_coverage": 0.0}))
        except GroupSizeError:
            continue
        return kind(**{**fields, "group_size": size})
    return kind(**{**fields, "group_size": GROUPS[-1]})


def build(family: str) -> nn.Module:
    """A model with the same random weights every time."""
    if family not in PLAIN:
        return tiny(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Net(PLAIN[family]()).eval()


def inputs_of(family: str, model: nn.Module, seed: int) -> list[InputSet]:
    """Forward arguments."""
    if family not in PLAIN:
        return example_inputs(model, seed)
    shape = (2, 8, 9, 9) if family == "plain-conv" else (2, 9, HIDDEN)
    return [{"input": torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.head.weight.dtype)}]


def _outcome(family: str, config: QuantConfig, worker: CleanWorker) -> dict[str, Any]:
    """Quantize, save with proof, load, compare on inputs that the proof has not seen."""
    made = hfc.quantize(build(family), config)
    plan = plan_of(made)
    if plan is None:
        raise RuntimeError("a quantized model without a plan")
    plain = family in PLAIN
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        proof = hfc.save(made, out, inputs=inputs_of(family, made, SEED) if plain else None, worker=worker)
        loaded = hfc.load(out, model=build(family)) if plain else hfc.load(out)
        unseen = inputs_of(family, made, SEED + 1)
        expected, found = _outputs(made, unseen), _outputs(loaded, unseen)
    schemes: dict[str, set[str]] = defaultdict(set)
    for row in plan.rows:
        schemes[row.kind.value].add(row.scheme)
    result = {
        "format": plan.format,
        "coverage": round(plan.coverage, 4),
        "schemes": {kind: sorted(labels) for kind, labels in sorted(schemes.items())},
        "proof": proof.level,
    }
    asked = str(config.fields.format)
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        return {**result, "result": "failed", "message": "the loaded model's outputs differ from the saved model's"}
    if asked not in ("auto", plan.format):
        return {**result, "result": "failed", "message": f"asked for {asked}, written as {plan.format}"}
    return {**result, "result": "ok"}


def _outputs(model: nn.Module, inputs: list[InputSet]) -> dict[str, Tensor]:
    """All floating-point outputs without kernels."""
    with reference_kernels(model):
        return run_inputs(model.eval(), inputs)


# --- the data ---


def merged(cells: list[Cell]) -> Capabilities:
    """New cells, and those probed before that are still asked for."""
    known = {cell.key: cell for cell in (*before(), *cells)}
    return Capabilities(
        versions=versions(),
        recipes=tuple(recipe_of(name) for name in recipe_names()),
        families=tuple(family_of(name) for name in list(MODELS)),
        cells=tuple(known[key] for key in keys() if key in known),
    )


def before() -> tuple[Cell, ...]:
    """Cells probed before with the versions of today."""
    return read().cells if FILE.is_file() and read().versions == versions() else ()


def other_versions(wanted: Iterable[Key]) -> str:
    """Versions that cells besides some were probed with and that are not today's; empty if there are none."""
    if not FILE.is_file() or set(wanted) >= set(keys()):
        return ""
    today = versions()
    return ", ".join(f"{name} {old or '(absent)'}" for name, old in read().versions.items() if old != today.get(name))


def versions() -> dict[str, str | None]:
    """The versions of today."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """The version of a package, None where it is absent."""
    try:
        return hfc.__version__ if package == "hf-compress" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def recipe_of(name: str) -> Recipe:
    """What a recipe sets."""
    config = hfc.load_config(name)
    return Recipe(name=name, method=config.method, fields=config.fields.model_dump(mode="json", exclude_unset=True))


def family_of(name: str) -> Family:
    """The kinds of weights of a family."""
    model = build(name)
    kinds = tuple(sorted({weight.kind.value for weight in list_weights(model)}))
    return Family(name=name, architecture=type(model).__name__, kinds=kinds)


def read() -> Capabilities:
    """The data."""
    return Capabilities.model_validate_json(FILE.read_text(encoding="utf-8"))


def write(found: Capabilities) -> None:
    """Write the data, one cell a line."""
    values = found.model_dump(mode="json", exclude_defaults=True)
    blocks = [f'"schema_version": {found.schema_version}', f'"versions": {json.dumps(values["versions"])}']
    for name in ("recipes", "families", "cells"):
        lines = ",\n  ".join(json.dumps(value, ensure_ascii=False) for value in values[name])
        blocks.append(f'"{name}": [\n  {lines}\n ]')
    FILE.write_text("{\n " + ",\n ".join(blocks) + "\n}\n", encoding="utf-8")


def check_data(found: Capabilities) -> Iterator[str]:
    """What is missing, too much or failed."""
    have, wanted = {cell.key for cell in found.cells}, set(keys())
    if have != wanted:
        yield f"{len(wanted - have)} cells are missing and {len(have - wanted)} too many: {sorted(wanted ^ have)[:3]}"
    if unused := set(untrained()) - {recipe.method for recipe in found.recipes}:
        yield f"methods without a recipe: {sorted(unused)}"
    yield from (f"{' '.join(cell.key)} failed: {cell.message}" for cell in found.cells if cell.result == "failed")


# --- README and docs ---


def written(found: Capabilities, write: bool) -> list[Path]:
    """Bring the generated parts up to date; returns the pages that were not."""
    changed = []
    parts: dict[Path, Callable[[Capabilities], str]] = {README: compact, PAGE: full}
    for path, part in parts.items():
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        wanted = f"{before}{BEGIN}\n{part(found)}\n{END}{rest.partition(END)[2]}"
        if wanted == text:
            continue
        changed.append(path)
        if write:
            path.write_text(wanted, encoding="utf-8")
    return changed


def compact(found: Capabilities) -> str:
    """Recipes by kind of weight."""
    kinds = found.kinds
    lines = [f"| recipe | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    lines += [
        f"| `{recipe.name}` | {' | '.join(found.summary(recipe.name, kind) for kind in kinds)} |"
        for recipe in found.recipes
    ]
    return "\n".join(lines)


def full(found: Capabilities) -> str:
    """Every cell, and what refusals say."""
    counts = {result: sum(cell.result == result for cell in found.cells) for result in ("ok", "refused", "failed")}
    versions = ", ".join(f"{name} {value or '(absent)'}" for name, value in found.versions.items())
    lines = [
        f"{len(found.cells)} cells: {counts['ok']} ok, {counts['refused']} refused, {counts['failed']} failed.",
        f"Probed with {versions}.",
        "",
        compact(found),
        "",
        "| family | class | kinds of weights |",
        "|---|---|---|",
        *(f"| {one.name} | `{one.architecture}` | {', '.join(one.kinds)} |" for one in found.families),
    ]
    for recipe in found.recipes:
        lines += ["", *_section(found, recipe)]
    return "\n".join(lines)


def _section(found: Capabilities, recipe: Recipe) -> Iterator[str]:
    """One recipe: families by format."""
    cells = {(cell.family, cell.asked): cell for cell in found.cells if cell.recipe == recipe.name}
    fields = ", ".join(f"{name}={value!r}" for name, value in recipe.fields.items())
    yield f"## `{recipe.name}`"
    yield f"`{recipe.method}`" + (f" with `{fields}`" if fields else "")
    yield ""
    yield f"| family | {' | '.join(ASKED)} |"
    yield f"|---|{'---|' * len(ASKED)}"
    for family in found.families:
        row = (cells.get((family.name, asked)) for asked in ASKED)
        yield f"| {family.name} | {' | '.join(_cell(cell) for cell in row)} |"
    refused = {(cell.asked, cell.code): cell for cell in reversed(cells.values()) if cell.result == "refused"}
    if refused:
        yield ""
    for (asked, code), cell in sorted(refused.items()):
        yield f"- {asked}, `{code}`, such as {cell.family}: {_escaped(cell.message)}"


def _cell(cell: Cell | None) -> str:
    """One cell in a few letters."""
    if cell is None:
        return ""
    if cell.result != "ok":
        return f"{cell.result} {cell.code}".rstrip()
    chosen = f"{cell.format} " if cell.asked == "auto" else ""
    return f"{chosen}{cell.coverage:.0%}" + ("" if cell.proof == "full" else f" ({cell.proof})")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
