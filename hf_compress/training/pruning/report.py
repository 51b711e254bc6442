"""What pruning has achieved, counted in the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...modules.swap import PackedModule, packed_tensor
from .config import PruningConfig
from .targets import Target, find_targets, left_dense


@dataclass(frozen=True)
class PrunedWeight:
    """Zeros of one weight.

    Attributes:
        name: Its name without `.weight`.
        zeros: Values that are exactly zero.
        size: Number of values.
    """

    name: str
    zeros: int
    size: int

    @property
    def sparsity(self) -> float:
        """Zeros of all values, 0 to 1."""
        return self.zeros / self.size


@dataclass(frozen=True)
class PruningReport:
    """Zeros per weight, of the pruned scope, and of the whole model.

    Attributes:
        weights: The weights in scope; tied ones once.
        model_size: Values of all parameters of the model.
        left_dense: Weights that no rule keeps and that can't be pruned all the same, by name: why.
    """

    weights: tuple[PrunedWeight, ...]
    model_size: int
    left_dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def zeros(self) -> int:
        """Zeros in scope."""
        return sum(weight.zeros for weight in self.weights)

    @property
    def size(self) -> int:
        """Values in scope."""
        return sum(weight.size for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Zeros of the values in scope, 0 to 1."""
        return self.zeros / self.size

    @property
    def model_sparsity(self) -> float:
        """Zeros in scope of all values of the model, 0 to 1."""
        return self.zeros / self.model_size

    def __str__(self) -> str:
        head = (
            f"Pruned {self.sparsity:.2%} of the {self.size} values in scope, {self.model_sparsity:.2%} of the model's "
            f"{self.model_size}. Zeros alone make no model faster and no checkpoint smaller: readers and kernels "
            "treat them as any other value."
        )
        rows = [f"  {weight.name}  {weight.sparsity:.2%}" for weight in self.weights]
        return "\n".join([head, *rows, *(f"  {name}  dense: {why}" for name, why in self.left_dense.items())])


def achieved(model: nn.Module, config: PruningConfig) -> PruningReport:
    """Count the zeros that a model has in what a configuration prunes.

    Args:
        model: The model, float.
        config: The configuration.

    Raises:
        HFCompressError: The configuration does not fit the model, see `find_targets`.
    """
    return count_zeros(model, find_targets(model, config), model_size(model), left_dense(model, config))


def count_zeros(
    model: nn.Module, targets: Sequence[Target], size: int, left: Mapping[str, str] | None = None
) -> PruningReport:
    """Count the zeros of weights, float or packed since.

    Args:
        model: The model.
        targets: The weights.
        size: Values of all parameters of the model.
        left: Weights that can't be pruned, and why, for the report.
    """
    return PruningReport(tuple(_counted(target, _values(model, target)) for target in targets), size, dict(left or {}))


def model_size(model: nn.Module) -> int:
    """Values of all parameters, those of our own left out."""
    return sum(value.numel() for name, value in model.named_parameters() if ".hfc_" not in name)


def _counted(target: Target, values: Tensor) -> PrunedWeight:
    """Zeros of one weight."""
    return PrunedWeight(target.name, values.numel() - int(values.count_nonzero()), values.numel())


def _values(model: nn.Module, target: Target) -> Tensor:
    """A weight's values."""
    parameter = target.parameter(model)
    if parameter is not None:
        return parameter.detach()
    module = model.get_submodule(target.weight.module)
    if not isinstance(module, PackedModule):
        raise TypeError(f"{target.name} is no weight of {type(model).__name__}")
    return packed_tensor(module, target.weight.parameter).dense()
