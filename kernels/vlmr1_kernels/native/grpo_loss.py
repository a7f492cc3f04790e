"""The GRPO loss of given log-probs and its gradient."""

from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.native import library
from vlmr1_kernels.settings import GRPOSettings


class Objective:
    """C structures of a loss over `count` rows; keeps the tensors that their pointers refer to alive.

    `selected` [count] are the rows to use, None: all."""

    def __init__(self, count: int, inputs: LossInputs, selected: Tensor | None, settings: GRPOSettings) -> None:
        ids = library.to_int64(inputs.seq_ids)
        chosen = None if selected is None else library.to_int64(selected)
        doubles = library.to_double(inputs.advantages, inputs.rewards, *inputs.row_logps)
        scores = doubles[1] if doubles[0] is None else doubles[0]
        assert scores is not None
        self.tensors = (ids, chosen, *doubles)
        self.rows = library.ObjectiveRows(
            ids.numel(),
            count,
            scores.numel(),
            inputs.num_generations,
            *map(library.pointer, self.tensors),
            0.0 if inputs.normalizer is None else float(inputs.normalizer),
        )
        self.settings = library.settings(settings)
        self.summary = library.Summary()


def _forward(logp: Tensor, inputs: LossInputs, settings: GRPOSettings) -> tuple[Tensor, ...]:
    objective = Objective(logp.numel(), inputs, None, settings)
    (wide,) = library.to_double(logp)
    assert wide is not None
    d_logp = torch.empty_like(wide)
    structures = byref(objective.rows), byref(objective.settings)
    library.call("vlmr1_grpo_loss", *structures, wide.data_ptr(), d_logp.data_ptr(), byref(objective.summary))
    values = objective.summary
    dtype = accumulation_dtype(logp.dtype)
    metrics = (values.kl, values.clip_low, values.clip_high, values.ratio_max)
    return (
        torch.tensor(values.loss, dtype=dtype),
        d_logp.to(dtype, copy=True),
        *(torch.tensor(m, dtype=dtype) for m in metrics),
    )


grpo_loss = custom_ops.grpo_loss("native", _forward)
