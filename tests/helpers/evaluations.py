"""Evaluations of a run's own rows."""

from typing import Any

from vlmr1.evaluation.run_rows import evaluation_samples
from vlmr1.evaluation.settings import EvaluationSettings
from vlmr1.rewards.rows import RowReader


def evaluated(config: Any, processor: Any, validation: Any = None) -> Any:
    """The rows that a run with these settings evaluates."""
    reader = RowReader.of(config, "qwen2_5_vl", processor.image_processor)
    return evaluation_samples(EvaluationSettings.of(config), reader, validation)
