"""Pruning while training: masks that live in the weights."""
