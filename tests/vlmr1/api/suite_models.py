"""Tiny checkpoints of the conformance suite: those of `tests.helpers.families`, in a table that the suite adds to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.helpers import families
from tests.helpers.families import CHATML, TEXT, tokenizer, with_parts

__all__ = ["CHATML", "FAMILIES", "QWEN", "Family", "build", "text", "tokenizer", "with_parts"]

QWEN = families.QWEN.special
# The widths for which the suite was written: some of its cases draw completions that must differ.
FAMILIES: dict[str, Any] = {
    name: replace(family, text={"intermediate_size": 96} | family.text) for name, family in families.FAMILIES.items()
}


@dataclass(frozen=True)
class Family:
    """A family by the function that makes its configuration."""

    config: Callable[[dict[str, int]], Any]  # ids by token -> configuration
    special: tuple[str, ...]
    template: str
    image_processor: Callable[[], Any]
    named: dict[str, str] | None = None
    settings: dict[str, Any] | None = None


def build(name: str, folder: Path) -> Path:
    return families.build(FAMILIES[name], folder)


def text(ids: dict[str, int], special: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Decoder settings for a vocabulary."""
    padding, end = (ids[token] for token in special[:2])
    known = {"vocab_size": len(ids), "pad_token_id": padding, "bos_token_id": padding, "eos_token_id": end}
    return TEXT | {"intermediate_size": 96} | known | more
