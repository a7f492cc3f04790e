"""Chunk and consume, with GEMMs of its own: three, two with a frozen head, one without gradient.

At importance level sequence a chunk holds whole sequences; only where one is longer than a chunk, all rows are
projected twice.
"""

from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import functions
from vlmr1_kernels.native import library
from vlmr1_kernels.native.grpo_loss import Objective
from vlmr1_kernels.native.linear_logprob import gradients
from vlmr1_kernels.settings import GRPOSettings


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seq_ids: Tensor,
    rows: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    num_generations: int,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    normalizer: Tensor | None,
    softcap: float | None,
    chunk: int,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    settings: GRPOSettings,
) -> tuple[Tensor, ...]:
    hidden, weight, bias, targets = library.prepared(hidden, weight, bias, targets)
    scores, row_values = (advantages, rewards, num_generations), (old_logp, ref_logp, sampling_logp)
    objective = Objective(hidden.shape[0], seq_ids, rows, *scores, row_values, normalizer, settings)
    logp = torch.empty(hidden.shape[0])
    d_hidden, d_weight, d_bias = gradients(hidden, weight, needs_hidden, needs_weight, needs_bias)
    library.call(
        "vlmr1_linear_grpo_loss",
        byref(library.head(weight, bias, settings.temperature, softcap)),
        byref(library.hidden_rows(hidden, targets)),
        byref(objective.rows),
        byref(objective.settings),
        max(chunk, 1),
        scale,
        torch.get_num_threads(),
        *map(library.pointer, (logp, d_hidden, d_weight, d_bias)),
        byref(objective.summary),
    )
    values = objective.summary
    metrics = (values.entropy, values.kl, values.clip_low, values.clip_high, values.ratio_max)
    scalars = [torch.tensor(value, dtype=torch.float32) for value in (values.loss, *metrics)]
    return scalars[0], d_hidden, d_weight, d_bias.to(weight.dtype), logp, *scalars[1:]


linear_grpo_loss = functions.linear_grpo_loss("native", _forward, library.chunk_rows)
