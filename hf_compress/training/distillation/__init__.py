"""Distillation: losses, teachers, and the mixin that adds them to any Trainer."""

from .callback import DistillationCallback
from .config import DistillationConfig
from .hidden import HiddenConfig
from .mixin import DistillationMixin, DistillationTrainer
from .relations import RelationConfig
from .student import student_from_teacher

__all__ = [
    "DistillationCallback",
    "DistillationConfig",
    "DistillationMixin",
    "DistillationTrainer",
    "HiddenConfig",
    "RelationConfig",
    "student_from_teacher",
]
