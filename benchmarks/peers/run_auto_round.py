"""auto-round: learned rounding."""

from __future__ import annotations

import torch
import transformers
from auto_round import AutoRound
from protocol import Job, Quantize, Save, serve


def load(job: Job) -> Quantize:
    """The model and the data."""
    ids = torch.load(job.ids, weights_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    rounding = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group_size,
        sym=True,
        iters=job.iterations,
        dataset=list(ids.split(1)),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        seed=job.seed,
        device_map="cpu",
    )

    def quantize() -> Save:
        rounding.quantize()
        return lambda: rounding.save_quantized(job.out, format="auto_gptq", inplace=True)

    return quantize


if __name__ == "__main__":
    serve(("auto-round", "transformers", "torch"), load)
