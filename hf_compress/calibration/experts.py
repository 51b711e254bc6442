"""What each of several fused experts reads: the routed tokens, and what the gated half makes of them.

Works on the modules that transformers' `use_experts_implementation` decorates, which are called as
`experts(hidden_states, top_k_index, top_k_weights)` and say themselves whether they gate, have biases, or keep their
weights transposed. The inputs of the second projection are recomputed from the first as it is at that time, which for
one whose columns were scaled takes the tokens divided by these scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import CalibrationError
from ..core.plan import PlanRow
from ..core.weights import WeightKind
from .block import Block, Call
from .gram import CHUNK, Inputs
from .held import Held

SECOND = "down_proj"
"""The projection that reads what the other one made."""

SHARE_OF_COLUMNS = 4
"""An expert has too few tokens when they are less than its inputs divided by this: most of its Gram matrix would then
be damping."""

logger = logging.getLogger(__name__)


class ExpertPolicy(StrEnum):
    """What to do for experts that too few tokens reach.

    Attributes:
        ERROR: Raise.
        ROUND: Round them to nearest.
        SHARE: Take all tokens, as if each were routed to the expert.
    """

    ERROR = "error"
    ROUND = "round"
    SHARE = "share"


@dataclass
class ExpertInputs:
    """The tokens that reach one experts module, and where each is routed to.

    Attributes:
        module: The experts.
        hidden: Tokens × features of each call, padding included.
        routed: int64 expert numbers of each call, tokens × experts per token; -1 for padding.
        scales: What the columns of the first projection were multiplied by since the tokens were gathered, float32;
            None for nothing. Who scales it says so here.
    """

    module: nn.Module
    hidden: list[Held] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    scales: Tensor | None = None

    def add(self, call: Call, hidden: Held, index: Tensor) -> None:
        """Take one call of the module in.

        Args:
            call: The call of the block, which knows what is padding.
            hidden: What the module reads, … × features.
            index: Expert numbers, … × experts per token.
        """
        flat = Held(hidden.value.reshape(-1, hidden.value.shape[-1]), hidden.scale, hidden.dtype)
        routed = index.reshape(len(flat.value), -1).clone()
        positions = torch.arange(len(routed)).view(*hidden.value.shape[:-1], 1)
        padding = torch.ones(len(routed), dtype=torch.bool)
        padding[call.tokens(positions).reshape(-1)] = False
        routed[padding] = -1
        self.hidden.append(flat)
        self.routed.append(routed)

    def tokens(self, expert: int) -> int:
        """Number of tokens routed to an expert."""
        return sum(int((routed == expert).any(-1).sum()) for routed in self.routed)

    def short(self, row: PlanRow, policy: ExpertPolicy) -> set[int]:
        """Numbers of the experts that too few tokens reach. Where there are some, the log says so.

        Args:
            row: A weight of the experts.
            policy: What is done for them.

        Raises:
            CalibrationError: There are some, and the policy is to raise.
        """
        few = max(1, row.shape[-1] // SHARE_OF_COLUMNS)
        counts = [self.tokens(expert) for expert in range(row.shape[0])]
        poor = [expert for expert, count in enumerate(counts) if count < few]
        if poor:
            what = (
                f"{len(poor)} of {len(counts)} experts of {row.name} are reached by fewer than {few} tokens "
                f"(expert {poor[0]} by {counts[poor[0]]})"
            )
            if policy is ExpertPolicy.ERROR:
                raise CalibrationError(f"{what}.", 'give more calibration data, or experts="share" or "round"')
            logger.warning('%s; experts="%s" decides for them.', what, policy)
        return set(poor)

    def each(self, row: PlanRow, policy: ExpertPolicy) -> Iterator[Inputs | None]:
        """Statistics of each expert's input in turn, or None where it is to be rounded to nearest.

        The policy is applied at once, statistics are gathered as they are asked for.

        Args:
            row: A weight of the experts.
            policy: What to do for experts that too few tokens reach.

        Raises:
            CalibrationError: Too few tokens reach one, and the policy is to raise; or its inputs are not finite.
        """
        poor = self.short(row, policy)
        rounded = poor if policy is ExpertPolicy.ROUND else set()
        return (
            None if expert in rounded else self._finished(row, expert, everything=expert in poor)
            for expert in range(row.shape[0])
        )

    def _finished(self, row: PlanRow, expert: int, everything: bool) -> Inputs:
        """Complete statistics of one expert's input."""
        made = self.inputs(expert, row.parameter, row.shape[-1], everything)
        made.finish(f"{row.name}, expert {expert}")
        return made

    def inputs(self, expert: int, parameter: str, columns: int, everything: bool = False) -> Inputs:
        """Statistics of one expert's input.

        Args:
            expert: Its number.
            parameter: `gate_up_proj`, `up_proj` or `down_proj`.
            columns: Inputs of that projection.
            everything: Whether to take all tokens, not only the routed ones.
        """
        made = Inputs.empty(columns)
        for held, routed in zip(self.hidden, self.routed, strict=True):
            chosen = ((routed >= 0) if everything else (routed == expert)).any(-1).nonzero().squeeze(-1)
            for rows in chosen.split(CHUNK):
                value = held.restore(rows)
                if parameter == SECOND:
                    read = value if self.scales is None else (value / self.scales).to(value.dtype)
                    value = intermediate(self.module, expert, read)
                made.add(value)
        return made


def intermediate(module: nn.Module, expert: int, tokens: Tensor) -> Tensor:
    """What an expert's second projection reads: the first one's output, gated or activated.

    Args:
        module: The experts.
        expert: Number of the expert.
        tokens: Tokens × features.
    """
    parts: Any = module
    name = "gate_up_proj" if parts.has_gate else "up_proj"
    weight = module.get_parameter(name)[expert]
    bias = module.get_parameter(f"{name}_bias")[expert] if parts.has_bias else None
    made = functional.linear(tokens, weight.T if parts.is_transposed else weight, bias)
    result: Tensor = parts._apply_gate(made) if parts.has_gate else parts.act_fn(made)
    return result


def routing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hidden states and expert numbers among the arguments of an experts module."""
    given = (*args, *(kwargs[name] for name in ("hidden_states", "top_k_index") if name in kwargs))
    return given[0], given[1]


@torch.no_grad()
def collect_experts(block: Block, rows: Iterable[PlanRow]) -> dict[str, ExpertInputs]:
    """Run all calls of a block and keep what its experts read, by the path of the experts module."""
    paths = {row.module: row for row in rows if row.kind is WeightKind.EXPERTS}
    made = {path: ExpertInputs(block.owner(row)) for path, row in paths.items()}
    if not made:
        return made
    current: list[Call] = []

    def hook(inputs: ExpertInputs) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index = routing_of(args, kwargs)
            inputs.add(current[-1], Held.of(hidden), index)

        return read

    handles = [one.module.register_forward_pre_hook(hook(one), with_kwargs=True) for one in made.values()]
    try:
        for call in block.calls:
            current.append(call)
            call.run(block.module)
    finally:
        for handle in handles:
            handle.remove()
    return made
