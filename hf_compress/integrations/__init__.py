"""Plugs into transformers and optimum."""
