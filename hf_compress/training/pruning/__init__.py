"""Pruning while training: masks that live in the weights."""

from .callback import PruningCallback
from .config import PruningConfig, PruningRule
from .report import PrunedWeight, PruningReport, achieved

__all__ = ["PrunedWeight", "PruningCallback", "PruningConfig", "PruningReport", "PruningRule", "achieved"]
