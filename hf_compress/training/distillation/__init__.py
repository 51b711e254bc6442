"""Distillation: losses, teachers, and the mixin that adds them to any Trainer."""
