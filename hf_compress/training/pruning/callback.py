"""Pruning inside the Trainer: masks that live in the weights, grown by schedule and upheld after every step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...core.errors import ConfigError, TrainerError
from ...modules.results import check_values
from ..callback import CompressionCallback, bare
from ..state import Section
from .config import PruningConfig
from .masks import lowest, lowest_with_floors
from .movement import Scores
from .report import PruningReport, count_zeros, model_size
from .resume import ambiguous, check_held, masks_of
from .schedule import Schedule
from .targets import Target, check_targets, find_targets, left_dense

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)


@runtime_checkable
class SwapsWeights(Protocol):
    """An optimizer that evaluates other weights than it trains, as schedule-free ones do."""

    def train(self) -> None:
        """Put the weights that are trained into the parameters."""

    def eval(self) -> None:
        """Put the weights that are evaluated and saved into the parameters."""


class PruningCallback(CompressionCallback):
    """Prunes a model while it is trained.

    Pruned weights are zeros in the parameters, whose names and objects stay as they are: what is evaluated, saved and
    fake-quantized is the pruned model, and every checkpoint is a plain one. Gradients of pruned weights are zeroed
    before they are clipped. Magnitude pruning keeps one mask in each parameter's type. Until its mask is fixed,
    movement pruning also keeps scores and two moments in float32, and the values of weights that are pruned for now.
    Resuming from a checkpoint equals the uninterrupted run.

    Hooks on the parameters zero gradients. They act in training steps only. Where training is broken off in a step,
    they stop as soon as gradients start anew; broken off in its first forward pass, one later backward pass is masked.

    The order of `PruningCallback` and `QATCallback` in the list of callbacks does not matter: the values that are
    rounded are masked ones, and zero is on every grid.

    Args:
        config: What to prune, and when; `PruningConfig()` prunes half by magnitude.
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.

    Attributes:
        report: What was achieved, once training has ended.

    Raises:
        ConfigError: `config` is no PruningConfig.
    """

    name = "pruning"

    def __init__(self, config: PruningConfig | None = None, resume_from: str | Path | None = None) -> None:
        super().__init__(resume_from)
        if config is not None and not isinstance(config, PruningConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}, no PruningConfig.",
                "PruningCallback(PruningConfig(sparsity=0.5)), for example",
            )
        self.config = PruningConfig() if config is None else config
        self.report: PruningReport | None = None
        self._targets: tuple[Target, ...] = ()
        self._left_dense: Mapping[str, str] = {}
        self._size = 0
        self._schedule = Schedule(self.config, 0)
        self._keep: dict[str, Tensor] = {}
        self._scores: Scores | None = None
        self._hooks: list[RemovableHandle] = []
        self._live = False  # whether the hooks act: from the begin of a step until its gradients are complete
        self._reached: set[str] = set()  # weights that have a gradient in this step

    def insert(self, model: nn.Module) -> None:
        """Find what is pruned; nothing changes yet.

        Raises:
            HFCompressError: See `find_targets` and `check_targets`.
        """
        targets = find_targets(model, self.config)
        check_targets(model, targets, self.config)
        self._release()
        self.report = None
        self._targets, self._size = targets, model_size(model)
        self._left_dense = left_dense(model, self.config)

    def settings(self) -> Mapping[str, Any]:
        """The configuration as JSON types."""
        return self.config.model_dump(mode="json")

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what can't work, and take up a checkpoint's state.

        Raises:
            TrainerError: Movement pruning with float16; an optimizer that evaluates other weights than it trains; or
                see the base.
        """
        if args.fp16 and self.config.method == "movement":
            raise TrainerError(
                "With fp16=True steps are skipped when its loss scale is too large, which movement scores can't know.",
                'bf16=True, or method="magnitude"',
            )
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        if isinstance(inner, SwapsWeights):
            raise TrainerError(
                f"{type(inner).__name__} evaluates and saves other weights than it trains, and would fill what is "
                "pruned.",
                'another optimizer, such as TrainingArguments(optim="adamw_torch")',
            )
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)

    def begin(self, model: nn.Module, state: TrainerState, section: Section | None) -> None:
        """Resolve the schedule, and prune for the first time or take up what a checkpoint holds.

        Raises:
            TrainerError: The model was packed or pruned at the end of an earlier training.
            ConfigError: The schedule is longer than the training, or ends before it starts.
            ResumeError: The checkpoint does not have the zeros that the schedule demands, or lacks scores.
        """
        parameters = self._parameters(model)
        schedule, step = Schedule(self.config, self.length), state.global_step
        if section is None and self.report is not None and schedule.end > 0:
            raise TrainerError(
                "This callback has pruned the model in an earlier training; pruning it from the start again would let "
                "it grow back first.",
                'to train on with the same zeros: another Trainer, whose PruningConfig has method="magnitude", '
                "start=0 and end=0",
            )
        if section is None and self._scores is not None:  # a training that was broken off
            for name, parameter in parameters.items():
                self._scores.give_back(name, parameter)
        self._release()
        check_targets(model, self._targets, self.config)
        self._schedule = schedule
        if self.config.method == "movement" and not self._schedule.is_fixed(step):
            self._scores = Scores(parameters, self.config)
        if section is None:
            if self._schedule.is_due(step):
                self._prune(model, step)
        else:
            self._take_up(parameters, step, section)

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Scores; and masks of weights that have more zeros than pruned values, which tell them apart."""
        scores = {} if self._scores is None else self._scores.tensors()
        return {**scores, **ambiguous(self._parameters(model), self._keep)}

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """See to the gradients from the first step on, when no other callback can refuse the training any more."""
        super().on_step_begin(args, state, control, model=model, **kwargs)
        self._live = True
        self._reached.clear()
        if model is None or self._hooks:
            return
        for name, parameter in self._parameters(bare(model)).items():
            if parameter.requires_grad:
                watch, mask = _hooks(weakref.ref(self), name, weakref.ref(parameter))
                self._hooks.append(parameter.register_hook(watch))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(mask))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Move the scores, once gradients are known to be finite."""
        self._live = False
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        if model is None or self._scores is None:
            return
        for name, parameter in self._parameters(bare(model)).items():
            if not self._scores.is_taken(name):  # no gradient in the last batch of the step, only in earlier ones
                self._scores.take(name, parameter, self._keep.get(name))
                self._mask_gradient(name, parameter)
        self._scores.step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Prune further where it is time, and zero what momentum and weight decay have revived."""
        super().on_optimizer_step(args, state, control, model=model, **kwargs)
        if model is None:
            return
        step = state.global_step + 1  # the Trainer counts this one later
        self._uphold(bare(model))
        if self._schedule.is_due(step):
            self._prune(bare(model), step)
        if self._schedule.is_fixed(step):
            self._scores = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `sparsity`, counted in the weights, to what is printed and to the entry of `log_history`.

        Reporters, which the Trainer calls before any callback, don't get it.
        """
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        if model is None or not self.is_prepared(bare(model)):
            return
        sparsity = round(count_zeros(bare(model), self._targets, self._size).sparsity, 6)
        if logs is not None:
            logs["sparsity"] = sparsity
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["sparsity"] = sparsity

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let go of the model, and report what was achieved."""
        super().on_train_end(args, state, control, model=model, **kwargs)
        if model is None:
            return
        self._release()
        self.report = count_zeros(bare(model), self._targets, self._size, self._left_dense)
        logger.info("%s", self.report)
        asked = sum(self._schedule.demanded(self._targets, None))
        if self.report.zeros < asked:
            best = (
                f"in the best checkpoint, {state.best_model_checkpoint}" if args.load_best_model_at_end else "in all"
            )
            logger.warning(
                "Training has ended with %d zeros %s, of %d asked for: the mask is final at step %d, training ended "
                "after %d. With load_best_model_at_end, TrainingArguments(eval_delay=%d) leaves earlier ones out.",
                *(self.report.zeros, best, asked, self._schedule.end, state.global_step, self._schedule.end),
            )

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is pruned, by name.

        Raises:
            TrainerError: A weight was packed since.
        """
        found = {target.name: target.parameter(model) for target in self._targets}
        given = {name: value for name, value in found.items() if value is not None}
        if len(given) < len(found):
            raise TrainerError(
                f"{min(set(found) - set(given))} was packed at the end of an earlier training, and can't be pruned.",
                "QATCallback(..., convert=False), and hf_compress.convert(model) after the last training",
            )
        return given

    @torch.no_grad()
    def _prune(self, model: nn.Module, step: int) -> None:
        """Choose what is pruned at a step, and prune it."""
        parameters = self._parameters(model)
        keep = self._chosen(parameters, self._schedule.demanded(self._targets, step))
        for name, parameter in parameters.items():
            if self._scores is None:
                parameter.mul_(keep[name])
            else:
                self._scores.exchange(name, parameter, keep[name])
            self._keep[name] = keep[name].to(parameter.dtype)

    def _chosen(self, parameters: Mapping[str, nn.Parameter], counts: list[int]) -> dict[str, Tensor]:
        """Boolean masks by name, False for as many values as are asked for.

        Raises:
            WeightValueError: A weight has become NaN or infinite.
        """
        if self.config.scope == "global":
            values = [self._compared(name, parameter) for name, parameter in parameters.items()]
            masks = lowest_with_floors(values, sum(counts), [target.floor for target in self._targets])
            return dict(zip(parameters, masks, strict=True))
        made = {}
        for target, count in zip(self._targets, counts, strict=True):
            value = self._compared(target.name, parameters[target.name])
            if self.config.group is None:
                made[target.name] = lowest([value], count)[0]
            else:
                size = self.config.group[1]
                made[target.name] = target.grouped(value, count * size // target.weight.count, size)
        return made

    def _compared(self, name: str, parameter: Tensor) -> Tensor:
        """What decides over a weight's values: magnitudes or scores.

        Raises:
            WeightValueError: Some are NaN or infinite.
        """
        value = parameter.detach().abs() if self._scores is None else self._scores.values[name].detach()
        check_values(name, value)
        return value

    def _take_up(self, parameters: Mapping[str, nn.Parameter], step: int, section: Section) -> None:
        """Masks from the zeros of a checkpoint, and its scores."""
        last = self._schedule.last_due(step)
        if last is not None:
            counts = self._schedule.demanded(self._targets, last)
            keep = masks_of(parameters, section.tensors, counts, step, total=self.config.scope == "global")
            self._keep = {name: mask.to(parameters[name].dtype) for name, mask in keep.items()}
        if self._scores is not None:
            self._scores.load(section.tensors)
            check_held(self._scores.held, self._keep, step)

    @torch.no_grad()
    def _uphold(self, model: nn.Module) -> None:
        """Zero pruned weights again."""
        for target in self._targets:
            keep, parameter = self._keep.get(target.name), target.parameter(model)
            if keep is not None and parameter is not None:
                parameter.mul_(keep)

    def _arriving(self, name: str, parameter: nn.Parameter) -> None:
        """Notice where a step was broken off, of which the Trainer tells nobody: its gradients are gone."""
        if name in self._reached and parameter.grad is None:
            self._live = False
        self._reached.add(name)

    def _accumulated(self, name: str, parameter: nn.Parameter) -> None:
        """See to the gradient of a weight, of one batch or a part of it."""
        if not self._live:
            return
        if self._scores is not None:
            if not GradientState().sync_gradients:  # scores need the gradient of the whole step, unmasked
                return
            self._scores.take(name, parameter, self._keep.get(name))
        self._mask_gradient(name, parameter)

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        """Zero the gradient of what is pruned."""
        keep = self._keep.get(name)
        if keep is not None and parameter.grad is not None:
            parameter.grad.mul_(keep)

    def _release(self) -> None:
        """Remove hooks, masks and scores."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._live = [], False
        self._keep, self._scores = {}, None


def _hooks(
    callback: weakref.ref[PruningCallback], name: str, weight: weakref.ref[nn.Parameter]
) -> tuple[Callable[[Tensor], None], Callable[[nn.Parameter], None]]:
    """What is called before and after a gradient of a weight is accumulated; nothing once the callback is gone."""

    def arriving(gradient: Tensor) -> None:
        alive, parameter = callback(), weight()
        if alive is not None and parameter is not None:
            alive._arriving(name, parameter)

    def accumulated(parameter: nn.Parameter) -> None:
        alive = callback()
        if alive is not None:
            alive._accumulated(name, parameter)

    return arriving, accumulated
