"""Compression methods, one folder each: a configuration class and a pure function on tensors."""
