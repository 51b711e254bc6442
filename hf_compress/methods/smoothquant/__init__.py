"""SmoothQuant: the range of inputs moved into weights before both are quantized."""

from .method import smooth_block, smooth_model

__all__ = ["smooth_block", "smooth_model"]
