"""Which weights are pruned, how far, and along which of their dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...apply.planning import adapter_in
from ...core.errors import (
    ConfigError,
    GroupSizeError,
    NothingToQuantizeError,
    RuleError,
    TiedWeightsError,
    UnsupportedModelError,
    listed,
)
from ...core.rules import Decision, by_role, decide, matcher
from ...core.weights import Weight, WeightKind, list_weights
from ...modules.results import check_values
from .config import PruningConfig, PruningRule
from .masks import count_of, floor_of, grouped


@dataclass(frozen=True)
class Target:
    """A weight that is pruned.

    Attributes:
        weight: The weight; of tied ones the first.
        sparsity: Fraction of its values that is pruned at the end, 0 to below 1.
    """

    weight: Weight
    sparsity: float

    @property
    def name(self) -> str:
        """Its name without `.weight`."""
        return self.weight.name

    def parameter(self, model: nn.Module) -> nn.Parameter | None:
        """The parameter, or None where it is packed by now."""
        return model.get_submodule(self.weight.module)._parameters.get(self.weight.parameter)

    @property
    def inputs(self) -> int:
        """Inputs that an N:M pattern goes along."""
        return self.weight.kernel[0] if self.weight.kernel else self.weight.shape[-1]

    @property
    def floor(self) -> int:
        """How many of its values it keeps at least where weights compete."""
        return floor_of(self.weight.shape)

    def grouped(self, values: Tensor, pruned: int, size: int) -> Tensor:
        """The mask that prunes the smallest values of each group of inputs.

        Args:
            values: Magnitudes or scores, of the parameter's own shape.
            pruned: How many of each group are pruned.
            size: Inputs in a group.

        Returns:
            A boolean tensor of the same shape.
        """
        if self.weight.kernel:
            return grouped(values.movedim(1, -1), pruned, size).movedim(-1, 1)
        if self.weight.transposed:
            return grouped(values.transpose(-1, -2), pruned, size).transpose(-1, -2)
        return grouped(values, pruned, size)


def find_targets(model: nn.Module, config: PruningConfig) -> tuple[Target, ...]:
    """What a configuration prunes of a model; reads no values.

    Args:
        model: The model.
        config: The configuration.

    Raises:
        UnsupportedModelError: It has adapters.
        PatternError, RuleError: A pattern matches nothing, or a rule says nothing or has no effect.
        NothingToQuantizeError: No weight is in scope.
        GroupSizeError: The pattern does not divide the inputs of a weight.
        TiedWeightsError: Only one side of a tie is in scope, or both with another sparsity.
        ConfigError: Less than what each weight keeps at least would be left.
    """
    path = adapter_in(model)
    if path is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter at {path}. The weights below it are frozen, and merging the "
            "adapter would fill what is pruned.",
            "prune while training all weights, and add adapters to the pruned model afterwards",
        )
    weights, decisions = _decided(model, config)
    found = [weight for weight in weights if not decisions[weight.name].keep and not _unfit(weight)]
    _check_rules(weights, config)
    _check_ties(weights, found, decisions)
    targets = tuple(
        Target(weight, decisions[weight.name].settings.get("sparsity", config.sparsity))
        for weight in found
        if weight.tied_to is None
    )
    if not targets:
        kept = listed((f"{weight.name} ({_why_dense(weight, decisions[weight.name])})" for weight in weights), 3)
        raise NothingToQuantizeError(
            f"Nothing to prune: none of the {len(weights)} weights of {type(model).__name__} is in scope. "
            f"Kept: {kept or 'the model has no weights'}.",
            "relax skip and rules",
        )
    _check_pattern(targets, config)
    _check_floors(targets, config)
    return targets


def left_dense(model: nn.Module, config: PruningConfig) -> dict[str, str]:
    """Weights that no rule keeps and that can't be pruned all the same.

    Args:
        model: The model.
        config: The configuration.

    Returns:
        Why, by the weights' names.

    Raises:
        PatternError, RuleError: A pattern matches nothing, or a rule says nothing or has no effect.
    """
    weights, decisions = _decided(model, config)
    return {weight.name: _unfit(weight) for weight in weights if not decisions[weight.name].keep and _unfit(weight)}


def check_targets(model: nn.Module, targets: Sequence[Target], config: PruningConfig) -> None:
    """Refuse weights whose values can't be compared, or whose scores can't be learned.

    Raises:
        WeightValueError: A weight holds NaN or infinite values.
        ConfigError: A weight is frozen, and the method needs its gradients.
    """
    for target in targets:
        parameter = target.parameter(model)
        if parameter is None:
            continue
        check_values(target.name, parameter.detach())
        if config.method == "movement" and not parameter.requires_grad:
            raise ConfigError(
                f"{target.name} is frozen, and movement pruning needs its gradients.",
                f'method="magnitude", or skip=["{target.name}"]',
            )


def _default(weight: Weight, config: PruningConfig) -> Decision:
    """What happens to a weight before any rule of the user."""
    return by_role(weight) if config.default_rules else Decision(keep=False, reason="in scope")


def _decided(model: nn.Module, config: PruningConfig) -> tuple[list[Weight], dict[str, Decision]]:
    """The weights of a model, and what the rules say about each."""
    weights = [weight for weight in list_weights(model) if not weight.parameter.startswith("hfc_")]
    rules = [*(PruningRule(pattern=pattern, keep=True) for pattern in config.skip), *config.rules]
    return weights, decide(rules, {weight.name: _default(weight, config) for weight in weights}, ("sparsity",))


def _unfit(weight: Weight) -> str:
    """Why a parameter can't be pruned, or empty: it is the matrix of a layer, of a floating type, with values."""
    if weight.kind is WeightKind.OTHER:
        return f"a parameter of {weight.owner}, which is no layer that can be pruned"
    if not weight.dtype.is_floating_point:
        return f"of {weight.dtype}, no floating type"
    return "" if weight.count > 0 else "empty"


