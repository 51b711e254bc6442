"""Fake quantization in a model, by class swap.

A module keeps its class as a base, its parameters stay the same objects under the same names. While its own forward
runs, reading a parameter that is to be quantized gives the fake-quantized values, at any other time the parameter: so
the original forward of any kind of layer serves, and optimizers, checkpoints and other callbacks see plain parameters.
All that a module gets beside them is named `hfc_*`:

- `hfc_input_low`, `hfc_input_high`: of an input with one fixed range, what it is so far; NaN until something was seen.
- `hfc_scale`, `hfc_scale_bias`, `hfc_zero_point`: of a weight whose scale is learned, the scale at the start, the
  logarithm of what it is multiplied with, which is a parameter, and the zero points where there are any. Of a
  parameter that isn't called `weight` they have its name in them, such as `hfc_gate_up_proj_scale`. Optimizers of
  transformers don't decay parameters with `bias` in their names.

Ranges move once per optimizer step (`commit_ranges`), however many batches it has and however often gradient
checkpointing runs a layer; until then they are those of the step before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, distributed, nn

from ...calibration.observers import MOMENTUM
from ...checkpoint.handover import TRAINING_PLAN, training_plan_of
from ...core.config import QuantFields
from ...core.errors import CalibrationError, ConfigError, UnsupportedModelError
from ...core.plan import Plan, PlanRow
from ...core.registry import Quantized
from ...core.weights import WeightKind
from ...methods.rtn.method import quantize, stored_scale, uniform_grid
from ...modules.packed import Layout, layout_of
from ...modules.results import canonical, check_values
from ...modules.swap import FlatWeights, first_parameter, original_class
from .config import QATFields
from .fake import beside, codes_of, fake_input, fake_learned, fake_weight, weight_grid
from .reads import READS, Reads, unwatch, watch, watched

LOW, HIGH = "hfc_input_low", "hfc_input_high"
"""Buffers with the range of an input, float32 (1)."""


@dataclass(frozen=True)
class Phase:
    """What a module does now.

    Attributes:
        quantize: Whether it computes with fake-quantized values.
        observe: Whether it looks at the range of its input while it is trained.
    """

    quantize: bool = True
    observe: bool = True


class FakeQuantized(nn.Module):
    """Base of all swapped classes.

    Attributes:
        hfc_layouts: Shape, scheme and orientation of each parameter that is to be quantized, by attribute name.
        hfc_learned: Those of them whose scale is learned.
        hfc_phase: What the module does now.
        hfc_values: The values to compute with while the module's own forward runs, else None.
        hfc_reads: Where reads by other modules are noted, while the model's forward is watched, else None.
        hfc_seen: Of an input with one fixed range, the largest -value and value of this step, float32 (2), -inf where
            there was none; else None. No buffer, so that DDP doesn't replace it by that of the first process.
        hfc_input: Name of the first parameter of the original forward.
        hfc_looks_up: Whether the original forward looks up rows of `weight` and does nothing else.
    """

    hfc_layouts: dict[str, Layout]
    hfc_learned: frozenset[str]
    hfc_phase: Phase
    hfc_values: dict[str, Tensor] | None
    hfc_reads: Reads | None
    hfc_seen: Tensor | None
    hfc_input: str
    hfc_looks_up: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward on fake-quantized weights and, if planned, inputs."""
        args, kwargs = self._with_input(args, kwargs)
        rounds = self.hfc_phase.quantize
        values = fake_parameter if rounds and not self.hfc_looks_up else _float_parameter
        self.hfc_values = {name: values(self, name) for name in self.hfc_layouts}
        try:
            made = super().forward(*args, **kwargs)
        finally:
            self.hfc_values = None
        if rounds and self.hfc_looks_up:  # each row has a scale of its own, so those in use will do
            return fake_weight(made, self.hfc_layouts["weight"].weights)
        return made

    def _with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the input fake-quantized, where that is planned."""
        inputs = self.hfc_layouts["weight"].scheme.input_activations if "weight" in self.hfc_layouts else None
        value = args[0] if args else kwargs.get(self.hfc_input)
        if inputs is None or not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 0:
            return args, kwargs
        made = self._fake_input(value, inputs)
        if args:
            return (made, *args[1:]), kwargs
        return args, {**kwargs, self.hfc_input: made}

    def _fake_input(self, value: Tensor, args: QuantizationArgs) -> Tensor:
        """The input as this phase has it; a fixed range is looked at while the module is trained."""
        phase = self.hfc_phase
        if self.hfc_seen is not None and self.training and phase.observe:
            _look(self.hfc_seen, value.detach())
        if not phase.quantize:
            return value
        return _dynamic_input(self, value, args) if args.dynamic else _static_input(self, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantized:
        """Move or cast; what belongs to fake quantization is only moved, it is float32 in models of any type."""
        owned = {**self._buffers, **self._parameters}
        before = {name: value.detach() for name, value in owned.items() if value is not None and _is_wide(name, value)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            after = self._buffers.get(name, self._parameters.get(name))
            if after is not None and after.dtype != value.dtype:
                after.data = value.to(after.device)
        if self.hfc_seen is not None:
            self.hfc_seen = self.hfc_seen.to(self.get_buffer(LOW).device)
        return self


class FakeRecurrent(FlatWeights, FakeQuantized):
    """Recurrent layers that read fake-quantized weights."""


def insert_fake_quant(model: nn.Module, plan: Plan, fields: QuantFields) -> None:
    """Let a dense model compute with fake-quantized values, in place.

    Its first forward in each mode raises UnsupportedModelError where weights are read past their layers, see `reads`.

    Args:
        model: The model, with its weights, on any device.
        plan: Its plan; all quantized rows are swapped. The model keeps it, see `handover.training_plan_of`.
        fields: The fields of `QATConfig`. Unless `start` is 0, the model computes in floating point until `set_phase`.

    Raises:
        ConfigError: The fields are another method's.
        UnsupportedModelError: A weight is on the meta device, or a module's forward was replaced.
        WeightValueError: A weight holds NaN or infinite values, or none. The model is unchanged after any of these.
    """
    if not isinstance(fields, QATFields):
        raise ConfigError(f"{type(fields).__name__} is for methods without training.", "use QATConfig")
    for row in plan.quantized:
        _check(model, row)
    phase = Phase(quantize=fields.start == 0)
    for row in plan.quantized:
        module = model.get_submodule(row.module)
        _swap(module, row, phase)
        if fields.learn_scales and row.kind is not WeightKind.EMBEDDING and not _is_tied(plan, row):
            _learn_scale(module, row.parameter)
    vars(model)[TRAINING_PLAN] = plan
    watch(model)


def remove_fake_quant(model: nn.Module) -> Plan:
    """Give all modules their own class back; parameters keep the values that training gave them.

    Returns:
        The plan.

    Raises:
        UnsupportedModelError: The model has no fake quantization.
    """
    plan = training_plan_of(model)
    if plan is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no fake quantization.", "prepare it: QATCallback(QATConfig(bits=4))"
        )
    unwatch(model)
    for _, module in list(fake_modules(model)):
        _restore(module)
    del vars(model)[TRAINING_PLAN]
    return plan


def fake_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantized]]:
    """Paths and modules that compute with fake-quantized values."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, FakeQuantized))


