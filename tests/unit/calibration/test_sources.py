"""Blocks from shards are those of the loaded model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_compress.calibration.sources import LiveSource
from hf_compress.checkpoint.shards import ShardSource, safetensors_files
from hf_compress.core.errors import CorruptCheckpointError, IncompleteLoadError
from tests._utils.tiny import FAMILIES, tiny, tiny_dir


def _kind(name: str) -> type[PreTrainedModel]:
    kind: type[PreTrainedModel] = getattr(transformers, FAMILIES[name][0])
    return kind


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also those that are not saved."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def _same(left: nn.Module, right: nn.Module) -> None:
    found, wanted = _values(left), _values(right)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_whole_model_and_every_submodule(name: str, tmp_path: Path) -> None:
    path = tiny_dir(name, tmp_path)
    loaded = _kind(name).from_pretrained(path)
    source = ShardSource(_kind(name), path)
    _same(source.block(""), loaded)
    stacks = [where for where, module in loaded.named_modules() if isinstance(module, nn.ModuleList)]
    for stack in stacks:
        for index, module in enumerate(loaded.get_submodule(stack)):
            block = source.block(f"{stack}.{index}")
            assert not block.training
            _same(block, module)
    assert all(value.is_meta for value in source.model.parameters() if value.ndim > 1 and value.numel() > 100)


@pytest.mark.parametrize("name", ["llama", "bert-mlm", "t5", "whisper", "qwen3-moe", "gpt2"])
def test_outside_has_values_and_gives_them_back(name: str, tmp_path: Path) -> None:
    path = tiny_dir(name, tmp_path)
    loaded = _kind(name).from_pretrained(path)
    source = ShardSource(_kind(name), path)
    stacks = [
        where for where, module in loaded.named_modules() if isinstance(module, nn.ModuleList) and len(module) == 2
    ]
    inside = tuple(f"{stack}." for stack in stacks)
    before = {name: value.is_meta for name, value in _values(source.model).items()}
    with source.outside(stacks, written=True):
        for key, value in _values(source.model).items():
            if key.startswith(inside):
                assert value.is_meta or key not in source.model.state_dict()
            else:
                assert torch.equal(value, _values(loaded)[key]), key
    assert {name: value.is_meta for name, value in _values(source.model).items()} == before


def test_sixteen_bit_types_and_what_stays_float32(tmp_path: Path) -> None:
    tiny("t5").half().save_pretrained(tmp_path)
    loaded = _kind("t5").from_pretrained(tmp_path)
    assert {value.dtype for value in loaded.parameters()} == {torch.float16, torch.float32}
    _same(ShardSource(_kind("t5"), tmp_path).block(""), loaded)


def test_several_shards_and_ties(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(safetensors_files(tmp_path)) > 3
    source = ShardSource(type(model), tmp_path)
    whole = source.block("")
    assert whole.get_submodule("lm_head").weight is whole.get_submodule("model.embed_tokens").weight
    _same(whole, model)


@pytest.mark.parametrize("equal", [True, False])
def test_ties_that_are_on_disk_twice(equal: bool, tmp_path: Path) -> None:
    untied = tiny("llama", tie_word_embeddings=False)
    if equal:
        untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    untied.save_pretrained(tmp_path)
    config = transformers.LlamaConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    loaded = type(untied).from_pretrained(tmp_path)
    source = ShardSource(type(untied), tmp_path)
    assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) is equal
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is equal
    assert source.model.all_tied_weights_keys == loaded.all_tied_weights_keys
    _same(source.block(""), loaded)


def test_base_model_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    path = tiny_dir("gpt2", tmp_path)
    _same(ShardSource(transformers.GPT2Model, path).block(""), transformers.GPT2Model.from_pretrained(path))


def test_values_are_copies(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    source = ShardSource(_kind("llama"), path)
    first = source.block("model.layers.0")
    for value in first.parameters():
        value.data.zero_()
    _same(source.block("model.layers.0"), _kind("llama").from_pretrained(path).model.layers[0])


def test_live_copies_are_private() -> None:
    model = tiny("llama")
    source = LiveSource(model)
    block = source.block("model.layers.1")
    _same(block, model.model.layers[1])
    before = model.model.layers[1].mlp.up_proj.weight.clone()
    block.get_submodule("mlp.up_proj").weight.data.zero_()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
    with source.outside(["model.layers"], written=True):
        assert source.model is model


def test_missing_weights_and_damaged_files(tmp_path: Path) -> None:
    model = tiny("llama")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "short", state_dict=state)
    with pytest.raises(IncompleteLoadError, match=r"layers\.1\.mlp\.up_proj"):
        ShardSource(type(model), tmp_path / "short")
    model.save_pretrained(tmp_path / "lost", max_shard_size="20KB")
    safetensors_files(tmp_path / "lost")[1].unlink()
    with pytest.raises(CorruptCheckpointError, match="is not there"):
        ShardSource(type(model), tmp_path / "lost")
    (tmp_path / "lost" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match="no index"):
        ShardSource(type(model), tmp_path / "lost")
