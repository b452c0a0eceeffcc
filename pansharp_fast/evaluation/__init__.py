"""Evaluation of methods on a data set or a pair of scenes: measures, tables, pictures, curves under PAN/MS shifts."""

from .run import evaluate

__all__ = ["evaluate"]
