"""Attention of vision towers over images and windows, registered with transformers; no model is patched.

Towers with `cu_seqlens` (Qwen-VL, GLM-V) loop over images and windows, unless the name of their attention contains
"flash". Then they pass all rows and offsets in one call, as `varlen_attention` needs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from vlmr1.errors import SettingError
from vlmr1.models.attention import attending_by
from vlmr1_kernels import varlen_attention

NAME = "vlmr1_varlen_as_flash"


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """q, k, v [1, H, L, Dh] -> [1, L, H, Dh]; `max_length_q` comes from the tower, once a pass."""
    if dropout:
        raise SettingError(f"vision tower: its attention dropout ({dropout}) is not supported; set it to 0")
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in float32
    out = varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _forward)


def varlen_tower(tower: nn.Module) -> AbstractContextManager[None]:
    """Use `varlen_attention` in the tower within the block; a backward pass that recomputes layers must run inside."""
    return attending_by(NAME, tower)
