"""GPTQModel: GPTQ with its defaults."""

from __future__ import annotations

import torch
import transformers
from gptqmodel import GPTQModel, QuantizeConfig
from protocol import Job, Quantize, Save, serve


def load(job: Job) -> Quantize:
    """The model and the data."""
    rows = [
        {"input_ids": row.unsqueeze(0), "attention_mask": torch.ones_like(row).unsqueeze(0)}
        for row in torch.load(job.ids, weights_only=True)
    ]
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=True)
    model = GPTQModel.load(job.model, config, device="cpu")

    def quantize() -> Save:
        model.quantize(rows, batch_size=1)
        return lambda: model.save(job.out)

    return quantize


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    serve(("gptqmodel", "transformers", "torch"), load)
