"""Runnable examples of hf_compress, and the real models and data they use."""
