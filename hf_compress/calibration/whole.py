"""A whole model as what is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import Call, first_tensor
from .capture import Replay, Stack, run_on, swapped
from .padding import MASKS, all_of, hiding, mask_names, padding_of


class WholeCall(Call):
    """A call of a whole model, whose finished stacks give what they gave before.

    Of an encoder-decoder, `mask` is the decoder's and `memory_mask` the encoder's. While it runs, what the encoder is
    and what it returns is known, so layers inside it, and those that read its output, are told from the decoder's.
    Tokens that the model makes itself, such as frames of sound, are told from padding by the last mask that a module
    was given.

    Args:
        model: The model.
        batch: Its forward arguments.
        number: The batch's number.
        stacks: Stacks that are finished.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], number: int, stacks: Sequence[Stack]) -> None:
        own, other = (padding_of(batch, name) for name in mask_names(model, batch))
        self.given = batch.get("encoder_hidden_states")  # by the caller, to a decoder alone
        ids = batch.get("decoder_input_ids" if self.given is None else "input_ids")
        if own is None and ids is not None:
            own = all_of(ids)
        super().__init__(None, kwargs=dict(batch), mask=own, memory=self.given, memory_mask=other)
        self.number = number
        self.stacks = stacks
        self.encoding = False
        self.told: Tensor | None = None
        self.padded = any(padding_of(batch, name) is not None for name in MASKS)

    def run(self, module: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Call the model."""
        with swapped(module, self.stacks, Replay(self.stacks, self.number)), self._watched(module):
            return first_tensor(run_on(module, self.kwargs, self.number))

    def masks(self, value: Tensor) -> tuple[Tensor | None, ...]:
        """The masks that an input may have: the encoder's alone while it runs. Data without padding has none."""
        known = (self.memory_mask,) if self.encoding else super().masks(value)
        return (*known, self.told) if any(mask is not None for mask in known) else known

    @contextmanager
    def _watched(self, model: nn.Module) -> Iterator[None]:
        """Note when the encoder runs, what it returns, and the masks that modules are called with."""

        def start(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.encoding = True

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.encoding = False
            self.memory = first_tensor(output)

        def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
            self.told = hiding(mask, len(mask)) if isinstance(mask, Tensor) and mask.ndim else None

        handles = [
            module.register_forward_pre_hook(tell, with_kwargs=True)
            for module in model.modules()
            if self.padded and "attention_mask" in signature(module.forward).parameters
        ]
        encoder = _encoder(model)
        if encoder is not None:
            handles += [encoder.register_forward_pre_hook(start), encoder.register_forward_hook(stop)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.encoding, self.memory, self.told = False, self.given, None


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return None
    encoder = model.get_encoder()
    return None if encoder is model else encoder
