"""The one place where methods and checkpoint formats are announced, so that `core` imports neither.

A built-in is *declared* by name and module path, which costs nothing at import time; the module is imported,
and registers itself, when its name is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from .errors import MethodError, nearest

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from ..calibration.block import Compressor
    from .config import QuantConfig, QuantFields
    from .plan import Plan, PlanRow
    from .scheme import Scheme
    from .weights import Weight


class Named(Protocol):
    """Anything that is registered under its own name."""

    @property
    def name(self) -> str:
        """The name it is registered under."""


Entry = TypeVar("Entry", bound=Named)


@dataclass(frozen=True)
class Quantized:
    """What a method returns for one weight, in canonical orientation (rows × columns, or experts × rows × columns).

    Attributes:
        codes: int8 tensor of the weight's shape; values within the signed range of the bit width.
        scale: floating tensor, one value per group (rows × groups), per row (rows × 1) or for the tensor (1).
        zero_point: int8 tensor of the scale's shape, or None when symmetric.
        codebook: float32 tensor of 2^bits values in -1 … 1, or None for a uniform grid. A code is a position in it,
            minus 2^(bits - 1).
        g_idx: int32 group of each column (columns), or None where groups are consecutive columns.
        input_scale: Floating scale of the module's input (1), where it is quantized statically; else None.
        input_zero_point: int8 zero point of the input (1), or None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None = None
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A compression method: a pure function on tensors plus a declaration.

    Attributes:
        name: The key in configurations and on the command line.
        config: The public configuration class.
        summary: One line on when to use it.
        scheme: Maps fields and a weight to a compressed-tensors scheme, a dtype to cast to, or a reason to keep it.
        quantize: Quantizes a floating weight (rows × columns or experts × rows × columns) to a scheme; None for
            pure casts.
        needs_data: Whether calibration data is needed.
        compressor: Of methods that need data: makes what compresses one block of the model after the other.
        gram_copies: Of methods that need data: float32 matrices of columns × columns that it holds at once, for the
            widest weight.
        float32_copies: Of methods that need data: how often, at most, it holds a block in float32 before it gathers
            statistics, to find what can be scaled; of a block that is float32 already, once less.
        quantizes_activations: Whether the scheme of a linear layer also quantizes its input at run time, which depends
            on the input's rank.
        notes: Remarks on these fields for the plan, such as what this processor is slow at.
        prepare: Of methods that train: lets a live dense model compute with fake-quantized values. A Trainer's
            callback carries them out; what quantizes without training refuses them.
    """

    name: str
    config: type[QuantConfig]
    summary: str
    scheme: Callable[[QuantFields, Weight], Scheme | dtype | str]
    quantize: Callable[[Tensor, Scheme], Quantized] | None = None
    needs_data: bool = False
    compressor: Callable[[QuantFields], Compressor] | None = None
    gram_copies: int = 0
    float32_copies: int = 0
    quantizes_activations: bool = False
    notes: Callable[[QuantFields], tuple[str, ...]] | None = None
    prepare: Callable[[nn.Module, Plan, QuantFields], None] | None = None


class Format(Protocol):
    """A checkpoint layout. `refusal` is what planning needs of it; reading and writing live with the format."""

    @property
    def name(self) -> str:
        """The key in configurations."""

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why this format can't hold a row of the plan, or None when it can."""

    def adapted(self, row: PlanRow) -> PlanRow:
        """A quantized row as this format stores it, such as with scales that fit its data type."""


@dataclass
class Registry(Generic[Entry]):
    """Entries by name, with lazily imported built-ins.

    Args:
        what: The word for an entry in messages, such as `method`.
    """

    what: str
    _entries: dict[str, Entry] = field(default_factory=dict)
    _declared: dict[str, str] = field(default_factory=dict)

    def declare(self, name: str, module: str) -> None:
        """Announce that importing `module` registers `name`."""
        self._declared[name] = module

    def register(self, entry: Entry) -> Entry:
        """Add an entry.

        Raises:
            MethodError: The name is taken by another entry.
        """
        if entry.name in self._entries:
            raise MethodError(
                f"The {self.what} {entry.name!r} is registered already, by {self._entries[entry.name]!r}.",
                "choose another name",
            )
        self._entries[entry.name] = entry
        return entry

    def get(self, name: object) -> Entry:
        """The entry of that name.

        Raises:
            MethodError: Nothing is registered under the name.
        """
        key = str(name)
        if key not in self._entries and key in self._declared:
            importlib.import_module(self._declared[key])
        if key not in self._entries:
            raise MethodError(
                f"Unknown {self.what} {name!r}. {nearest(key, self.names())}".rstrip(),
                f"choose one of {', '.join(self.names())}",
            )
        return self._entries[key]

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._entries, *self._declared})

    def __iter__(self) -> Iterator[Entry]:
        return (self.get(name) for name in self.names())


METHODS: Registry[Method] = Registry("method")
FORMATS: Registry[Format] = Registry("format")

TRAINED = ("qat",)
"""Methods that train; named here so that lists of the others import none of them."""


def untrained() -> list[str]:
    """Names of the methods that need no training: what `quantize`, `compress` and the command line offer, sorted."""
    return [name for name in METHODS.names() if name not in TRAINED]


for _name in ("rtn", "hqq", "codebook", "int8_dynamic", "int8_static", "cast", "autoround", "gptq", "awq"):
    METHODS.declare(_name, f"hf_compress.methods.{_name}")
METHODS.declare("qat", "hf_compress.training.qat")
for _name, _module in (
    ("compressed-tensors", "compressed_tensors"),
    ("bitsandbytes", "bitsandbytes"),
    ("torchao", "torchao"),
    ("gptq", "gptq"),
    ("gptq_v2", "gptq"),
    ("awq", "awq"),
    ("guarded", "guarded"),
    ("dense", "dense"),
):
    FORMATS.declare(_name, f"hf_compress.formats.{_module}")
