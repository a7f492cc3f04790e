"""The GRPO objective on given log-probs."""

from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.reference.group_advantages import given_or_grouped
from vlmr1_kernels.reference.objective import make_rows, summarize
from vlmr1_kernels.settings import GRPOSettings


def grpo_loss(
    logp: Tensor,
    seq_ids: Tensor,
    advantages: Tensor | None,
    *,
    rewards: Tensor | None,
    num_generations: int | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    settings: GRPOSettings,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = accumulation_dtype(logp.dtype)
    advantages = given_or_grouped(advantages, rewards, num_generations)
    rows = make_rows(seq_ids, advantages, old_logp, ref_logp, sampling_logp, settings, normalizer, dtype)
    return summarize(logp.to(dtype), rows, settings)
