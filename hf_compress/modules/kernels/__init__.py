"""Kernels for packed modules: one protocol, one file per backend."""
