"""Which modules transformers keeps out of a library's hands, and why.

The user's list *replaces* transformers' defaults (the output embeddings, tied weights, the last parameter), and names
that match nothing are accepted silently there. Here the second is an error, and the first is said in the plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...core.errors import ConfigError, PatternError, listed, nearest
from ...core.plan import PlanRow
from ...core.weights import Role, Weight, list_weights
from .protocol import Backend


@dataclass(frozen=True)
class Skips:
    """The lists that decide.

    Attributes:
        backend: The library.
        given: The user's list, or None.
        default: What transformers keeps where the user gives no list.
        float32: Modules that the architecture wants in float32.
        names: What entries of a list are compared with.
        asked: Whether the user asks for the output embeddings to be quantized.
    """

    backend: Backend
    given: tuple[str, ...] | None
    default: tuple[str, ...]
    float32: tuple[str, ...]
    names: tuple[str, ...]
    asked: bool

    def matches(self, pattern: str) -> bool:
        """Whether an entry of a list has any effect."""
        return any(not should_convert_module(name, [pattern]) for name in self.names)

    def reason(self, weight: Weight) -> str:
        """Why a weight that the library could handle stays."""
        name = self.backend.matched_name(weight)
        for pattern in self.given or ():
            if not should_convert_module(name, [pattern]):
                return f"{self.backend.skip_field}: {pattern!r}"
        if not should_convert_module(name, list(self.float32)):
            return "transformers keeps it in float32 for this architecture"
        return "kept by transformers' defaults"

    def keeping(self, names: Sequence[str]) -> str:
        """The argument that keeps more modules than now."""
        known = {*(self.given or ()), *(name for name in self.default if self.matches(name))}
        return f"{self.backend.skip_field}={sorted({*known, *names})!r}"

    def keeping_tied(self, names: Sequence[str]) -> str:
        """The arguments that keep tied modules: no list does where embeddings are asked for."""
        if not self.asked:
            return self.keeping(names)
        listed_too = "" if self.given is None else f", {self.keeping(names)}"
        return f"include_input_output_embeddings=False{listed_too}"


def skips_of(model: PreTrainedModel, config: QuantizationConfigMixin, backend: Backend) -> Skips:
    """The skip lists of a request.

    Raises:
        ConfigError: The user's list is a text.
        PatternError: A name in the user's list matches no module, or is no regular expression.
    """
    given = vars(config).get(backend.skip_field)
    if isinstance(given, str):
        raise ConfigError(
            f"{backend.skip_field}={given!r} must be a list of names.", f"{backend.skip_field}=[{given!r}]"
        )
    weights = [backend.matched_name(weight) for weight in list_weights(model)]
    modules = [name for name, _ in model.named_modules() if name]
    skips = Skips(
        backend=backend,
        given=None if given is None else tuple(map(str, given)),
        default=tuple(sorted(get_keys_to_not_convert(model))),
        float32=tuple(sorted(model._keep_in_fp32_modules or ())),
        names=tuple(modules if backend.matched_name_is_module else weights),
        asked=bool(vars(config).get("include_input_output_embeddings")),
    )
    for pattern in skips.given or ():
        _check_pattern(pattern, modules, skips)
    return skips


def _check_pattern(pattern: str, modules: Sequence[str], skips: Skips) -> None:
    """A name that matches nothing would be ignored silently."""
    field = skips.backend.skip_field
    try:
        if skips.matches(pattern):
            return
    except re.error as error:
        raise PatternError(
            f"{pattern!r} in {field} is not a regular expression: {error}.", "escape special characters"
        ) from None
    parts = {part for name in modules for part in (name, *name.split(".")) if not part.isdigit()}
    if pattern in parts:
        raise PatternError(
            f"{pattern!r} in {field} matches nothing: transformers compares it with whole parameter names for "
            f"{skips.backend.library}, from their start.",
            f"{field}={[f'.*{pattern}']!r}",
        )
    hint = nearest(pattern.removeprefix("re:").strip(".*$^"), sorted(parts))
    raise PatternError(
        f"{pattern!r} in {field} matches none of the model's {len(modules)} modules. {hint} Nothing was "
        "changed.".replace("  ", " "),
        "print the names with model.named_modules(); list entries are regular expressions without re:",
    )


def notes(weights: Sequence[Weight], rows: Sequence[PlanRow], skips: Skips) -> tuple[str, ...]:
    """That heads are quantized, which nobody expects."""
    heads = [row.module for weight, row in zip(weights, rows, strict=True) if row.backend and weight.role is Role.HEAD]
    if not heads or skips.asked:
        return ()
    why = (
        f"transformers' defaults keep only {listed(skips.default)}"
        if skips.given is None
        else f"{skips.backend.skip_field} replaces transformers' defaults ({listed(skips.default)})"
    )
    return (f"the head {listed(heads)} is quantized too: {why}; {skips.keeping(heads)} keeps it",)
