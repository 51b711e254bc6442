"""Checkpoints: written in one step, proven by a reload in a clean process, verified later."""
