"""Plain modules: saved without a config, proven by our own reader, read into a skeleton, strictly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from transformers import AutoConfig, AutoModel, MarianConfig, MarianMTModel

import hf_compress as hfc
from hf_compress.checkpoint.proof import same_bytes
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    AlreadyQuantizedError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatError,
    InputError,
    OutputExistsError,
    ProofError,
    TiedWeightsError,
    UnsupportedModelError,
)
from hf_compress.modules.kernels.choose import kernel_counts, reference_kernels
from tests._utils.tiny import tiny, tiny_inputs
from tests.conformance.helpers import reference_logits, same_states, tensors_on_disk

INT4 = hfc.RTNQuantConfig(bits=4, group_size="channel")
INT8 = hfc.Int8DynamicQuantConfig()


class Net(nn.Module):
    """A little of everything: parameters and buffers of its own, saved and not."""

    def __init__(self, width: int = 16, classes: int = 5, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.rnn = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(2 * hidden, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, classes)
        self.gain = nn.Parameter(torch.rand(classes))
        self.register_buffer("offset", torch.randn(classes))
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        hidden, _ = self.rnn(self.table(ids))
        pooled = self.norm(self.conv(hidden.transpose(1, 2))).amax(-1)
        made = self.head(pooled) * self.gain * self.scale + self.offset
        return made if weight is None else made * weight


def build(seed: int = 0, kind: Callable[..., nn.Module] = Net, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**options).eval()


def ids() -> Tensor:
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(module: nn.Module) -> Tensor:
    with reference_kernels(module):
        return module(ids())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hfc.save(hfc.quantize(build(), INT4), tmp_path / "out", inputs=[ids()])
    return tmp_path / "out"


@pytest.mark.parametrize("config", [INT4, INT8, hfc.RTNQuantConfig(bits=3, group_size=8, symmetric=False)], ids=repr)
def test_round_trip(config: Any, tmp_path: Path) -> None:
    module = hfc.quantize(build(), config)
    proof = hfc.save(module, tmp_path / "out", inputs=[ids(), {"ids": ids(), "weight": torch.ones(5)}, (ids(),)])
    assert proof.level == "own-reader"
    assert "plain module" in proof.reason
    assert [check.name for check in proof.checks][1:] == ["0.output", "1.output", "2.output"]
    assert all(check.difference == 0.0 for check in proof.checks)

    skeleton = build(seed=9)
    loaded = hfc.load(tmp_path / "out", model=skeleton)
    assert loaded is skeleton
    assert isinstance(loaded, Net)
    assert same_states(loaded, module)
    assert torch.equal(outputs(loaded), outputs(module))
    assert kernel_counts(loaded) == kernel_counts(module)
    inspected = hfc.inspect(tmp_path / "out")
    assert inspected.proof == proof
    assert inspected.plan is not None
    assert inspected.plan.rows == hfc.inspect(module).plan.rows


def test_what_lies_on_disk(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        "config.json",
        "hf_compress.json",
        "hf_compress.safetensors",
    ]
    names = set(tensors_on_disk(saved))
    assert {"rnn.weight_hh_l1_reverse_packed", "conv.weight_scale", "table.weight", "gain", "offset"} <= names
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= names
    assert not {"scale", "conv.weight", "rnn.weight_hh_l0"} & names
    again = saved.parent / "again"
    hfc.save(hfc.quantize(build(), INT4), again, inputs=[ids()])
    for name in ("hf_compress.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_stock_refuses_it(saved: Path) -> None:
    for kind in (AutoModel, AutoConfig):
        with pytest.raises(ValueError, match="model_type"):
            kind.from_pretrained(saved)


def test_without_inputs_the_proof_says_so(tmp_path: Path) -> None:
    proof = hfc.save(hfc.quantize(build(), INT4), tmp_path / "out")
    assert "outputs were not compared" in proof.reason
    assert [check.name.split()[-1] for check in proof.checks] == ["re-read"]


def test_skeleton_on_meta(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))

    module = hfc.quantize(build(kind=make), hfc.RTNQuantConfig(group_size="channel"))
    hfc.save(module, tmp_path / "out")
    with torch.device("meta"):
        skeleton = make()
    value = torch.ones(2, 3, 16)
    assert torch.equal(hfc.load(tmp_path / "out", model=skeleton)(value), module(value))


def test_meta_skeleton_whose_buffers_are_not_saved_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        skeleton = Net()
    with pytest.raises(UnsupportedModelError, match="buffers without values: scale"):
        hfc.load(saved, model=skeleton)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.GRU, lambda a, b: nn.Conv2d(a, b, 3)])
def test_a_single_layer(kind: Callable[..., nn.Module], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return kind(8, 16)

    module = hfc.quantize(build(kind=make), INT8)
    value = torch.randn((2, 8, 5, 5) if isinstance(module, nn.Conv2d) else (2, 3, 8), generator=torch.Generator())
    proof = hfc.save(module, tmp_path / "out", inputs=[value])
    assert len(proof.checks) >= 2
    assert same_states(hfc.load(tmp_path / "out", model=build(seed=3, kind=make)), module)


def test_data_types_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    module = hfc.quantize(build().bfloat16(), INT4)
    hfc.save(module, tmp_path / "out", inputs=[ids()])
    skeleton = build(seed=3)
    skeleton.scale = skeleton.scale.bfloat16()  # it is not saved
    loaded = hfc.load(tmp_path / "out", model=skeleton)
    assert loaded.gain.dtype == loaded.rnn.weight_ih_l0.dtype == torch.bfloat16
    assert torch.equal(outputs(loaded), outputs(module))


class Shared(nn.Module):
    """One parameter under two names, one module under two names, and a view that shares memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.bias = self.first.bias
        self.again = self.first
        both = torch.randn(2, 4)
        self.register_buffer("whole", both)
        self.register_buffer("part", both[0])

    def forward(self, value: Tensor) -> Tensor:
        return self.again(self.second(self.first(value))) + self.whole.sum() + self.part.sum()


