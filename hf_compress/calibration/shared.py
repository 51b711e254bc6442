"""Which parameters of a block other parts of the model own too, so that it must not change them for itself alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.plan import PlanRow


class Sharing:
    """The parameters and buffers of a model that are one tensor, or one memory, under several names.

    Found when made, so while the model is as it was built.

    Args:
        model: The model, live or on meta.
        rows: Rows of its plan, whose ties count even where the model's tensors are not the same yet.
    """

    def __init__(self, model: nn.Module, rows: Sequence[PlanRow] = ()) -> None:
        tensors = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        keys = {row.name: row.key for row in rows}
        tied = [{row.key, keys[row.tied_to]} for row in rows if row.tied_to in keys]
        self._families = [names for names in (*_same_objects(tensors), *tied) if len(names) > 1]
        self._overlaps = _overlapping(tensors)
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self._module_of = {path: number for number, paths in self._paths.items() for path in paths}

    def of_block(self, path: str) -> frozenset[str]:
        """Names below a path of what modules outside of the block there own too.

        Different tensors in one memory count inside of the block as well: its copies have that memory once for each.
        """
        inside = self._prefixes([path])
        mixed = [names for names in self._families if not all(name.startswith(inside) for name in names)]
        return frozenset(name for names in (*mixed, *self._overlaps) for name in names if name.startswith(f"{path}."))

    def outside(self, blocks: Iterable[str]) -> frozenset[str]:
        """Names outside of some blocks of what modules inside of them own too.

        Args:
            blocks: Their paths.
        """
        inside = self._prefixes(blocks)
        shared = (*self._families, *self._overlaps)
        mixed = (names for names in shared if any(name.startswith(inside) for name in names))
        return frozenset(name for names in mixed for name in names if not name.startswith(inside))

    def _prefixes(self, paths: Iterable[str]) -> tuple[str, ...]:
        """What names in some modules start with, under all names that the modules have."""
        return tuple(f"{name}." for path in paths for name in self._paths[self._module_of[path]])


def _same_objects(tensors: Mapping[str, Tensor]) -> list[set[str]]:
    """Names by the tensor object that they stand for."""
    families: dict[int, set[str]] = {}
    for name, value in tensors.items():
        families.setdefault(id(value), set()).add(name)
    return list(families.values())


def _overlapping(tensors: Mapping[str, Tensor]) -> list[set[str]]:
    """Names of different tensor objects whose bytes overlap, such as two parameters with the same `data`.

    Compared are the ranges from first to last byte, so that neighbours in one storage are not taken for one, but
    interleaved ones are. Tensors on meta have no bytes.
    """
    spans = []
    for names in _same_objects(tensors):
        value = tensors[min(names)]
        if value.layout is torch.strided and not value.is_meta and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            spans.append((str(value.device), start, start + (last + 1) * value.element_size(), names))
    families: list[list[set[str]]] = []
    before, end = "", 0
    for device, start, stop, names in sorted(spans, key=lambda span: span[:3]):
        if device != before or start >= end:
            families.append([])
            before, end = device, stop
        families[-1].append(names)
        end = max(end, stop)
    return [set().union(*objects) for objects in families if len(objects) > 1]
