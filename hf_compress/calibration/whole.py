"""A whole model as what is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import Call, first_tensor
from .capture import Replay, Stack, run_on, swapped
from .padding import all_of, padding_of


class WholeCall(Call):
    """A call of a whole model, whose finished stacks give what they gave before.

    Of an encoder-decoder, `mask` is the decoder's and `memory_mask` the encoder's. While it runs, what the encoder is
    and what it returns is known, so layers inside it, and those that read its output, are told from the decoder's.

    Args:
        model: The model.
        batch: Its forward arguments.
        number: The batch's number.
        stacks: Stacks that are finished.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], number: int, stacks: Sequence[Stack]) -> None:
        own, other = (padding_of(batch, name) for name in ("attention_mask", "decoder_attention_mask"))
        if _encoder(model) is not None:
            ids = batch.get("decoder_input_ids")
            own, other = all_of(ids) if other is None and ids is not None else other, own
        super().__init__(None, kwargs=dict(batch), mask=own, memory_mask=other)
        self.number = number
        self.stacks = stacks
        self.encoding = False

    def run(self, module: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Call the model."""
        with swapped(module, self.stacks, Replay(self.stacks, self.number)), self._watched(_encoder(module)):
            return first_tensor(run_on(module, self.kwargs, self.number))

    def masks(self, value: Tensor) -> tuple[Tensor | None, ...]:
        """The masks that an input may have: the encoder's alone while it runs."""
        return (self.memory_mask,) if self.encoding else super().masks(value)

    @contextmanager
    def _watched(self, encoder: nn.Module | None) -> Iterator[None]:
        """Note when the encoder runs, and what it returns."""

        def start(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.encoding = True

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.encoding = False
            self.memory = first_tensor(output)

        handles = []
        if encoder is not None:
            handles = [encoder.register_forward_pre_hook(start), encoder.register_forward_hook(stop)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.encoding, self.memory = False, None


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return None
    encoder = model.get_encoder()
    return None if encoder is model else encoder