def test_shared_parameters_and_modules(tmp_path: Path) -> None:
    module = hfc.quantize(build(kind=Shared), hfc.RTNQuantConfig(bits=4, group_size=8))
    value = torch.ones(2, 8)
    hfc.save(module, tmp_path / "out", inputs=[value])
    assert sum(name.endswith("bias") for name in tensors_on_disk(tmp_path / "out")) == 1
    loaded = hfc.load(tmp_path / "out", model=build(seed=3, kind=Shared))
    assert loaded.second.bias is loaded.first.bias
    assert loaded.again is loaded.first
    assert torch.equal(loaded(value), module(value))


def test_loaded_can_be_saved_and_stays_the_same(saved: Path) -> None:
    loaded = hfc.load(saved, model=build(seed=3))
    hfc.save(loaded, saved.parent / "again", inputs=[ids()])
    assert same_states(hfc.load(saved.parent / "again", model=build(seed=4)), loaded)
    with pytest.raises(OutputExistsError):
        hfc.save(loaded, saved)
    hfc.save(loaded, saved, overwrite=True)


def test_no_skeleton(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"plain module, Net") as caught:
        hfc.load(saved)
    assert f'hf_compress.load("{saved}", model=Net(...))' in caught.value.fix


MISFITS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another width": (lambda: Net(hidden=16), UnsupportedModelError, r"other weights:.*rnn.weight_ih_l0"),
    "another head": (lambda: Net(classes=6), UnsupportedModelError, r"other forms:.*gain \(6,\) instead of \(5,\)"),
    "lacks a layer": (lambda: nn.Sequential(), UnsupportedModelError, r"it lacks conv.bias"),
    "has more": (
        lambda: nn.ModuleDict({**dict(Net().named_children()), "extra": nn.Linear(2, 2)}),
        UnsupportedModelError,
        r"the checkpoint lacks extra.bias, extra.weight",
    ),
    "packed": (lambda: hfc.quantize(Net().eval(), INT4), AlreadyQuantizedError, "quantized already"),
    "a class": (lambda: Net, UnsupportedModelError, "is a type, not a module"),
    "a path": (lambda: "net.pt", UnsupportedModelError, "is a str, not a module"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_skeletons_that_do_not_fit(name: str, saved: Path) -> None:
    make, kind, words = MISFITS[name]
    skeleton = build(kind=make) if name not in ("a class", "a path") else make()
    before = {key: value.clone() for key, value in skeleton.state_dict().items()} if name in ("has more",) else {}
    with pytest.raises(kind, match=words):
        hfc.load(saved, model=skeleton)
    assert all(torch.equal(skeleton.state_dict()[key], value) for key, value in before.items())


def test_skeleton_of_another_kind_of_layer(tmp_path: Path) -> None:
    """The same names and shapes, another class."""
    hfc.save(hfc.quantize(build(kind=lambda: nn.Linear(8, 8, bias=False)), INT4), tmp_path / "out")
    skeleton = build(kind=lambda: nn.Embedding(8, 8))
    before = skeleton.weight.clone()
    with pytest.raises(UnsupportedModelError, match=r"embedding .* instead of linear"):
        hfc.load(tmp_path / "out", model=skeleton)
    assert torch.equal(skeleton.weight, before)


class Pair(nn.Module):
    """Two layers, the first of which can be something else."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first or nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value))


class BufferedLinear(nn.Module):
    """A linear layer whose weight is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(8, 8))
        self.bias = nn.Parameter(torch.zeros(8))


