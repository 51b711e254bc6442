"""llm-compressor: GPTQ, or AWQ patched to run without an accelerator."""

from __future__ import annotations

import datasets
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from protocol import Job, Quantize, Save, serve


def unpatched_pinning_fails(cache: IntermediatesCache, *arguments: object, **named: object) -> None:
    """Instead of pinning memory, which raises where there is no accelerator."""


def modifiers(job: Job) -> list[object]:
    """The recipe of a job."""
    weights = {"num_bits": job.bits, "type": "int", "symmetric": True, "strategy": "group"}
    scheme = {"group_0": {"targets": ["Linear"], "weights": {**weights, "group_size": job.group_size}}}
    if job.method == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=["lm_head"])]
    return [AWQModifier(), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]


def load(job: Job) -> Quantize:
    """The model and the data."""
    if job.method == "awq":
        IntermediatesCache.pin_memory = unpatched_pinning_fails
    ids = torch.load(job.ids, weights_only=True)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model)

    def quantize() -> Save:
        oneshot(
            model=model,
            dataset=rows,
            recipe=modifiers(job),
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
        )
        return lambda: model.save_pretrained(job.out, save_compressed=True)

    return quantize


if __name__ == "__main__":
    serve(("llmcompressor", "compressed-tensors", "transformers", "torch"), load)