def set_phase(model: nn.Module, quantize: bool, observe: bool) -> None:
    """Say what all modules do from now on.

    Scales that are learned start from the range that weights have when fake quantization starts.

    Args:
        model: The model.
        quantize: Whether they compute with fake-quantized values.
        observe: Whether they look at the ranges of their inputs while they are trained.
    """
    phase = Phase(quantize, observe)
    for _, module in fake_modules(model):
        if quantize and not module.hfc_phase.quantize:
            for name in module.hfc_learned:
                _restart_scale(module, name)
        if module.hfc_phase != phase:
            module.hfc_phase = phase


@torch.no_grad()
def commit_ranges(model: nn.Module) -> None:
    """Move the ranges of inputs towards what this step has shown: to be called after each optimizer step.

    An exponential moving average as of `calibration.observers.MovingAverage`, over all batches of the step and, in a
    distributed run, all processes, which all have to call this. What is not finite is left out.

    Args:
        model: The model.
    """
    static = [module for _, module in fake_modules(model) if module.hfc_seen is not None]
    pending = [module.hfc_seen for module in static if module.hfc_seen is not None]
    if not pending or not static[0].hfc_phase.observe:
        return
    seen = torch.stack([value.to(pending[0].device) for value in pending])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(seen, op=distributed.ReduceOp.MAX)
    newest = torch.stack([-seen[:, 0], seen[:, 1]], dim=1)
    means = torch.stack([torch.cat(_range(module)).to(seen.device) for module in static])
    moved = torch.where(means.isnan(), newest, means + MOMENTUM * (newest - means))
    known = newest.isfinite().all(dim=1, keepdim=True)
    for module, (low, high) in zip(static, torch.where(known, moved, means).unbind(), strict=True):
        module.get_buffer(LOW).fill_(low)
        module.get_buffer(HIGH).fill_(high)
    for value in pending:
        value.fill_(-math.inf)


