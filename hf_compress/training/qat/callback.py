"""Quantization-aware training inside the Trainer: when fake quantization starts, what freezes, and the conversion."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...apply.planning import plan_model
from ...apply.swapping import announce
from ...checkpoint.handover import training_plan_of
from ...core.config import QuantConfig
from ...core.errors import ConfigError, TrainerError
from ...core.plan import Plan
from ..callback import CompressionCallback, bare
from ..schedule import step_of
from ..state import Section
from .config import QATConfig, QATFields
from .convert import convert as convert_model
from .convert import refuse_adapter, unseen_inputs
from .modules import commit_ranges, fake_modules, forget_scale_gradients, insert_fake_quant, set_phase
from .norms import freeze_norms, release_norms

logger = logging.getLogger(__name__)


class QATCallback(CompressionCallback):
    """Trains a model with fake-quantized weights, and inputs where they are asked for, and packs it at the end.

    Parameters stay the same objects under the same names, so optimizers, schedules, gradient accumulation, mixed
    precision, `torch_compile`, DDP and `load_best_model_at_end` work as without it. Checkpoints of the training are
    plain float models with some tensors `*.hfc_*` beside; resuming from one equals the uninterrupted run. At the end
    the model is converted: `trainer.evaluate()` then measures the packed model, `trainer.save_model()` writes it in
    the format that `hf_compress.quantize` would give. Evaluations before the step `start` see the float model.

    Args:
        config: What to quantize and when. None goes on with a model that
            `from_pretrained(..., quantization_config=QATConfig(...))` has prepared.
        convert: False leaves the model as it is at the end, to train on; `hf_compress.convert(model)` packs it later.
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.

    Raises:
        ConfigError: An argument has the wrong type.
    """

    name = "qat"

    def __init__(
        self, config: QATConfig | None = None, convert: bool = True, resume_from: str | Path | None = None
    ) -> None:
        super().__init__(resume_from)
        if config is not None and not isinstance(config, QATConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}, no QATConfig.", "QATCallback(QATConfig(bits=4)), for example"
            )
        if type(convert) is not bool:
            raise ConfigError(f"convert={convert!r} is not True or False.", "convert=True")
        self.config = config
        self.convert = convert
        self._moments = (0, 0)
        self._phase: tuple[bool, bool] | None = None

    def insert(self, model: nn.Module) -> None:
        """Plan the model, and let it compute with fake-quantized values; or go on with one that does.

        Raises:
            TrainerError: There is no configuration and the model is not prepared.
            ConfigError: The model is prepared with another configuration.
            UnsupportedModelError: The model has an adapter.
            HFCompressError: The plan is refused. The model is unchanged after any of these errors.
        """
        refuse_adapter(model)
        prepared = training_plan_of(model)
        if prepared is not None:
            self._adopt(model, prepared)
            return
        if self.config is None:
            raise TrainerError(
                f"QATCallback has no configuration, and {type(model).__name__} is not prepared.",
                "QATCallback(QATConfig(bits=4)), or load the model with quantization_config=QATConfig(bits=4)",
            )
        plan = plan_model(model, self.config)
        announce(plan)
        insert_fake_quant(model, plan, self.config.fields)

    def _adopt(self, model: nn.Module, plan: Plan) -> None:
        """Go on with a model that is prepared already."""
        found = QuantConfig.from_dict({"method": plan.method, **plan.request})
        if self.config is not None and found != self.config:
            raise ConfigError(
                f"{type(model).__name__} is prepared with {found!r}, and QATCallback has {self.config!r}.",
                "QATCallback(), which takes the model's own",
            )
        self.config = found

    def settings(self) -> Mapping[str, Any]:
        """The configuration's fields as JSON types."""
        return self._fields.model_dump(mode="json")

    @property
    def _fields(self) -> QATFields:
        """The configuration's fields, known once a model is prepared."""
        if self.config is None or not isinstance(self.config.fields, QATFields):
            raise TrainerError("QATCallback has not prepared a model.", "QATCallback(QATConfig(bits=4))")
        return self.config.fields

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what can't work, resolve the schedule, and warn of a best model that may be a float one."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if args.load_best_model_at_end and self._moments[0] > state.global_step:
            logger.warning(
                "Evaluations before step %d measure the float model, and load_best_model_at_end may choose one of "
                "them; start=0 compares like with like.",
                self._moments[0],
            )

    def begin(self, model: nn.Module, state: TrainerState, section: Section | None) -> None:
        """Resolve the schedule and enter its phase.

        Raises:
            TrainerError: The model was converted at the end of an earlier training.
            UnsupportedModelError: The model has got an adapter since it was prepared.
            ConfigError: `start` or `freeze` lies beyond the end, `start` behind `freeze`, or no step is left to see
                the ranges of static inputs.
        """
        plan = training_plan_of(model)
        if plan is None:
            raise TrainerError(
                f"{type(model).__name__} was converted at the end of an earlier training, and packed weights can't be "
                "trained.",
                "QATCallback(..., convert=False) in all calls of train() and hf_compress.convert(model) after the "
                "last; or a new Trainer with the float weights of a checkpoint",
            )
        refuse_adapter(model)
        start = step_of(self._fields.start, self.length, "start")
        freeze = step_of(self._fields.freeze, self.length, "freeze")
        if start > freeze:
            raise ConfigError(
                f"start={self._fields.start!r} is step {start}, behind freeze={self._fields.freeze!r}, step {freeze} "
                f"of {self.length}.",
                f"start={self._fields.freeze!r} or earlier",
            )
        if freeze <= state.global_step and unseen_inputs(model, plan):
            raise ConfigError(
                f"freeze={self._fields.freeze!r} is step {freeze}: no step is left to see the ranges of inputs.",
                'freeze=0.8, or activation_strategy="token", whose ranges are those of each token',
            )
        for _, module in fake_modules(model):  # what a step that was broken off has seen
            if module.hfc_seen is not None:
                module.hfc_seen.fill_(-math.inf)
        self._moments = (start, freeze)
        self._phase = None
        self._enter(model, state.global_step)

    def _enter(self, model: nn.Module, step: int) -> None:
        """The phase of a step: whether values are fake-quantized, and whether ranges still move."""
        start, freeze = self._moments
        phase = (step >= start, step < freeze)
        if phase == self._phase:
            return
        set_phase(model, quantize=phase[0], observe=phase[1])
        if phase[1]:
            release_norms(model)
        else:
            freeze_norms(model)
        self._phase = phase

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Enter the phase of this optimizer step; once for all its batches."""
        super().on_step_begin(args, state, control, model=model, **kwargs)
        if model is not None:
            self._enter(bare(model), state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep scales that are not in use yet out of the optimizer's step."""
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        if model is not None:
            forget_scale_gradients(bare(model))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Move the ranges of inputs by what this optimizer step has shown."""
        super().on_step_end(args, state, control, model=model, **kwargs)
        if model is not None:
            commit_ranges(bare(model))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Convert the model, the best one where it was loaded; or leave it in the phase of the step that it is of.

        Raises:
            CalibrationError, WeightValueError: It can't be converted; it and all checkpoints are as they were.
        """
        super().on_train_end(args, state, control, model=model, **kwargs)
        if model is None:
            return
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        step = state.global_step if best is None else best
        if step <= self._moments[0]:
            logger.warning(
                "%s step %d, fake quantization starts at %d: the weights never met their grid.",
                "Training ended after" if best is None else "The best model is of",
                step,
                self._moments[0],
            )
        self._enter(bare(model), max(step - 1, 0))  # a scale that the best model has not learned is not used
        release_norms(bare(model))
        if self.convert:
            convert_model(bare(model))