class IntegerBias(nn.Linear):
    """A linear layer with a bias of integers."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        del self.bias
        self.register_buffer("bias", torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (lambda: nn.LayerNorm(8), r"other weights: first LayerNorm.weight \(8,\) instead of linear \(8, 8\)"),
        (BufferedLinear, r"other weights: first BufferedLinear.weight \(8, 8\) instead of linear \(8, 8\)"),
        (lambda: nn.Bilinear(8, 8, 8), r"other weights: first other \(8, 8, 8\) \(Bilinear .*\) instead of linear"),
        (IntegerBias, r"other forms: first.bias \(8,\) of integers instead of \(8,\)"),
    ],
    ids=["one dimension", "a buffer", "another class", "integers"],
)
def test_nothing_is_filled_where_a_planned_weight_is_something_else(
    first: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    hfc.save(hfc.quantize(build(kind=Pair), INT4), tmp_path / "out")
    skeleton = build(kind=lambda: Pair(first()))
    before = {key: value.clone() for key, value in skeleton.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=words):
        hfc.load(tmp_path / "out", model=skeleton)
    assert before.keys() == skeleton.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in skeleton.state_dict().items())


class Table(nn.Module):
    """An embedding, and where asked a head that is tied to it."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
        if head:
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.table(ids))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_layer_that_was_not_saved_is_named(device: str, tmp_path: Path) -> None:
    config = hfc.Int8DynamicQuantConfig(embeddings="int8")
    hfc.save(hfc.quantize(build(kind=Table), config), tmp_path / "out")
    with torch.device(device):
        skeleton = build(kind=Table, head=True)
    with pytest.raises(UnsupportedModelError, match=r"the checkpoint lacks head.weight"):
        hfc.load(tmp_path / "out", model=skeleton)


def test_a_tied_layer_that_was_saved_is_filled(tmp_path: Path) -> None:
    config = hfc.Int8DynamicQuantConfig(embeddings="int8")
    hfc.save(hfc.quantize(build(kind=Table, head=True), config), tmp_path / "out")
    loaded = hfc.load(tmp_path / "out", model=build(seed=3, kind=Table, head=True))
    assert loaded.head.weight_packed is loaded.table.weight_packed
    with pytest.raises(UnsupportedModelError, match=r"it lacks head.weight"):
        hfc.load(tmp_path / "out", model=build(seed=3, kind=Table))


def test_damage_is_found(saved: Path) -> None:
    file = saved / "hf_compress.safetensors"
    tensors = load_file(file)
    metadata = {"hf_compress_shared": "{}"}
    save_file({name: value for name, value in tensors.items() if name != "conv.weight_packed"}, file, metadata)
    with pytest.raises(CorruptCheckpointError, match=r"conv.weight_packed"):
        hfc.load(saved, model=build())
    with pytest.raises(CorruptCheckpointError):
        hfc.verify(saved)
    file.write_bytes(b"no safetensors")
    with pytest.raises(CorruptCheckpointError):
        hfc.load(saved, model=build())


@pytest.mark.parametrize("text", ["{bad", "[1]", '"names"', '{"first.bias": 3}', '{"first.bias": "nowhere"}'])
def test_damaged_names_of_shared_tensors_are_found(text: str, saved: Path) -> None:
    file = saved / "hf_compress.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, {**metadata, "hf_compress_shared": text})
    (saved / "hf_compress.json").unlink()
    for read in (hfc.verify, lambda path: hfc.load(path, model=build())):
        with pytest.raises(CorruptCheckpointError, match="hf_compress_shared"):
            read(saved)