@torch.no_grad()
def quantized(module: nn.Module, parameter: str) -> Quantized:
    """What a module computes with, as codes and scales.

    Args:
        module: A module that computes with fake-quantized values.
        parameter: Name of the parameter.

    Returns:
        Codes, scale and zero point in canonical orientation; those of the input where it has one fixed range.

    Raises:
        UnsupportedModelError: The parameter is not fake-quantized.
        CalibrationError: The range of the input is not known yet.
    """
    if not isinstance(module, FakeQuantized) or parameter not in module.hfc_layouts:
        raise UnsupportedModelError(
            f"{parameter} of {type(module).__name__} is not fake-quantized.", "prepare the model with QATCallback"
        )
    layout = module.hfc_layouts[parameter]
    weight = canonical(module.get_parameter(parameter).detach(), layout)
    learned = parameter in module.hfc_learned
    if learned and not module.hfc_phase.quantize:  # one that was never trained is that of the weight at first
        learned = bool(module.get_parameter(_extra(parameter, "scale_bias")).any())
    if not learned:
        made = quantize(weight, layout.weights)
    else:
        narrow = layout.weights.scale_dtype or weight.dtype
        scale, zero_point = stored_scale(_scale(module, parameter), narrow, weight.dtype), _zeros(module, parameter)
        made = Quantized(codes_of(weight, layout.weights, scale, zero_point), scale, zero_point)
    if module.hfc_seen is None or parameter != "weight":
        return made
    if _unseen(module):
        raise CalibrationError(
            f"The range of the input of a {type(module).__name__} is not known, as no training step has reached it.",
            'train with batches that reach it, or activation_strategy="token"',
        )
    input_scale, input_zero_point = _input_grid(module)
    return replace(made, input_scale=input_scale, input_zero_point=input_zero_point)


def fake_parameter(module: FakeQuantized, name: str) -> Tensor:
    """The fake-quantized values of a parameter, of its shape, orientation and data type."""
    layout = module.hfc_layouts[name]
    weight = canonical(_tensor(module._parameters, name), layout)
    if name in module.hfc_learned:
        made = fake_learned(weight, layout.weights, _scale(module, name), _zeros(module, name))
    else:
        made = fake_weight(weight, layout.weights)
    return layout.oriented(made)


def _float_parameter(module: FakeQuantized, name: str) -> Tensor:
    """A parameter as it is; its learned scale gets a gradient of zero, as DDP waits for one of each parameter."""
    weight = _tensor(module._parameters, name)
    if name not in module.hfc_learned:
        return weight
    return beside(weight, _tensor(module._parameters, _extra(name, "scale_bias")))


def forget_scale_gradients(model: nn.Module) -> None:
    """Drop gradients of scales that nothing is computed with yet, which are zero: optimizers would count the steps.

    Args:
        model: The model, after its gradients were reduced.
    """
    for _, module in fake_modules(model):
        for name in module.hfc_learned if not module.hfc_phase.quantize else ():
            module.get_parameter(_extra(name, "scale_bias")).grad = None


