"""The kernels of a decode step by `rollout.decoder.DecodeForward` on a GPU, from the shapes of the decoder's layers."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

from vlmr1.grpo.policy import PackedPolicy
from vlmr1.planner.cuda_ops import Streaming
from vlmr1.planner.dry_run import kernel
from vlmr1.rollout.decoder_weights import adapters_of, computed_together

# Linear layers that are one product, or two where they are read in place.
PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "gate_up_proj"), ("down_proj",))


def fused_step(policy: PackedPolicy, rows: int, streaming: Streaming) -> Tensor:
    """Note the kernels of a step of so many sequences; return hidden states [S, D] without data."""
    decoder = attrgetter(policy.family.decoder_path)(policy.model)
    config = decoder.config
    dtype = policy.dtype or policy.model.dtype
    wide, width = decoder.embed_tokens.weight.itemsize, config.hidden_size  # of residuals
    hidden = torch.empty(rows, width, dtype=decoder.embed_tokens.weight.dtype)
    for layer in decoder.layers:
        attention = layer.self_attn
        norms = sum(name.endswith("norm") and name.count(".") == 0 for name, _ in layer.named_modules())
        for _ in range(norms):
            kernel("add_rms_norm", 0, rows * width * (3 * wide + dtype.itemsize))
        if wide != dtype.itemsize:
            for _ in range(2):  # what products read
                kernel("_to_copy", 0, rows * width * (wide + dtype.itemsize))
        for names in PRODUCTS:
            _products(layer, names, rows, dtype)
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        q, new = (torch.empty(rows, each, 1, head_dim, dtype=dtype) for each in (heads, kv_heads))
        kernel("rope_kv_write", 0, q, q, *[new] * 4)
        streaming.read(q, new)
        kernel("swiglu", 0, 3 * dtype.itemsize * rows * config.intermediate_size)
    kernel("add_rms_norm", 0, rows * width * 4 * wide)
    return hidden


def _products(layer: nn.Module, names: tuple[str, ...], rows: int, dtype: torch.dtype) -> None:
    """Note the products of these linear layers, and two more of each adapter."""
    found = {n: adapters_of(m)[0] for n, m in layer.named_modules() if n.rpartition(".")[2] in names}
    for group in computed_together(found, dtype, stacked="gate_proj" in names):
        _product([found[name].weight for name in group], rows, dtype)
    for each in found.values():
        for a, b, _ in each.adapters:
            _product([a], rows, dtype)
            _product([b], rows, dtype)


def _product(weights: list[Tensor], rows: int, dtype: torch.dtype) -> None:
    numbers, outputs = sum(each.numel() for each in weights), sum(len(each) for each in weights)
    kernel("mm", 2 * rows * numbers, dtype.itemsize * (numbers + rows * (weights[0].shape[1] + outputs)))
