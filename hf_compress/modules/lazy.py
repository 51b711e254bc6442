"""A stand-in for a packed weight that costs nothing until its values are used.

Reading only `weight.dtype` or `weight.shape` must not dequantize (T5 does so in every forward). Looking up rows
of an embedding, or taking one expert of fused experts, dequantizes only these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..core.errors import PackedWeightError
from .packed import PackedTensor

_FORM = (
    *("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "is_quantized"),
    *("requires_grad", "grad_fn", "is_leaf", "itemsize", "nbytes"),
)
ABOUT_FORM: set[object] = {
    *(getattr(Tensor, name).__get__ for name in _FORM),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, torch.is_complex, Tensor.is_complex, Tensor.__len__),
}
"""What can be answered without values."""

_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
"""Operators that change their left side."""

_GET_DATA, _SET_DATA = (getattr(Tensor.data, name) for name in ("__get__", "__set__"))


class LazyWeight(Tensor):
    """A tensor without storage that dequantizes a packed weight when an operation needs its values."""

    packed: PackedTensor
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, packed: PackedTensor) -> LazyWeight:
        """Shape, data type and device of the dense weight; no memory."""
        made: LazyWeight = Tensor._make_wrapper_subclass(
            cls, packed.layout.parameter_shape, dtype=packed.scale.dtype, device=packed.codes.device
        )
        made.packed = packed
        made._is_hf_initialized = True  # transformers must not initialise what it can't write to
        return made

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer questions about the form directly, look up rows in packed form, dequantize for the rest."""
        options = dict(kwargs or {})
        if _targets(func, args, options):
            raise refusal("Assigning .data" if func is _SET_DATA else f"{getattr(func, '__name__', 'This')}")
        if func in (_GET_DATA, Tensor.detach):
            return args[0]
        if func in ABOUT_FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if func is torch.nn.functional.embedding and _looks_up_rows(args, options):
            return args[1].packed.rows(args[0])
        if func is Tensor.__getitem__ and isinstance(args[0], LazyWeight):
            part = _expert(args[0].packed, args[1])
            if part is not None:
                return part
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(dense, tuple(args)), **tree_map(dense, options))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same for calls that come from below Python's torch functions."""
        if func._schema.is_mutable and args and isinstance(args[0], LazyWeight):  # type: ignore[attr-defined]
            raise refusal(str(func))
        return func(*tree_map(dense, tuple(args)), **tree_map(dense, dict(kwargs or {})))


def refusal(what: str) -> PackedWeightError:
    """The error for writing to a packed weight: the write would go to a copy and be lost."""
    return PackedWeightError(
        f"{what} would change a packed weight, which is read-only.",
        "call model.dequantize() first, or keep an adapter separate instead of merging it",
    )


def _targets(func: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether a call would change a packed weight: in place, by assignment, or as `out`."""
    changed = [options.get("out")]
    if _writes(func):
        changed += [*args[:1], options.get("tensor"), options.get("input")]
    return any(isinstance(value, LazyWeight) for value in tree_leaves(changed))


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a torch function changes its first argument."""
    name = getattr(func, "__name__", "")
    if func is Tensor.requires_grad_:
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _OPERATORS or func in (Tensor.__setitem__, _SET_DATA)


def dense(value: Any) -> Any:
    """The dense tensor of a `LazyWeight`; anything else unchanged."""
    return value.packed.dense() if isinstance(value, LazyWeight) else value


def _looks_up_rows(args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether an embedding call can be answered from packed rows: one scale per row or group, no renormalising."""
    if len(args) < 2 or not isinstance(args[1], LazyWeight) or options.get("max_norm") is not None:
        return False
    layout = args[1].packed.layout
    renormalised = len(args) > 3 and args[3] is not None
    return (
        not renormalised and not layout.transposed and len(layout.shape) == 2 and layout.weights.strategy != "tensor"
    )


def _expert(packed: PackedTensor, index: object) -> Tensor | None:
    """One expert of fused experts, or None when the index is something else."""
    scalar = isinstance(index, Tensor) and index.ndim == 0 and index.dtype in (torch.int32, torch.int64)
    single = scalar or (isinstance(index, int) and not isinstance(index, bool))
    if len(packed.layout.shape) != 3 or not single or packed.layout.weights.strategy == "tensor":
        return None
    return packed.part(int(index)).dense()  # type: ignore[call-overload]
