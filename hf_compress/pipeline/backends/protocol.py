"""What planning asks of a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedModel

from ...checkpoint.foreign import Foreign
from ...core.plan import PlanRow
from ...core.weights import Weight

if TYPE_CHECKING:
    from .skipping import Skips


class Backend(Protocol):
    """One library behind transformers' quantizers.

    Attributes:
        library: Its package, which is also the method and the format in plans.
        skip_field: The configuration's list of modules to leave out.
        matched_name_is_module: Whether that list is compared with the names of modules, and not of parameters.
    """

    library: str
    skip_field: str
    matched_name_is_module: bool

    def check(self, config: Any) -> None:
        """Refuse a configuration that asks for nothing."""

    def matched_name(self, weight: Weight) -> str:
        """The name of a weight that the library compares with the skip list."""

    def unhandled(self, weight: Weight) -> str | None:
        """Why the library never quantizes such a weight, or None where only a skip list keeps it."""

    def made(self, weight: Weight, model: PreTrainedModel, quantizer: Any) -> Foreign | str:
        """What it makes of a weight on meta, or why it leaves it."""

    def check_machine(self, rows: Sequence[PlanRow], model: PreTrainedModel, skips: Skips) -> None:
        """Refuse what would fail later on this machine."""

    def instead(self, rows: Sequence[PlanRow]) -> str:
        """What handles the weights that it leaves."""

    def notes(self, rows: Sequence[PlanRow]) -> tuple[str, ...]:
        """Remarks for the plan."""
