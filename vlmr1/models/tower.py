"""Vision towers: attention over images and windows, patch embeddings as matrix products, and inputs made on the host.

Towers with `cu_seqlens` (Qwen-VL, GLM-V) loop over images and windows, unless the name of their attention contains
"flash". Then they pass all rows and offsets in one call, as `varlen_attention` needs. No model is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, vision_utils

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


def grid_inputs(tower: Any, grids: Tensor) -> dict[str, Any]:
    """Positions, offsets and windows of images with `grids` [images, 3], which a tower would read from its device.

    From grids in host memory nothing waits for the device."""
    size = tower.config.spatial_merge_size
    offsets = vision_utils.get_vision_cu_seqlens(grids)
    found: dict[str, Any] = {"position_ids": vision_utils.get_vision_position_ids(grids, size), "cu_seqlens": offsets}
    found["max_seqlen"] = int(offsets.diff().max())
    if hasattr(tower, "window_size"):
        index, offsets = vision_utils.get_vision_window_index(grids, size, tower.window_size, tower.patch_size)
        found |= {"window_index": index, "cu_window_seqlens": offsets, "max_window_seqlen": int(offsets.diff().max())}
    if hasattr(tower, "interpolation_mode"):
        found["interp_indices"], found["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=size,
        )
    return found


@contextmanager
def patches_by_matmul(tower: nn.Module) -> Iterator[None]:
    """In this block the tower's convolutions over patches are matrix products: their kernel is their stride.

    Some builds of cuDNN are orders of magnitude slower with such kernels. Not on a CPU, whose results are recorded."""
    found = [each for each in tower.modules() if isinstance(each, nn.Conv2d | nn.Conv3d) and _is_of_patches(each)]
    for conv in found:
        conv.forward = _as_matmul(conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in found:
            del conv.forward


def _is_of_patches(conv: Any) -> bool:
    plain = conv.groups == 1 and conv.padding in ("valid", (0,) * len(conv.kernel_size)) and set(conv.dilation) == {1}
    return plain and conv.kernel_size == conv.stride and conv.weight.device.type != "cpu"


def _as_matmul(conv: Any) -> Callable[[Tensor], Tensor]:
    kernel = conv.kernel_size

    def forward(pixels: Tensor) -> Tensor:
        """[B, C, H, W] or [B, C, T, H, W] -> [B, D, ...] with a place for each patch."""
        places = [size // each for size, each in zip(pixels.shape[2:], kernel, strict=True)]
        for dim in reversed(range(len(kernel))):
            pixels = pixels.narrow(2 + dim, 0, places[dim] * kernel[dim]).unflatten(2 + dim, (places[dim], kernel[dim]))
        n = len(kernel)  # [B, C, places and kernels in turn] -> [B, places, C, kernels]
        pixels = pixels.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
        return F.linear(pixels.flatten(1 + n), conv.weight.flatten(1), conv.bias).movedim(-1, 1)

    return forward
