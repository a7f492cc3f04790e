"""Arguments that every implementation of an op takes together."""

from typing import NamedTuple

from torch import Tensor

Needs = tuple[bool, bool, bool]  # which of the gradients of hidden, weight and bias to compute


class HeadInputs(NamedTuple):
    """Rows to project, their output head, and how it makes logits; see `linear_logprob`."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] integer
    temperature: float
    softcap: float | None


class LossInputs(NamedTuple):
    """Rows and sequences of the GRPO objective, beside the log-probs; all tensors are constants of the loss."""

    seq_ids: Tensor  # [N] integer, sorted, 0..B-1
    advantages: Tensor | None  # [B], or None with rewards
    rewards: Tensor | None  # [B], or None with advantages
    num_generations: int | None  # with rewards
    old_logp: Tensor | None  # [N]; None: on-policy
    ref_logp: Tensor | None  # [N]
    sampling_logp: Tensor | None  # [N]
    normalizer: float | Tensor | None  # None: that of this call

    @property
    def row_logps(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs [N] of the old policy, the reference and the rollout engine."""
        return self.old_logp, self.ref_logp, self.sampling_logp


class DecodeTables(NamedTuple):
    """Places of the keys and values of each group and branch; int32, on the device of the queries."""

    group_offsets: Tensor  # [P + 1] first branch of each group, then the number of branches that are not padding
    prefix_starts: Tensor  # [P] first row of each prefix
    prefix_lengths: Tensor  # [P] rows of each prefix, at least 1
    suffix_blocks: Tensor  # [B, M] block ids
    suffix_lengths: Tensor  # [B] rows of each suffix


class SamplingOptions(NamedTuple):
    """How tokens are drawn from logits; see `sample_tokens`."""

    temperature: float = 1.0
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
