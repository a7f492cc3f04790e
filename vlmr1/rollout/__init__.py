"""Rollout engines by name."""

from vlmr1.rollout.engine import RolloutEngine
from vlmr1.rollout.native import NativeEngine
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.rollout.transformers import TransformersEngine

ENGINES = {"native": NativeEngine, "transformers": TransformersEngine}

__all__ = ["ENGINES", "NativeEngine", "RolloutEngine", "SamplingSettings", "TransformersEngine"]
