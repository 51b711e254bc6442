from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptqmodel_env", ROOT / "scripts" / "gptqmodel_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_gptqmodel_and_this_package_read_each_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock transformers with GPTQModel 7.7 on one side, this package without it on the other."""
    made = script()
    if not (made.ENVIRONMENT / "bin" / "python").exists():
        pytest.skip("no environment with GPTQModel: python scripts/gptqmodel_env.py make")
    monkeypatch.chdir(tmp_path)
    results = made.check(made.ENVIRONMENT)
    assert not list(tmp_path.iterdir()), "it left something in the current directory"
    assert results.keys() == {*made.WRITTEN, *(f"ours {name}" for name in made.READ), "ours gptq with g_idx"}
    for name, found in results.items():
        assert found["relative"] <= found["limit"], name
        assert found["missing"] == [], name
        assert found["packed"] == (6 if name == "ours awq channel" else 7), name
        assert found["kernels"], name
