"""Peak memory of a training job, before anything is loaded."""

from vlmr1.planner.plan import peak_bytes

__all__ = ["peak_bytes"]
