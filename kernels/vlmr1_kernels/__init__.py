"""Ops for GRPO with shared prompts. `ops.py` and `decode_ops.py` list them."""

from vlmr1_kernels.decode_ops import rope_kv_write, sample_tokens, shared_prefix_decode
from vlmr1_kernels.inputs import SamplingOptions
from vlmr1_kernels.layout import PrefixLayout
from vlmr1_kernels.ops import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    shared_prefix_attention,
    varlen_attention,
)
from vlmr1_kernels.registry import ImplementationError, use
from vlmr1_kernels.settings import GRPOSettings

__all__ = [
    "GRPOSettings",
    "ImplementationError",
    "PrefixLayout",
    "SamplingOptions",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "rope_kv_write",
    "sample_tokens",
    "shared_prefix_attention",
    "shared_prefix_decode",
    "use",
    "varlen_attention",
]
