"""Quantization-aware training: fake quantization by class swap, and the conversion to packed weights."""
