"""The one quantizer registered with transformers, under `hf_compress`: a request, never a stored format.

It packs weight by weight while transformers loads, then hands the model over to the native quantizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..core.config import REQUEST, QuantConfig
from ..core.errors import CorruptCheckpointError, DeviceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..checkpoint.load import ReadRequest
    from ..checkpoint.session import LoadSession


class PackOnLoad(ConversionOps):
    """Packs one parameter as it arrives from the checkpoint; the dense tensor is dropped right after."""

    def __init__(self, session: LoadSession) -> None:
        self.session = session

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Pack `full_layer_name` in place. Returns nothing for the loader to set."""
        (value,) = input_dict.values()
        self.session.receive(model, full_layer_name, value[0] if isinstance(value, list) else value)
        if missing_keys is not None:
            missing_keys -= {row.key for row in self.session.group(full_layer_name)}
        return {}


class HFCompressQuantizer(HfQuantizer):
    """Carries out a `QuantConfig` inside `from_pretrained`."""

    quantization_config: QuantConfig | ReadRequest
    session: LoadSession | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what can't work before the model is built.

        Raises:
            CorruptCheckpointError: A checkpoint names our method, which this package never writes.
            DeviceError: Weights would be offloaded to disk while they are being packed.
        """
        if self.pre_quantized:
            raise CorruptCheckpointError(
                f"config.json names quant_method {REQUEST!r}, which hf_compress never writes.",
                "save the model again with hf_compress.save",
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise DeviceError("Weights can't be quantized and offloaded to disk in one load.", 'use device_map="cpu"')

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """A cast decides the data type of the whole model."""
        config = self.quantization_config
        return (config.load_dtype if isinstance(config, QuantConfig) else None) or dtype

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per packed value, for `device_map="auto"`."""
        rows = self.session.plan.quantized if self.session is not None else ()
        values = sum(row.parameters for row in rows)
        return sum(row.planned_bytes for row in rows) / values if values else None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from ..pipeline.loading import start

        self.session = start(model, self.quantization_config)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the plan packs this parameter."""
        return self.session is not None and param_name in self.session.rows

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs a parameter."""
        if self.session is None:
            raise RuntimeError("transformers asked for the operation before it announced the model")
        return PackOnLoad(self.session)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from ..pipeline.loading import finish

        if self.session is None:
            raise RuntimeError("transformers finished a model that it never announced")
        finish(model, self.session)

    def is_serializable(self) -> bool:
        """Never under our own name: the native quantizer has taken over before anything can be saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """The native quantizer answers this."""
        return False


def register() -> None:
    """Register the request with transformers; once per process, however often the package is imported."""
    if REQUEST not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(REQUEST)(QuantConfig)
    if REQUEST not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(REQUEST)(HFCompressQuantizer)
