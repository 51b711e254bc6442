"""Which parameters of a block other parts of the model own too, so that it must not change them for itself alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..core.plan import PlanRow


class Sharing:
    """The parameters and buffers of a model that are one tensor under several names.

    Found when made, by identity, so while the model is as it was built.

    Args:
        model: The model, live or on meta.
        rows: Rows of its plan, whose ties count even where the model's tensors are not the same yet.
    """

    def __init__(self, model: nn.Module, rows: Sequence[PlanRow] = ()) -> None:
        families: dict[int, set[str]] = {}
        tensors = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        for name, value in tensors.items():
            families.setdefault(id(value), set()).add(name)
        keys = {row.name: row.key for row in rows}
        tied = [{row.key, keys[row.tied_to]} for row in rows if row.tied_to in keys]
        self._families = [names for names in (*families.values(), *tied) if len(names) > 1]
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self._module_of = {path: number for number, paths in self._paths.items() for path in paths}

    def of_block(self, path: str) -> frozenset[str]:
        """Names below a path of what modules outside of the block there own too."""
        inside = self._prefixes([path])
        mixed = (names for names in self._families if not all(name.startswith(inside) for name in names))
        return frozenset(name for names in mixed for name in names if name.startswith(f"{path}."))

    def outside(self, blocks: Iterable[str]) -> frozenset[str]:
        """Names outside of some blocks of what modules inside of them own too.

        Args:
            blocks: Their paths.
        """
        inside = self._prefixes(blocks)
        mixed = (names for names in self._families if any(name.startswith(inside) for name in names))
        return frozenset(name for names in mixed for name in names if not name.startswith(inside))

    def _prefixes(self, paths: Iterable[str]) -> tuple[str, ...]:
        """What names in some modules start with, under all names that the modules have."""
        return tuple(f"{name}." for path in paths for name in self._paths[self._module_of[path]])