def _check(model: nn.Module, row: PlanRow) -> None:
    """Refuse what can't be trained with fake quantization.

    Raises:
        UnsupportedModelError: The weight is on the meta device, or its module's forward was replaced.
        WeightValueError: It holds NaN or infinite values, or none.
    """
    module = model.get_submodule(row.module)
    parameter = module.get_parameter(row.parameter)
    if parameter.is_meta:
        raise UnsupportedModelError(f"{row.name} has no values yet: it is on the meta device.", "load the weights")
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{row.module} has a forward of its own, such as accelerate puts there for a device map, which would go "
            "past fake quantization.",
            "load the model without device_map",
        )
    check_values(row.name, canonical(parameter.detach(), layout_of(row)))


def _is_tied(plan: Plan, row: PlanRow) -> bool:
    """Whether a row shares its parameter, and with it its grid, with another one."""
    return row.tied_to is not None or row.name in plan.followers


def _swap(module: nn.Module, row: PlanRow, phase: Phase) -> None:
    """Swap the class of a module for one that fake-quantizes one more of its parameters, and its input if planned."""
    layout, base = layout_of(row), original_class(type(module))
    layouts = {**vars(module).get("hfc_layouts", {}), row.parameter: layout}
    device = module.get_parameter(row.parameter).device
    module.__class__ = _fake_class(base, tuple(layouts))  # type: ignore[arg-type] # nn.Module is hashable
    vars(module).setdefault("hfc_learned", frozenset())
    vars(module).setdefault("hfc_seen", None)
    vars(module).update(hfc_layouts=layouts, hfc_phase=phase, hfc_values=None, **{READS: None})
    if isinstance(module, FakeRecurrent):
        module.drop_flat_weights()
    inputs = layout.scheme.input_activations
    if inputs is not None and not inputs.dynamic:
        vars(module)["hfc_seen"] = torch.full((2,), -math.inf, device=device)
        for name in (LOW, HIGH):
            module.register_buffer(name, torch.full((1,), math.nan, device=device))


def _restore(module: FakeQuantized) -> None:
    """Give a module its own class back."""
    for values in (module._buffers, module._parameters):
        for name in [name for name in values if name.startswith("hfc_")]:
            del values[name]
    for name in ("hfc_layouts", "hfc_learned", "hfc_phase", "hfc_values", "hfc_seen", READS):
        vars(module).pop(name, None)
    object.__setattr__(module, "__class__", original_class(type(module)))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@functools.cache
