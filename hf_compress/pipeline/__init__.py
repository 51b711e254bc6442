"""Drivers: plan, quantize, and what they share with the transformers plug-in."""