def test_verify_checks_tensors_and_says_so(saved: Path) -> None:
    before = hfc.inspect(saved).proof
    for _ in range(2):
        proof = hfc.verify(saved)
        assert proof.checks == before.checks
        assert proof.reason.count("verified again") == 1
    with pytest.raises(InputError, match="plain module"):
        hfc.verify(saved, inputs=[{"ids": ids()}])
    (saved / "config.json").write_text(json.dumps({**json.loads((saved / "config.json").read_text()), "x": 1}))
    with pytest.raises(CorruptCheckpointError, match=r"config.json"):
        hfc.verify(saved)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([torch.ones(3, 7)], "can't run the inputs"),
        ([{"nothing": ids()}], "no argument"),
        ([(ids(), (ids(),))], r"\['weight'\] must be a tensor, got tuple"),
        ([{"ids": pack_sequence([ids()[0]])}], r"\['ids'\] must be a tensor, got PackedSequence"),
        ([(ids(), ids(), ids())], "3 inputs were given"),
        ("text", "is text"),
        ([], "non-empty"),
    ],
)
def test_bad_inputs(inputs: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        hfc.save(hfc.quantize(build(), INT4), tmp_path / "out", inputs=inputs)
    assert "tokenizer" not in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="was not compressed"):
        hfc.save(build(), tmp_path / "out")
    with pytest.raises(FormatError, match="plain module"):
        hfc.quantize(build(), hfc.RTNQuantConfig(group_size="channel", format="compressed-tensors"))
    with pytest.raises(CheckpointNotFoundError):
        hfc.load(tmp_path / "nothing", model=build())

    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    with pytest.raises(UnsupportedModelError, match="no parameter or buffer: _extra_state"):
        hfc.save(hfc.quantize(build(kind=lambda: Odd(8, 8)), INT4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


UNSTORABLE = {
    "sparse": torch.eye(3).to_sparse(),
    "complex128": torch.ones(2, dtype=torch.complex128),
    "meta": torch.empty(2, device="meta"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_buffers_that_no_file_holds_are_refused(name: str, tmp_path: Path) -> None:
    module = build(kind=Pair)
    module.second.register_buffer("odd", UNSTORABLE[name])
    with pytest.raises(UnsupportedModelError, match=r"second.odd \("):
        hfc.save(hfc.quantize(module, INT4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sparse", "complex128"])
def test_such_buffers_can_be_left_out_of_the_state(name: str, tmp_path: Path) -> None:
    module = build(kind=Pair)
    module.register_buffer("odd", UNSTORABLE[name], persistent=False)
    proof = hfc.save(hfc.quantize(module, INT4), tmp_path / "out", inputs=[torch.ones(2, 8)])
    assert [check.name for check in proof.checks][1:] == ["0.output"]


@pytest.mark.parametrize("value", [float("nan"), -0.0, 1j, True, 2**60 + 1])
def test_any_other_buffer_is_kept_to_the_bit(value: Any, tmp_path: Path) -> None:
    module = build(kind=Pair)
    module.register_buffer("odd", torch.tensor(value))
    hfc.save(hfc.quantize(module, INT4), tmp_path / "out")
    skeleton = build(seed=3, kind=Pair)
    skeleton.register_buffer("odd", torch.zeros_like(module.odd))
    loaded = hfc.load(tmp_path / "out", model=skeleton)
    assert same_bytes(loaded.odd, module.odd)
    assert not same_bytes(loaded.odd, torch.zeros_like(loaded.odd))


class Answer(nn.Module):
    """A layer whose outputs come in a form of the caller's choice."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(8, 8), form

    def forward(self, value: Tensor) -> Any:
        return self.form(self.inner(value))


@dataclasses.dataclass
class Scored:
    """A result of the user's own."""

    score: Tensor
    label: str = "a"


FORMS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "nested": (lambda made: {"a": (made, [made + 1]), "b": "text"}, ["0.a.0", "0.a.1.0"]),
    "integers": (lambda made: made.argmax(-1), ["0.output"]),
    "truth": (lambda made: (made > 0, made), ["0.0", "0.1"]),
    "a scalar": (lambda made: made.sum(), ["0.output"]),
    "a number": (lambda made: made.sum().item(), ["0.output"]),
    "complex": (lambda made: torch.complex(made, made), ["0.output"]),
    "empty": (lambda made: (made, made[:, :0]), ["0.0", "0.1"]),
    "a data class": (lambda made: Scored(made), ["0.score"]),
    "sparse": (lambda made: made.relu().to_sparse(), ["0.output"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_outputs_of_any_form_are_compared(name: str, tmp_path: Path) -> None:
    form, names = FORMS[name]
    module = hfc.quantize(build(kind=lambda: Answer(form)), INT4)
    proof = hfc.save(module, tmp_path / "out", inputs=[torch.ones(2, 8)])
    assert [check.name for check in proof.checks][1:] == names
    assert "not compared" not in proof.reason


def test_states_of_a_recurrent_layer_are_compared(tmp_path: Path) -> None:
    value = torch.ones(3, 2, 8)
    proof = hfc.save(hfc.quantize(build(kind=lambda: nn.LSTM(8, 8)), INT8), tmp_path / "out", inputs=[value])
    assert [check.name for check in proof.checks][1:] == ["0.0", "0.1.0", "0.1.1"]


def test_outputs_without_tensors_are_said_not_to_be_compared(tmp_path: Path) -> None:
    module = hfc.quantize(build(kind=lambda: Answer(lambda made: {"shape": str(made.shape), "none": None})), INT4)
    proof = hfc.save(module, tmp_path / "out", inputs=[torch.ones(2, 8)])
    assert len(proof.checks) == 1
    assert "outputs were not compared" in proof.reason
    assert "hold no tensor" in proof.reason


@pytest.mark.parametrize("index", [0, 1])
def test_outputs_that_differ_deep_inside_are_found(index: int, tmp_path: Path) -> None:
    """What changes from run to run, as an integer and inside of a nest."""
    runs = itertools.count()
    forms = [lambda made: {"a": [made, (made + next(runs),)]}, lambda made: made.argmax(-1) + next(runs)]
    module = hfc.quantize(build(kind=lambda: Answer(forms[index])), INT4)
    with pytest.raises(ProofError, match=["0.a.1.0", "0.output"][index]):
        hfc.save(module, tmp_path / "out", inputs=[torch.ones(2, 8)])


def test_a_directory_of_a_plain_module_is_named_as_such(saved: Path) -> None:
    for run in (hfc.quantize, hfc.plan):
        with pytest.raises(AlreadyQuantizedError, match=r"holds a plain module, Net"):
            run(str(saved), INT4)


def test_ties_of_a_plain_module_have_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(TiedWeightsError) as caught:
        hfc.quantize(build(kind=Table, head=True), hfc.Int8DynamicQuantConfig())
    assert "its own parameter" in caught.value.fix


def test_cast(tmp_path: Path) -> None:
    module = hfc.quantize(build(), hfc.CastConfig())
    assert module.gain.dtype == torch.bfloat16
    hfc.save(module, tmp_path / "out", inputs=[ids()])
    loaded = hfc.load(tmp_path / "out", model=build(seed=3))
    assert same_states(loaded, module)


def test_transformers_model_as_skeleton(worker: CleanWorker, tmp_path: Path) -> None:
    """Of a guarded checkpoint; a stock one needs none."""
    model = hfc.quantize(tiny("gpt2"), hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8"))
    hfc.save(model, tmp_path / "out", worker=worker)
    skeleton = tiny("gpt2")
    for value in skeleton.parameters():
        value.data.zero_()
    loaded = hfc.load(tmp_path / "out", model=skeleton)
    assert loaded is skeleton
    inputs = tiny_inputs(model)
    assert torch.equal(reference_logits(loaded, inputs), reference_logits(model, inputs))
    assert same_states(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert same_states(hfc.load(tmp_path / "again"), model)
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        hfc.load(tmp_path / "out", model=tiny("llama"))
    stock = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=4, group_size=32))
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ConfigError, match="compressed-tensors checkpoint"):
        hfc.load(tmp_path / "stock", model=tiny("llama"))


def test_skeleton_of_an_architecture_that_is_stored_under_other_names(tmp_path: Path) -> None:
    model = hfc.quantize(tiny("vit"), hfc.RTNQuantConfig(bits=4, group_size=32, format="guarded"))
    model.save_pretrained(tmp_path / "out")
    assert tensors_on_disk(tmp_path / "out").keys() != model.state_dict().keys()
    assert same_states(hfc.load(tmp_path / "out", model=tiny("vit")), model)


def test_skeleton_with_values_that_are_never_stored(tmp_path: Path) -> None:
    """Marian's sinusoidal positions: transformers leaves them out of checkpoints and computes them."""
    config = MarianConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, skeleton = MarianMTModel(config), MarianMTModel(config)
    assert model._keys_to_ignore_on_save
    hfc.quantize(model, hfc.RTNQuantConfig(bits=4, group_size=32, format="guarded")).save_pretrained(tmp_path / "out")
    assert same_states(hfc.load(tmp_path / "out", model=skeleton), model)


def test_a_module_next_to_its_checkpoint_is_not_needed(saved: Path) -> None:
    """Copied elsewhere, it still reads."""
    moved = shutil.copytree(saved, saved.parent / "elsewhere")
    assert torch.equal(outputs(hfc.load(moved, model=build(seed=3))), outputs(hfc.load(saved, model=build(seed=5))))