def _fake_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` whose attributes `names` are fake-quantized while its forward runs."""
    properties = {name: property(_reader(name)) for name in names}
    kind = FakeRecurrent if issubclass(base, nn.RNNBase) else FakeQuantized
    looks_up = issubclass(base, nn.Embedding) and base.forward is nn.Embedding.forward
    facts = {"hfc_base": base, "hfc_input": first_parameter(base), "hfc_looks_up": looks_up}
    return type(base.__name__, (kind, base), {**properties, **facts, "__module__": base.__module__})


def _reader(name: str) -> Callable[[FakeQuantized], Tensor | None]:
    """The getter of a fake-quantized parameter. To a compiler, it is rounded wherever it is read, as once packed."""

    def read(module: FakeQuantized) -> Tensor | None:
        if module.hfc_values is not None:
            return module.hfc_values[name]
        if torch.compiler.is_compiling() and module.hfc_phase.quantize:
            return fake_parameter(module, name)
        value = module._parameters[name]
        if torch.compiler.is_compiling() or module.hfc_reads is None or value is None:
            return value
        return watched(value, name, module.hfc_reads)

    return read


def _extra(parameter: str, what: str) -> str:
    """The name of a tensor that belongs to the scale of a parameter."""
    return f"hfc_{what}" if parameter == "weight" else f"hfc_{parameter}_{what}"


def _tensor(values: Mapping[str, Tensor | None], name: str) -> Tensor:
    """A parameter or buffer, or what stands for it in a functional call."""
    found = values[name]
    if found is None:
        raise ValueError(f"{name} has no values")
    return found


def _is_wide(name: str, value: Tensor) -> bool:
    """Whether a tensor of a module belongs to fake quantization and is floating point."""
    return name.startswith("hfc_") and value.is_floating_point()


@torch.no_grad()
def _learn_scale(module: nn.Module, parameter: str) -> None:
    """Register a learned scale that starts from the range of the weight."""
    if not isinstance(module, FakeQuantized):
        raise TypeError(f"{type(module).__name__} is not fake-quantized")
    scale, zero_point = _own_grid(module, parameter)
    module.register_buffer(_extra(parameter, "scale"), scale)
    module.register_parameter(_extra(parameter, "scale_bias"), nn.Parameter(torch.zeros_like(scale)))
    if zero_point is not None:
        module.register_buffer(_extra(parameter, "zero_point"), zero_point)
    vars(module)["hfc_learned"] = module.hfc_learned | {parameter}


@torch.no_grad()
def _restart_scale(module: FakeQuantized, parameter: str) -> None:
    """Take the range that the weight has now, unless the scale was trained before, as after a checkpoint."""
    if bool(module.get_parameter(_extra(parameter, "scale_bias")).any()):
        return
    scale, zero_point = _own_grid(module, parameter)
    module.get_buffer(_extra(parameter, "scale")).copy_(scale)
    if zero_point is not None:
        module.get_buffer(_extra(parameter, "zero_point")).copy_(zero_point)


def _own_grid(module: FakeQuantized, parameter: str) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of the range of a weight."""
    layout = module.hfc_layouts[parameter]
    scale, zero_point = weight_grid(canonical(module.get_parameter(parameter).detach(), layout), layout.weights)
    return scale.float(), zero_point


def _scale(module: FakeQuantized, parameter: str) -> Tensor:
    """The learned scale as it is now, float32."""
    start = _tensor(module._buffers, _extra(parameter, "scale"))
    return start * _tensor(module._parameters, _extra(parameter, "scale_bias")).exp()


def _zeros(module: FakeQuantized, parameter: str) -> Tensor | None:
    """Zero points beside a learned scale."""
    return module._buffers.get(_extra(parameter, "zero_point"))


def _range(module: FakeQuantized) -> list[Tensor]:
    """The range of a module's input, so far."""
    return [_tensor(module._buffers, name) for name in (LOW, HIGH)]


def _unseen(module: FakeQuantized) -> bool:
    """Whether nothing is known of the range of a module's input."""
    return bool(_range(module)[0].isnan())


@torch.no_grad()
def _look(seen: Tensor, value: Tensor) -> None:
    """Take note of the extremes of an input; looking at the same one twice changes nothing."""
    low, high = torch.aminmax(value)
    seen.copy_(torch.fmax(seen, torch.stack([-low, high]).to(seen)))


@torch.no_grad()
def _input_grid(module: FakeQuantized) -> tuple[Tensor, Tensor | None]:
    """Scale (1) in the weight's data type, and zero point, int8 (1) or None, of the range so far."""
    inputs = module.hfc_layouts["weight"].scheme.input_activations
    if inputs is None:
        raise ValueError("the input is not quantized")
    low, high = _range(module)
    return uniform_grid(low, high, inputs, _tensor(module._parameters, "weight").dtype)


def _static_input(module: FakeQuantized, value: Tensor) -> Tensor:
    """The input on the grid of its range; as it is while nothing is known of that."""
    looked = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked and _unseen(module):  # elsewhere looking would wait for the device, or can't be compiled
        return value
    made = fake_input(value, *_input_grid(module), clipped=True)
    return made if looked else torch.where(_range(module)[0].isnan(), value.to(made.dtype), made)


def _dynamic_input(module: FakeQuantized, value: Tensor, args: QuantizationArgs) -> Tensor:
    """The input on a grid of its own: per token, or for the whole tensor.

    A token's scale is that of (batch, tokens, features); inputs of other ranks are given as one batch of tokens.
    """
    given = value
    if args.strategy == "token" and value.ndim != 3:
        given = value.reshape(1, -1, value.shape[-1])
    with torch.no_grad():
        scale, zero_point = compute_dynamic_scales_and_zp(value=given.detach(), args=args, module=module)
    return fake_input(given, scale, None if args.symmetric else zero_point, clipped=False).view(value.shape)
