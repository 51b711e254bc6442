"""`hf-compress compare`: several configurations of one model side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError, EvaluationDataError, OutputExistsError
from ..core.registry import METHODS, untrained
from . import options
from .output import Output
from .quantize import processor_of

if TYPE_CHECKING:
    from ..core.config import Calibration, QuantConfig
    from ..evaluation.comparison import Comparison

NAME = "compare"
EXAMPLES = (
    "hf-compress compare bert --methods rtn,hqq,codebook,int8_dynamic --data labelled.csv --out comparison",
    "hf-compress compare Qwen/Qwen3-0.6B --methods rtn,hqq --bits 4 --group-size 64 --data texts.txt --out comparison",
    "hf-compress compare Qwen/Qwen3-0.6B --methods rtn,gptq --calibration train.txt --data test.txt --out comparison",
)


def command(
    ctx: typer.Context,
    model: options.Model,
    methods: Annotated[str, typer.Option("--methods", metavar="A,B", help=f"Some of {', '.join(untrained())}.")] = "",
    recipes: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", metavar="NAME|FILE", help="A recipe to compare too; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Texts (.txt, one per line), or texts and labels (.jsonl, .csv, .tsv)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for comparison.json, comparison.md and pareto.png.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="classification, causal-lm or embedding; told from the model.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Timed pairs per input, at least 8.")] = 20,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    calibration: options.CalibrationFile = None,
    rows: options.Rows = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a comparison at OUT.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize MODEL in several ways and measure each as saved and reloaded: size, speed, quality, proof."""
    output = Output.of(ctx, as_json, quiet)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names and not recipes:
        raise typer.BadParameter("give --methods, --config or both", ctx)
    configs = configurations(names, recipes or [], bits=bits, group_size=group_size)
    shared = options.calibration(None, options.given(ctx))
    output.calm_libraries()
    try:
        found = _compare(output, model, configs, shared, data, out, task, pairs, overwrite)
    except OutputExistsError as error:
        raise OutputExistsError(error.message, error.fix.replace("overwrite=True", "--overwrite")) from None
    _show(output, found, out)


def configurations(methods: list[str], recipes: list[str], **given: object) -> dict[str, QuantConfig]:
    """The configurations by name: after what they do, or after their file for recipes that no option changes.

    Args:
        methods: Names of methods.
        recipes: Names or files of recipes.
        given: Options for each that has such a field; None where not given.

    Raises:
        MethodError: There is no such method.
        ConfigError: A value is impossible, or none has such a field; or a recipe is not valid.
    """
    from ..pipeline.compare_names import config_name, unique_name
    from ..pipeline.recipes import load_config

    chosen = {name: value for name, value in given.items() if value is not None}
    used: set[str] = set()
    named: dict[str, QuantConfig] = {}
    for method, recipe in [*((name, None) for name in methods), *((None, name) for name in recipes)]:
        kind = METHODS.get(method).config if recipe is None else type(load_config(recipe))
        values = {name: value for name, value in chosen.items() if name in kind.fields_type.model_fields}
        used |= set(values)
        config = options.configuration(method, recipe, **values)
        if config is not None:
            name = config_name(config) if recipe is None or values else Path(recipe).stem
            named[unique_name(name, named)] = config
    if unused := sorted(set(chosen) - used):
        raise ConfigError(
            f"None of {', '.join([*methods, *recipes])} has {' or '.join(unused)}.",
            f"leave out {', '.join('--' + name.replace('_', '-') for name in unused)}",
        )
    return named


def _compare(
    output: Output,
    model: str,
    configs: dict[str, QuantConfig],
    calibration: Calibration | None,
    data: Path | None,
    out: Path | None,
    task: Any,  # checked with the data: any other word is refused there
    pairs: int,
    overwrite: bool,
) -> Comparison:
    """Read the data and compare, behind a progress bar."""
    from .. import compare
    from ..evaluation.data_files import read_data

    rows = None if data is None else read_data(data)
    processor, problem = processor_of(model)
    if rows is not None and problem is not None:
        raise EvaluationDataError(
            f"The tokenizer or processor of {model} can't be read: {problem}",
            "copy tokenizer.json and tokenizer_config.json of the original model into its directory",
        )
    with output.progress("Comparing") as advance:
        return compare(
            model,
            configs,
            rows,
            tokenizer=processor,
            task=task,
            calibration=calibration,
            out=out,
            pairs=pairs,
            overwrite=overwrite,
            progress=advance,
        )


def _show(output: Output, found: Comparison, out: Path | None) -> None:
    """Print the table, the fronts, what failed and where it was written."""
    from ..evaluation.comparison_files import fronts, table, title

    output.grid(table(found), title(found))
    output.text(*fronts(found))
    failed = [(entry.name, entry.error) for entry in found.entries if entry.error is not None]
    output.text(*(f"{name}: [{error.code}] {error.message} Fix: {error.fix}" for name, error in failed))
    output.notes(found.notes)
    if out is not None:
        output.fields({"saved": str(out)})
    output.result(json.loads(found.model_dump_json()))
