"""`from_pretrained(quantization_config=QATConfig(...))`, and the places that refuse a method that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import hf_compress as hfc
from hf_compress.apply.planning import is_quantized
from hf_compress.checkpoint.handover import training_plan_of
from hf_compress.cli.main import app
from hf_compress.core.errors import ConfigError, NothingToQuantizeError
from hf_compress.core.registry import METHODS, TRAINED, untrained
from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from hf_compress.training.qat.modules import fake_modules
from tests._utils.tiny import tiny, tiny_dir
from tests.conformance.helpers import hashes

from .runs import STEPS, same, state, stored, trainer_of

INT4: dict[str, Any] = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier; tests must not change it."""
    return tiny_dir("bert-classifier", tmp_path_factory.mktemp("models"))


def loaded(source: Path, **fields: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(source, quantization_config=QATConfig(**fields))


def test_the_request_leaves_no_trace(source: Path, tmp_path: Path) -> None:
    model = loaded(source, **INT4)
    plain = AutoModelForSequenceClassification.from_pretrained(source)
    assert len(list(fake_modules(model))) == len(training_plan_of(model).quantized) > 0  # type: ignore[union-attr]
    assert same(state(plain), {name: value for name, value in state(model).items() if ".hfc_" not in name})
    assert not is_quantized(model)
    assert vars(model).get("is_quantized", False) is vars(plain).get("is_quantized", False) is False
    assert not {"hf_quantizer", "quantization_method"} & set(vars(model))
    assert model.config.to_dict() == plain.config.to_dict()
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    assert hashes(tmp_path / "ours", "config.json") == hashes(tmp_path / "theirs", "config.json")
    again, info = type(plain).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert same(state(again), state(plain))


@pytest.mark.touches_rng
def test_trains_as_a_model_that_the_callback_prepares(source: Path, tmp_path: Path) -> None:
    fields = {**INT4, "learn_scales": True, "start": 2}
    model = loaded(source, **fields)
    trainer_of(model, "bert", tmp_path / "a", [QATCallback()]).train()
    plain = AutoModelForSequenceClassification.from_pretrained(source)
    trainer_of(plain, "bert", tmp_path / "b", [QATCallback(QATConfig(**fields))]).train()
    assert is_quantized(model)
    assert same(state(model), state(plain))
    first, second = (stored(tmp_path / name / f"checkpoint-{STEPS}") for name in "ab")
    assert same(first, second)
    for name in "ab":
        config = json.loads((tmp_path / name / f"checkpoint-{STEPS}" / "config.json").read_text())
        assert "quantization_config" not in config


@pytest.mark.touches_rng
def test_a_checkpoint_of_a_training_warns_of_what_is_left_out(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {**INT4, "learn_scales": True}
    trainer_of(loaded(source, **fields), "bert", tmp_path, [QATCallback()]).train()
    assert "beside its weights" not in caplog.text
    again = loaded(tmp_path / f"checkpoint-{STEPS}", **fields)
    assert "beside its weights, such as" in caplog.text
    learned = [value for name, value in again.named_parameters() if name.endswith("hfc_scale_bias")]
    assert learned
    assert not any(bool(value.any()) for value in learned)


def test_the_callback_takes_the_models_own_configuration(source: Path) -> None:
    model = loaded(source, **INT4, freeze=7)
    callback = QATCallback()
    callback.prepare(model)
    assert callback.config == QATConfig(**INT4, freeze=7)
    QATCallback(QATConfig(**INT4, freeze=7)).prepare(model)
    with pytest.raises(ConfigError, match=r"is prepared with QATConfig.*and QATCallback has QATConfig"):
        QATCallback(QATConfig(**INT4)).prepare(model)


def test_a_plan_that_is_refused_is_refused_before_the_weights_are_read(source: Path) -> None:
    with pytest.raises(NothingToQuantizeError):
        loaded(source, skip=["*"])


# --- what trains nothing refuses it ---

REFUSALS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize a live model": lambda source, out: hfc.quantize(tiny("bert-classifier"), QATConfig()),
    "quantize a directory": lambda source, out: hfc.quantize(source, QATConfig()),
    "compress": lambda source, out: hfc.compress(source, QATConfig(), out),
    "compress with a recipe": lambda source, out: hfc.compress(source, _recipe(out), out),
    "preflight": lambda source, out: hfc.preflight(source, QATConfig()),
    "compare": lambda source, out: hfc.compare(source, [hfc.RTNQuantConfig(), QATConfig()], out=out),
}


def _recipe(out: Path) -> Path:
    file = out.parent / "recipe.yaml"
    file.write_text("method: qat\nbits: 4\n")
    return file


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_with_the_way_out(what: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"works while a model is trained.*QATCallback\(hf_compress.QATConfig\("):
        REFUSALS[what](source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "MODEL", "OUT", "--method", "qat"], ["compare", "MODEL", "--methods", "rtn,qat", "--out", "OUT"]],
    ids=["quantize", "compare"],
)
def test_the_command_line_refuses_it(arguments: list[str], source: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(source), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [places.get(word, word) for word in arguments])
    assert result.exit_code == 1
    assert "HFC202" in result.stderr
    assert "QATCallback" in result.stderr
    assert not (tmp_path / "out").exists()


def test_lists_of_what_can_be_done_at_once_leave_it_out() -> None:
    assert {method.name for method in METHODS if method.prepare is not None} == set(TRAINED) == {"qat"}
    assert set(untrained()) == set(METHODS.names()) - {"qat"}
    for command in ("quantize", "compare"):
        assert "qat" not in CliRunner().invoke(app, [command, "--help"]).stdout
    result = CliRunner().invoke(app, ["capabilities", "--method", "qat"])
    assert result.exit_code != 0


def test_a_plan_may_be_looked_at(source: Path) -> None:
    plan = hfc.plan(source, QATConfig(**INT4))
    assert plan.method == "qat"
    assert plan.coverage == 1.0


def test_the_configuration_survives_its_dictionary() -> None:
    config = QATConfig(bits=3, group_size=16, learn_scales=True, start=5, freeze=0.75)
    again = hfc.QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert (type(again.start), type(again.freeze)) == (int, float)  # a step and a fraction
