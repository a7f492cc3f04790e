"""Attention of packed and decoding passes, registered with transformers; no model is patched.

Each pass gives its branch layout or decode state to every decoder layer as the keyword argument `shared` of the model's
forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vlmr1.errors import SettingError
from vlmr1_kernels import PrefixLayout, shared_prefix_attention

NAME = "vlmr1_shared_prefix"


class SharedAttention(Protocol):
    """The attention of a pass at one decoder layer, from that layer's queries, keys and values."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """q [b, H, l, Dh], k and v [b, Hkv, l, Dh] -> [b, H, l, Dh]."""
        ...


@dataclass
class PackedAttention:
    """A packed row: prompts are causal, each branch attends to its prompt and its own past."""

    layout: PrefixLayout

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return shared_prefix_attention(q, k, v, self.layout, scale=scale)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared: SharedAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if sliding_window is not None or softcap is not None:
        raise SettingError("share_prompt: this model's attention has a sliding window or a softcap; set it to false")
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast RoPE leaves them in float32
    return shared.attend(layer, query, key, value, scaling).transpose(1, 2), None


# It has no entry in AttentionMaskInterface: the library then builds no mask, and does not search the positions for
# packed sequences, which would wait for the device.
AttentionInterface.register(NAME, _forward)


@contextmanager
def attending_by(name: str, module: nn.Module) -> Iterator[None]:
    """Use the attention function of this name for the module, and all that shares its config, within the block."""
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def shared_attention(decoder: nn.Module) -> AbstractContextManager[None]:
    """Use the registered function for the decoder's layers within the block; the vision tower keeps its own."""
    return attending_by(NAME, decoder)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`; disabled for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
