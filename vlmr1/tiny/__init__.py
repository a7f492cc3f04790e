"""The embedded default: a tiny VLM, its tokenizer, and a data set of real handwritten digits."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
TINY, DIGITS = "tiny", "digits"  # the names of the embedded model and data set


def model_path(name: str) -> str:
    """The embedded model's directory for its name; any other name unchanged."""
    return str(CHECKPOINT) if name == TINY else name
