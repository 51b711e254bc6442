"""Calibration images distilled from a network's batch statistics (ZeroQ, arXiv:2001.00281, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ..core.config import Calibration
from ..core.errors import CalibrationError
from .data_model import dtype_of, main_input
from .modes import evaluating
from .processors import Source, find

STEPS = 300
RATE = 0.1
AT_ONCE = 32
"""Images whose statistics are brought to those of the data together."""

WIDEST = 2.7
"""Normalised pixels lie in ± this where no image processor tells: ImageNet's normalisation reaches 2.64."""

_EPSILON = 1e-6


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a network has batch normalisation with running statistics, and reads images."""
    return main_input(model) in ("pixel_values", "input", "x") and bool(_norms(model))


def distilled_images(
    model: nn.Module, request: Calibration, source: Source, steps: int = STEPS
) -> list[dict[str, Tensor]]:
    """Images whose mean and deviation before every batch normalisation are those that it has learned.

    Noise is optimised by Adam; the distance is the sum over the layers of the mean squared differences of channel
    means and of channel deviations (equation 1 there; divided by the running variance, so that layers weigh the
    same). Pixels stay within what the image processor can make of an image. The best images seen are kept.

    Args:
        model: A live network in any mode; it is not changed, and needs no gradients.
        request: `rows`, `seed`, `batch_size` and, where the model doesn't tell, `image_size`.
        source: Where its image processor is, if not at its own place.
        steps: Steps of the optimiser.

    Returns:
        Batches with the main input, rows × channels × height × width, in the model's data type.

    Raises:
        CalibrationError: The size of the images is unknown, or the statistics become NaN.
    """
    processor = find(ImageProcessingMixin, request, model, source)
    shape = _image_shape(model, request, processor)
    low, high = _pixel_range(processor, shape[0])
    generator = torch.Generator().manual_seed(request.seed)
    made = []
    with evaluating(model):
        for start in range(0, request.rows, AT_ONCE):
            noise = torch.randn(min(AT_ONCE, request.rows - start), *shape, generator=generator)
            made.append(_distilled(model, noise, low, high, steps))
    images = dtype_of(model, torch.cat(made))
    name = main_input(model)
    return [{name: part} for part in images.split(request.batch_size)]


def statistics_distance(model: nn.Module, images: Tensor) -> Tensor:
    """How far images are from what batch normalisation has learned, a scalar, float32; 0 where they agree.

    Args:
        model: A network in evaluation mode.
        images: Rows × channels × height × width.
    """
    found: list[Tensor] = []

    def compare(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            found.append(_difference(arguments[0].float(), module.running_mean.float(), module.running_var.float()))

    handles = [module.register_forward_pre_hook(compare) for module in _norms(model)]
    try:
        model(**{main_input(model): dtype_of(model, images)})
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).sum() if found else images.new_zeros(())


def _difference(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Mean squared differences of channel means and deviations, in units of the running variance."""
    axes = [axis for axis in range(value.ndim) if axis != 1]
    scale = variance.clamp_min(_EPSILON)
    deviation = (value.var(dim=axes, correction=0) + _EPSILON).sqrt()
    means = (value.mean(dim=axes) - mean).square() / scale
    deviations = (deviation - scale.sqrt()).square() / scale
    return (means + deviations).mean()


def _distilled(model: nn.Module, noise: Tensor, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """The best images on the way from noise, float32 on the CPU; values between `low` and `high`."""
    place = next(model.parameters()).device
    low, high = low.to(place), high.to(place)
    images = noise.to(place).clamp(low, high).requires_grad_()
    optimiser = torch.optim.Adam([images], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, least = images.detach().clone(), float("inf")
    for _ in range(steps):
        with torch.enable_grad():
            distance = statistics_distance(model, images)
            (images.grad,) = torch.autograd.grad(distance, [images])
        seen = float(distance.detach())
        if seen < least:
            best, least = images.detach().clone(), seen
        optimiser.step()
        images.data.clamp_(low, high)
        schedule.step()
    if least == float("inf"):
        raise CalibrationError(
            f"The batch statistics of {type(model).__name__} are not finite, so no images follow from them.",
            "repair the weights, or pass images",
        )
    return best.cpu()


def _norms(model: nn.Module) -> list[nn.Module]:
    """Layers of batch normalisation with running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def _image_shape(model: nn.Module, request: Calibration, processor: Any | None) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        CalibrationError: Neither the request nor the model nor its image processor tells the size.
    """
    config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = config.get("num_channels", first.in_channels if first is not None else 3)
    for size in (request.image_size, config.get("image_size"), _processed_size(processor)):
        if isinstance(size, int):
            return channels, size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return channels, int(size[0]), int(size[1])
    raise CalibrationError(
        f"The size of the images that {type(model).__name__} reads is unknown.",
        "Calibration.generated(image_size=224), or tokenizer=AutoImageProcessor.from_pretrained(...)",
    )


def _processed_size(processor: Any | None) -> Any:
    """The size that an image processor makes, or None."""
    values = processor.to_dict() if processor is not None else {}
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if not isinstance(size, dict):
        return size
    return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")


def _pixel_range(processor: Any | None, channels: int) -> tuple[Tensor, Tensor]:
    """What an image processor makes of black and of white, channels × 1 × 1."""
    values = processor.to_dict() if processor is not None else {}
    if not values.get("do_rescale"):
        return -torch.full((channels, 1, 1), WIDEST), torch.full((channels, 1, 1), WIDEST)
    mean, deviation = torch.zeros(1), torch.ones(1)
    if values.get("do_normalize"):
        mean, deviation = torch.tensor(values["image_mean"]), torch.tensor(values["image_std"])
    black, white = -mean / deviation, (255 * values["rescale_factor"] - mean) / deviation
    return black.reshape(-1, 1, 1).expand(channels, 1, 1), white.reshape(-1, 1, 1).expand(channels, 1, 1)
