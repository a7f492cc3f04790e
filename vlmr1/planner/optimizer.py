"""Bytes that an optimizer holds for the parameters that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmr1.errors import SettingError

SMALL = 4096  # numbers of a tensor below which bitsandbytes and torchao keep float32 states


@dataclass(frozen=True)
class Kind:
    """States a parameter, and the bytes of each; None: of the parameter's dtype."""

    states: int
    width: float | None
    temporary: bool = False  # a copy of the trained parameters while it steps
    paged: bool = False  # in host memory but for the step
    embeddings_wide: bool = False  # those of embeddings stay float32


# 8 bits a number and a float32 for each block of 256; 4 bits and one for each block of 128.
EIGHT, FOUR = 1 + 4 / 256, 0.5 + 4 / 128
KINDS = {
    "adamw_torch": Kind(2, None, temporary=True),
    "adamw_torch_fused": Kind(2, None),
    "adamw_torch_8bit": Kind(2, EIGHT),
    "adamw_torch_4bit": Kind(2, FOUR),
    "adamw_8bit": Kind(2, EIGHT, embeddings_wide=True),
    "adamw_bnb_8bit": Kind(2, EIGHT, embeddings_wide=True),
    "paged_adamw_32bit": Kind(2, 4, paged=True),
    "paged_adamw_8bit": Kind(2, EIGHT, paged=True, embeddings_wide=True),
    "lion_32bit": Kind(1, 4),
    "lion_8bit": Kind(1, EIGHT, embeddings_wide=True),
    "paged_lion_32bit": Kind(1, 4, paged=True),
    "paged_lion_8bit": Kind(1, EIGHT, paged=True, embeddings_wide=True),
    "sgd": Kind(0, None),
}


def kind_of(optim: str) -> Kind:
    """SettingError for an optimizer that the planner does not know."""
    if optim not in KINDS:
        raise SettingError(f"optim={optim}: `vlmr1 plan` does not know what it holds; it knows {', '.join(KINDS)}")
    return KINDS[optim]


@dataclass(frozen=True)
class Trained:
    """One trained parameter."""

    numbers: int
    itemsize: int
    embedding: bool = False

    @property
    def bytes(self) -> int:
        return self.numbers * self.itemsize


def state_bytes(optim: str, trained: Sequence[Trained]) -> int:
    """Of all states."""
    kind = kind_of(optim)

    def width(of: Trained) -> float:
        if kind.width is None:
            return of.itemsize
        return 4.0 if of.numbers < SMALL or (kind.embeddings_wide and of.embedding) else kind.width

    return round(sum(kind.states * of.numbers * width(of) for of in trained))


def step_bytes(optim: str, trained: Sequence[Trained], device: str) -> int:
    """What a step needs beside states and gradients: on a GPU the square roots of all second moments, where the
    optimizer goes over lists of tensors; else those of the largest."""
    if not kind_of(optim).temporary or not trained:
        return 0
    sizes = [of.bytes for of in trained]
    return sum(sizes) if device == "cuda" else max(sizes)
