"""Floating-point operations of a packed pass, counted from its tokens; a multiply and an add are two.

Matrix products only: projections, MLPs, attention over the pairs that a causal mask leaves, tower, merger, and the
vocabulary projection of the rows that predict completions. Forward; backward costs twice that, and what activation
checkpointing computes again is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmr1.types import Pack

FORWARD, TRAINED = 1, 3  # a pass without gradient, and one with its backward, in forwards


def pack_flops(config: Any, pack: Pack) -> float:
    """Of one forward of a Qwen2.5-VL with this configuration on this pack."""
    text, layout = config.text_config, pack.layout
    head_dim = text.hidden_size // text.num_attention_heads
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    weights = text.hidden_size * head_dim * (heads + text.num_attention_heads)
    weights += 3 * text.hidden_size * text.intermediate_size
    pairs = sum(causal(prompt) for prompt in layout.prompt_lengths)
    for prompt, branches in zip(layout.prompt_lengths, layout.branch_lengths, strict=True):
        pairs += sum(branch * prompt + causal(branch) for branch in branches)
    layer = 2 * weights * layout.total_length + 4 * head_dim * text.num_attention_heads * pairs
    head = 2 * text.hidden_size * text.vocab_size * len(pack.rows)
    grids = [image["image_grid_thw"].tolist()[0] for image in pack.images]
    return layer * text.num_hidden_layers + head + sum(image_flops(config.vision_config, *grid) for grid in grids)


def causal(length: int) -> int:
    """Pairs of a row and a row that it sees."""
    return length * (length + 1) // 2


def image_flops(vision: Any, frames: int, height: int, width: int) -> float:
    """Tower and merger on an image of height x width patches; windows in all layers but the full ones."""
    patches = frames * height * width
    hidden, merge = vision.hidden_size, vision.spatial_merge_size**2
    embed = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * hidden
    layer = 4 * hidden**2 + 3 * hidden * vision.intermediate_size
    merger = (merge * hidden) ** 2 + merge * hidden * vision.out_hidden_size
    side = vision.window_size // vision.patch_size
    windows = sum((h * w) ** 2 for h in chunks(height, side) for w in chunks(width, side)) * frames
    full = len(vision.fullatt_block_indexes)
    pairs = full * patches**2 + (vision.depth - full) * windows
    return 2 * patches * (embed + vision.depth * layer) + 4 * hidden * pairs + 2 * merger * patches / merge


def chunks(length: int, size: int) -> list[int]:
    """Lengths of consecutive pieces of at most `size`."""
    return [min(size, length - start) for start in range(0, length, size)]


def update_flops(config: Any, packs: Sequence[Pack], *, reference: bool) -> float:
    """Of an update: the reference forward where there is one, the policy's forward and backward."""
    return (TRAINED + reference * FORWARD) * sum(pack_flops(config, pack) for pack in packs)
