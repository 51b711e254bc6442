"""hf_compress, from the directory, where one block at a time is dense in memory; static INT8 of a live classifier."""

from __future__ import annotations

import torch
from protocol import Job, Quantize, Save, serve
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import hf_compress as hfc


def configuration(job: Job) -> hfc.QuantConfig:
    """The request of a job."""
    grid = {"bits": job.bits, "group_size": job.group_size}
    if job.method == "rtn":
        return hfc.RTNQuantConfig(**grid)
    ids = torch.load(job.ids, weights_only=True)
    rows, length = ids.shape
    data = hfc.Calibration(ids.tolist(), rows=rows, sequence_length=length, seed=job.seed, pack=False)
    if job.method == "int8_static":
        return hfc.Int8StaticQuantConfig(calibration=data)
    if job.method == "gptq":
        return hfc.GPTQQuantConfig(**grid, calibration=data)
    if job.method == "awq":
        return hfc.AWQQuantConfig(**grid, calibration=data)
    return hfc.AutoRoundQuantConfig(**grid, iterations=job.iterations, calibration=data)


def load(job: Job) -> Quantize:
    """Only the request: the model is read while it is quantized, unless it is a live one."""
    config = configuration(job)
    live = job.method == "int8_static"
    source = AutoModelForSequenceClassification.from_pretrained(job.model) if live else job.model

    def quantize() -> Save:
        model = hfc.quantize(source, config)
        return lambda: save(model, job.out)

    return quantize


def save(model: PreTrainedModel, out: str) -> None:
    """Save with proof."""
    hfc.save(model, out)


if __name__ == "__main__":
    logging.disable_progress_bar()
    serve(("transformers", "torch"), load)