def _why_dense(weight: Weight, decision: Decision) -> str:
    """Why a weight is not pruned."""
    return decision.reason if decision.keep else _unfit(weight)


def _check_rules(weights: Sequence[Weight], config: PruningConfig) -> None:
    """Refuse rules that are to prune what can't be pruned.

    Raises:
        RuleError: None of the weights that a rule matches can be.
    """
    for rule in config.rules:
        matches = matcher(rule.pattern)
        reached = [weight for weight in weights if matches(weight.name)]
        if not rule.keep and all(_unfit(weight) for weight in reached):
            raise RuleError(
                f"The rule for {rule.pattern!r} has no effect: {reached[0].name} is {_unfit(reached[0])}.",
                "drop the rule",
            )


def _check_ties(weights: Sequence[Weight], found: Sequence[Weight], decisions: dict[str, Decision]) -> None:
    """Tied weights are pruned together or not at all.

    Raises:
        TiedWeightsError: One is kept, or another sparsity is asked for.
    """
    names = {weight.name for weight in found}
    for weight in weights:
        source = weight.tied_to
        if source is None:
            continue
        own, other = decisions[weight.name], decisions[source]
        if (weight.name in names) != (source in names) or (weight.name in names and own.settings != other.settings):
            raise TiedWeightsError(
                f"{weight.name} ({own.reason}, {own.settings or 'no settings'}) shares its values with {source} "
                f"({other.reason}, {other.settings or 'no settings'}): they can only be pruned together.",
                f'keep both: skip=["{source}", "{weight.name}"]; or give both the same rule with keep=False',
            )


def _check_pattern(targets: Sequence[Target], config: PruningConfig) -> None:
    """Every group of the pattern must be whole.

    Raises:
        GroupSizeError: Its size does not divide the inputs of a weight.
    """
    size = config.group[1] if config.group is not None else 1
    bad = [target for target in targets if target.inputs % size]
    if bad:
        names = [target.name for target in bad]
        skip = ", ".join(f'"{name}"' for name in names[:3]) + (", ..." if len(names) > 3 else "")
        raise GroupSizeError(
            f"pattern={config.pattern!r}: {size} does not divide the {bad[0].inputs} inputs of {names[0]} "
            f"({len(names)} weights: {listed(names)}). Nothing was changed.",
            f"skip=[{skip}], or leave pattern out",
        )


def _check_floors(targets: Sequence[Target], config: PruningConfig) -> None:
    """What each weight keeps at least must leave room for the sparsity asked for.

    Raises:
        ConfigError: It does not.
    """
    size = sum(target.weight.count for target in targets)
    least = sum(target.floor for target in targets)
    if config.scope == "global" and count_of(config.sparsity, size) > size - least:
        most = int(1000 * (1 - least / size)) / 1000
        raise ConfigError(
            f"sparsity={config.sparsity} with scope='global' would leave less than the 0.5 % of its values, and as "
            "many as it has rows, that each weight keeps.",
            f"sparsity={most}, or scope='local'",
        )
