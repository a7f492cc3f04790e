"""The embedded default: a tiny VLM, its tokenizer, and a data set of real handwritten digits."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
