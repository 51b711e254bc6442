from __future__ import annotations

import json
from typing import get_args

from hf_compress.core.config import Format

from .conftest import Run


def test_the_overview_has_a_row_per_recipe(run: Run) -> None:
    result = run("capabilities")
    assert result.exit_code == 0, result.output
    lines = {line[1:].split("│")[0].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert "compressed-tensors" in lines["rtn-int4"]
    assert "guarded" in lines["rtn-int4"]
    assert "dense" in lines["cast-bf16"]
    assert "probed with hf-compress" in result.stdout


def test_a_family_or_a_method_shows_every_cell(run: Run) -> None:
    family = run("capabilities", "--family", "gpt2", "--method", "rtn-int4")
    assert family.exit_code == 0, family.output
    assert family.stdout.startswith("gpt2 (GPT2LMHeadModel: conv1d, embedding, linear)")
    assert "guarded, coverage 100%, proof full" in family.stdout
    assert "compressed-tensors  refused [HFC801] " in family.stdout
    assert "Fix: " in family.stdout
    value = json.loads(run("capabilities", "--method", "rtn", "--json").stdout)
    assert {recipe["method"] for recipe in value["recipes"]} == {"rtn"}
    assert len(value["cells"]) == len(value["recipes"]) * len(value["families"]) * len(get_args(Format))


def test_unknown_names_are_refused(run: Run) -> None:
    family = run("capabilities", "--family", "gpt3")
    assert (family.exit_code, family.stdout) == (1, "")
    assert "[HFC202] There is no family 'gpt3' in the matrix. Did you mean 'gpt2'" in family.stderr
    method = run("capabilities", "--method", "rtm", "--json")
    assert method.exit_code == 1
    assert "'rtn'" in json.loads(method.stdout)["error"]["message"]
