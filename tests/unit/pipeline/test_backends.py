"""Plans of other libraries: what is skipped and why, heads, packages that are absent or broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    BackendError,
    ConfigError,
    NothingToQuantizeError,
    TiedWeightsError,
    UnsupportedModelError,
)
from hf_compress.core.packages import require
from hf_compress.core.plan import Plan
from tests._utils.tiny import tiny_dir

REPOSITORY = Path(__file__).parents[3]


def nf4(**options: object) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def int8(**options: object) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), **options)


def row(plan: Plan, name: str) -> tuple[str | None, str, bool]:
    found = next(row for row in plan.rows if row.name == name)
    return found.backend, found.reason, found.in_scope


def test_reasons_of_bitsandbytes(tmp_path: Path) -> None:
    made = hfc.plan(tiny_dir("llama", tmp_path), nf4())
    assert row(made, "lm_head") == (None, "kept by transformers' defaults", False)
    assert row(made, "model.embed_tokens") == (None, "bitsandbytes does not handle Embedding", False)
    assert row(made, "model.layers.0.mlp.up_proj") == ("bitsandbytes nf4", "in scope", True)
    experts = hfc.plan(tiny_dir("qwen3-moe", tmp_path), nf4(), min_coverage=0.0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert row(experts, name) == (None, "bitsandbytes skips fused experts", True)
    t5 = hfc.plan(tiny_dir("t5", tmp_path), nf4(), min_coverage=0.8)
    name = "decoder.block.0.layer.2.DenseReluDense.wo"
    assert row(t5, name) == (None, "transformers keeps it in float32 for this architecture", True)
    gpt2 = hfc.plan(tiny_dir("gpt2", tmp_path), nf4())
    assert row(gpt2, "transformer.h.0.attn.c_attn") == ("bitsandbytes nf4", "in scope", True)


def test_a_skip_list_replaces_the_defaults_and_the_plan_says_so(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    made = hfc.plan(path, nf4(llm_int8_skip_modules=["k_proj"]))
    assert row(made, "model.layers.1.self_attn.k_proj") == (None, "llm_int8_skip_modules: 'k_proj'", True)
    assert row(made, "lm_head")[0] == "bitsandbytes nf4"
    (note,) = made.notes
    assert "head lm_head is quantized" in note
    assert "llm_int8_skip_modules=['k_proj', 'lm_head']" in note

    kept = hfc.plan(path, nf4(llm_int8_skip_modules=["k_proj", "lm_head"]))

    assert row(kept, "lm_head") == (None, "llm_int8_skip_modules: 'lm_head'", False)
    assert kept.notes == ()
    model = hfc.quantize(path, nf4(llm_int8_skip_modules=["k_proj"]))
    assert hfc.inspect(model).plan == made


def test_classifiers_are_quantized_and_the_plan_says_how_to_keep_them(tmp_path: Path) -> None:
    path = tiny_dir("bert-classifier", tmp_path)
    made = hfc.plan(path, int8())
    assert row(made, "classifier")[0] == "torchao int8"
    (note,) = made.notes
    assert "head classifier is quantized" in note
    assert "modules_to_not_convert=['classifier']" in note
    kept = hfc.plan(path, int8(modules_to_not_convert=["classifier"]))
    assert row(kept, "classifier") == (None, "modules_to_not_convert: 'classifier'", False)
    assert hfc.plan(path, BitsAndBytesConfig(load_in_8bit=True)).notes[0].startswith("the head classifier")


@pytest.mark.parametrize(
    ("make", "family", "options", "kept"),
    [
        (int8, "t5", {"include_input_output_embeddings": True}, ""),
        (
            int8,
            "t5",
            {"include_input_output_embeddings": True, "modules_to_not_convert": [".*SelfAttention.k"]},
            "SelfAttention.k",
        ),
        (int8, "t5", {"modules_to_not_convert": [".*SelfAttention.k"]}, "SelfAttention.k"),
        (int8, "llama-tied", {"include_input_output_embeddings": True}, ""),
        (nf4, "llama-tied", {"llm_int8_skip_modules": ["q_proj"]}, "q_proj"),
        (nf4, "llama-tied", {"llm_int8_skip_modules": ["model.embed_tokens"]}, "embed_tokens"),
    ],
)
def test_one_side_of_a_tie_is_refused_with_a_fix_that_works(
    make: Callable[..., Any], family: str, options: dict[str, Any], kept: str, tmp_path: Path
) -> None:
    path = tiny_dir(family, tmp_path)
    with pytest.raises(TiedWeightsError, match="lm_head shares its values with") as caught:
        hfc.plan(path, make(**options), min_coverage=0.0)
    pasted = eval(f"dict({caught.value.fix.removeprefix('keep both: ')})")  # noqa: S307 - what users do with a fix
    made = hfc.plan(path, make(**{**options, **pasted}), min_coverage=0.0)
    assert row(made, "lm_head")[0] is None
    assert made.coverage > 0.5
    assert not [one.name for one in made.rows if kept and one.name.endswith(kept) and one.backend]


def test_a_skip_list_that_is_a_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modules_to_not_convert='lm_head' must be a list") as caught:
        hfc.plan(tiny_dir("llama", tmp_path), int8(modules_to_not_convert="lm_head"))
    assert caught.value.fix == "modules_to_not_convert=['lm_head']"


def test_torchao_on_a_network_of_convolutions_says_what_it_covers(tmp_path: Path) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"torchao does not handle Conv2d.*Fix: hf_compress\.RTN"):
        hfc.plan(tiny_dir("resnet", tmp_path), int8())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator the option keeps nothing")
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_offload_to_the_cpu_on_a_machine_with_nothing_else(bits: dict[str, bool], tmp_path: Path) -> None:
    config = BitsAndBytesConfig(**bits, llm_int8_enable_fp32_cpu_offload=True)
    with pytest.raises(ConfigError, match="no weight would be quantized"):
        hfc.plan(tiny_dir("llama", tmp_path), config)


def test_a_plain_module_gets_a_fix_that_works() -> None:
    model = torch.nn.utils.skip_init(torch.nn.Linear, 64, 64)
    with pytest.raises(UnsupportedModelError, match="Linear is none of transformers") as caught:
        hfc.quantize(model, nf4())
    assert "save_pretrained" not in caught.value.fix
    assert "quantize(model, hf_compress.RTNQuantConfig" in caught.value.fix


def test_labels_and_bytes_of_torchao(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    four = hfc.plan(path, TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)))
    assert set(four.by_scheme()) == {"kept", "int4"}
    assert "stores these int4 weights unpacked" in four.notes[0]
    eight = hfc.plan(path, TorchAoConfig(Float8WeightOnlyConfig()))
    assert set(eight.by_scheme()) == {"kept", "float8"}
    found = next(row for row in eight.rows if row.backend)
    assert found.stored_bytes == found.parameters + 4 * found.shape[0]


def test_plan_is_serialisable_and_reads_no_weights(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    (path / "model.safetensors").unlink()
    made = hfc.plan(path, nf4(bnb_4bit_compute_dtype=torch.bfloat16))
    assert Plan.model_validate_json(made.model_dump_json()) == made
    assert made.request["bnb_4bit_compute_dtype"] == "bfloat16"


def test_progress_is_told_at_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    hfc.quantize(tiny_dir("llama", tmp_path), int8(), progress=lambda done, planned: told.append((done, planned)))
    assert told == [(14, 14)]


@pytest.mark.skipif(not has_avx512bf16(), reason="only bitsandbytes' kernel for AVX512-BF16 fails on odd shapes")
def test_shapes_that_would_fail_in_the_first_forward(tmp_path: Path) -> None:
    path = tiny_dir("bert-classifier", tmp_path)
    with pytest.raises(BackendError, match=r"classifier has 3×64") as caught:
        hfc.plan(path, nf4())
    assert caught.value.fix == "llm_int8_skip_modules=['classifier']"
    assert hfc.plan(path, nf4(llm_int8_skip_modules=["classifier"])).coverage == 1.0


def test_absent_package() -> None:
    with pytest.raises(BackendError, match="not installed") as caught:
        require("hfc_no_such_package")
    assert caught.value.fix == 'pip install "hf-compress[hfc_no_such_package]"'


BROKEN = """
import sys
import hf_compress as hfc
from transformers import BitsAndBytesConfig
from tests._utils.tiny import output, tiny, tiny_inputs
for call in (
    lambda: hfc.quantize(sys.argv[1], BitsAndBytesConfig(load_in_8bit=True)),
    lambda: hfc.load(sys.argv[3]),
):
    try:
        call()
    except hfc.HFCompressError as error:
        print(error)
model = hfc.quantize(sys.argv[1], hfc.RTNQuantConfig())
output(model, tiny_inputs(model))
model.save_pretrained(sys.argv[2])
print(hfc.inspect(hfc.load(sys.argv[2])).coverage)
"""


def test_broken_package_costs_nothing_else(tmp_path: Path, worker: CleanWorker) -> None:
    path, saved = tiny_dir("llama", tmp_path), tmp_path / "saved"
    hfc.save(hfc.quantize(path, nf4()), saved, worker=worker)
    broken = tmp_path / "broken" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise RuntimeError("libcudart.so.99 not found\\nsecond line")')
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(path), str(tmp_path / "out"), str(saved)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{broken.parent}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    quantizing, loading, coverage = done.stdout.splitlines()[-3:]
    for said in (quantizing, loading):
        assert said.startswith("[HFC301] The package 'bitsandbytes' is installed but broken: RuntimeError: libcudart")
        assert 'pip install "hf-compress[bnb]"' in said
        assert "second line" not in said
    assert coverage == "1.0"
