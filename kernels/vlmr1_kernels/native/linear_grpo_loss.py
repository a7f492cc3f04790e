"""Fused output head and GRPO loss on the native library: three GEMMs, two with a frozen head, one without gradient.

At importance level sequence a chunk consists of whole sequences. Only if a sequence exceeds a chunk are all rows
projected twice.
"""

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import HeadInputs, LossInputs, Needs
from vlmr1_kernels.native import library
from vlmr1_kernels.native.grpo_loss import Objective
from vlmr1_kernels.settings import GRPOSettings


def _forward(
    head: HeadInputs, rows: Tensor | None, inputs: LossInputs, chunks: Sequence[int], scale: float, needs: Needs,
    settings: GRPOSettings,
) -> tuple[Tensor, ...]:  # fmt: skip
    given, head = head.weight, library.prepare_inputs(head)
    objective = Objective(head.hidden.shape[0], inputs, rows, settings)
    logp = torch.empty(head.hidden.shape[0])
    d_hidden, d_weight, d_bias = custom_ops.gradients_like(head.hidden, given, needs)
    d_bias = d_bias.float()  # in which the library sums it
    structures = library.head(head), library.hidden_rows(head), objective.rows, objective.settings
    library.call(
        "vlmr1_linear_grpo_loss", *map(byref, structures), chunks[0], scale, torch.get_num_threads(),
        library.DTYPES[given.dtype], *map(library.pointer, (logp, d_hidden, d_weight, d_bias)),
        byref(objective.summary),
    )  # fmt: skip
    values = objective.summary
    metrics = (values.entropy, values.kl, values.clip_low, values.clip_high, values.ratio_max)
    scalars = [torch.tensor(value, dtype=torch.float32) for value in (values.loss, *metrics)]
    return scalars[0], d_hidden, d_weight, d_bias.to(head.hidden.dtype), logp, *scalars[1:]


linear_grpo_loss = custom_ops.linear_grpo_loss("native", _forward, library.chunk_rows)
