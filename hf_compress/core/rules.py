"""Which weights: an ordered list of rules, the last one that matches decides.

A pattern is a glob, or a regular expression after `re:`, on names without `.weight`. A glob matches a weight
when it equals whole dotted parts of its name: `k_proj` and `self_attn` match `model.layers.0.self_attn.k_proj`,
`proj` does not. A regular expression matches from the start of the name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .config import QuantFields, Rule
from .errors import PatternError, RuleError, nearest
from .weights import Role, Weight


class AnyRule(Protocol):
    """One line of rules of any kind: `Rule` for quantization; others set other things."""

    @property
    def pattern(self) -> str:
        """Glob, or regular expression after `re:`."""

    @property
    def keep(self) -> bool | None:
        """Whether the matched weights stay as they are; None leaves that to other rules."""

    def settings(self) -> dict[str, Any]:
        """What else it changes."""


@dataclass(frozen=True)
class Decision:
    """What the rules say about one weight.

    Attributes:
        keep: Whether it stays as it is.
        reason: Why, in words; names the rule.
        settings: Scheme settings that differ from the configuration's.
        by_default: Whether it is kept by a default rule and not by the user.
    """

    keep: bool
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)
    by_default: bool = False


def resolve(fields: QuantFields, weights: Sequence[Weight]) -> dict[str, Decision]:
    """Apply default rules, `skip` and `rules`, in this order.

    Raises:
        PatternError: A pattern is invalid or matches nothing.
        RuleError: A rule says nothing, contradicts itself, or changes only weights that stay kept.
    """
    user = [*(Rule(pattern=pattern, keep=True) for pattern in fields.skip), *fields.rules]
    before = {weight.name: _default(fields, weight) for weight in weights}
    return decide(user, before, ("bits", "group_size", "symmetric"))


def decide(rules: Sequence[AnyRule], before: Mapping[str, Decision], names: Sequence[str]) -> dict[str, Decision]:
    """Apply rules of any kind, in their order.

    Args:
        rules: The user's rules.
        before: What happens to each weight without them.
        names: What such rules can set, for messages.

    Raises:
        PatternError: A pattern is invalid or matches nothing.
        RuleError: A rule says nothing, contradicts itself, or changes only weights that stay kept.
    """
    decisions = dict(before)
    for rule in rules:
        _check(rule, names)
        for name in _matched(rule.pattern, decisions):
            decisions[name] = _apply(rule, decisions[name])
    for rule in rules:
        _check_effect(rule, decisions)
    return decisions


def matcher(pattern: str) -> Callable[[str], bool]:
    """A predicate on weight names.

    Raises:
        PatternError: The regular expression is invalid.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise PatternError(
                f"The pattern {pattern!r} is not a regular expression: {error}.",
                "escape special characters, or write a glob without re:",
            ) from None
        return lambda name: expression.match(name) is not None
    glob = fnmatch.translate(pattern).removesuffix(r"\z").removesuffix(r"\Z")
    whole = re.compile(rf"(?:.*\.)?(?:{glob})(?:\..*)?\Z", re.DOTALL)
    return lambda name: whole.match(name) is not None


def _default(fields: QuantFields, weight: Weight) -> Decision:
    """What happens to a weight before any rule of the user."""
    if weight.role is Role.EMBEDDING and fields.embeddings == "int8":
        return Decision(keep=False, reason='embeddings="int8"')
    return by_role(weight) if fields.default_rules else Decision(keep=False, reason="in scope")


def by_role(weight: Weight) -> Decision:
    """The default rules: heads, routers, norms and embeddings are kept."""
    if weight.role is Role.NONE:
        return Decision(keep=False, reason="in scope")
    return Decision(keep=True, reason=f"default rule: {weight.role.value}", by_default=True)


def _matched(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that match, at least one."""
    matches = matcher(pattern)
    known = list(names)
    found = [name for name in known if matches(name)]
    if not found:
        parts = {part for name in known for part in (name, *name.split(".")) if not part.isdigit()}
        hint = nearest(pattern.removeprefix("re:").strip(".*$^"), sorted(parts))
        raise PatternError(
            f"The pattern {pattern!r} matches none of the model's {len(known)} weights. {hint} Nothing was changed.",
            "print hf_compress.plan(model, config) to see all names",
        )
    return found


def _check(rule: AnyRule, names: Sequence[str]) -> None:
    """Refuse rules that say nothing or contradict themselves."""
    if rule.keep is None and not rule.settings():
        raise RuleError(
            f"The rule for {rule.pattern!r} changes nothing.",
            f"give it {', '.join(('keep', *names[:-1]))} or {names[-1]}",
        )
    if rule.keep and rule.settings():
        raise RuleError(
            f"The rule for {rule.pattern!r} keeps weights and also sets {', '.join(rule.settings())}.",
            "drop keep=True or the settings",
        )


def _apply(rule: AnyRule, before: Decision) -> Decision:
    """The decision after one more rule."""
    if rule.keep:
        return Decision(keep=True, reason=f"rule {rule.pattern!r}")
    settings = {**before.settings, **rule.settings()}
    if rule.keep is False:
        return Decision(keep=False, reason=f"rule {rule.pattern!r}", settings=settings)
    return Decision(before.keep, before.reason, settings, before.by_default)


def _check_effect(rule: AnyRule, decisions: dict[str, Decision]) -> None:
    """Refuse settings that reach only weights that stay kept: they would be silently ignored."""
    if not rule.settings():
        return
    reached = [decisions[name] for name in _matched(rule.pattern, decisions)]
    if all(decision.keep for decision in reached):
        raise RuleError(
            f"The rule for {rule.pattern!r} sets {', '.join(rule.settings())}, but every weight it matches is kept "
            f"({reached[0].reason}).",
            "add keep=False to the rule to compress them after all",
        )
