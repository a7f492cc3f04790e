"""The GRPO objective on given log-probs, with its derivative."""

from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import functions
from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.native import library
from vlmr1_kernels.settings import GRPOSettings


class Objective:
    """The per-row side of a call as the library reads it; holds the memory that its structures point to."""

    def __init__(
        self,
        count: int,
        seq_ids: Tensor,
        selected: Tensor | None,
        advantages: Tensor | None,
        rewards: Tensor | None,
        num_generations: int,
        row_values: tuple[Tensor | None, Tensor | None, Tensor | None],
        normalizer: Tensor | None,
        settings: GRPOSettings,
    ) -> None:
        ids = library.integers(seq_ids)
        chosen = None if selected is None else library.integers(selected)
        given, made, old, ref, sampling = self.doubles = library.doubles(advantages, rewards, *row_values)
        self.integers = ids, chosen
        scores = given if given is not None else made
        assert scores is not None
        self.rows = library.ObjectiveRows(
            ids.numel(),
            count,
            scores.numel(),
            num_generations,
            *map(library.pointer, (ids, chosen, given, made, old, ref, sampling)),
            0.0 if normalizer is None else float(normalizer),
        )
        self.settings = library.settings(settings)
        self.summary = library.Summary()


def _forward(
    logp: Tensor,
    seq_ids: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    num_generations: int,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    normalizer: Tensor | None,
    settings: GRPOSettings,
) -> tuple[Tensor, ...]:
    row_values = (old_logp, ref_logp, sampling_logp)
    scores = (advantages, rewards, num_generations)
    objective = Objective(logp.numel(), seq_ids, None, *scores, row_values, normalizer, settings)
    (wide,) = library.doubles(logp)
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


grpo_loss = functions.grpo_loss("native", _forward)
