"""Runs of placeholders in a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """[L] bool -> the (start, end) of each run of true values."""
    edges = torch.diff(pad(mask.int(), (1, 1)))
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
