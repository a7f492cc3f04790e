"""The dataclasses that the parts of the trainer hand to each other.

Shapes: P prompts, G generations a prompt, B = P*G sequences, N completion rows, L packed tokens,
L_p tokens of one prompt, C tokens of one completion, K rows of positions, D hidden, V vocabulary, R reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlmr1.data.images import ImageRef
    from vlmr1.models.family import ImageInputs
    from vlmr1_kernels import PrefixLayout


@dataclass(frozen=True)
class Sample:
    """One row of data. `source` is "file:line", for messages; `index` its place in the data set."""

    messages: list[dict[str, Any]]  # chat messages; image parts are {"type": "image"}
    images: tuple[ImageRef, ...]  # files, or the bytes of one
    solution: str
    source: str
    index: int
    columns: dict[str, Any] = field(default_factory=dict)  # everything else the row held


@dataclass(frozen=True)
class Prompt:
    """One tokenized Sample; each of its images is held once."""

    sample: Sample
    input_ids: Tensor  # [L_p] int64
    positions: Tensor  # [K, L_p] int64; K is 3 with M-RoPE (time, height, width; equal rows for text), else 1
    images: tuple[ImageInputs, ...] = ()  # what the processor made of each of the sample's images

    @property
    def next_position(self) -> int:
        """Position of the first completion token: max(positions) + 1."""
        return int(self.positions.max()) + 1


PER_TOKEN = ("token_ids", "logp", "sampling_logp", "old_logp", "ref_logp", "importance_denominator")


@dataclass(eq=False)
class Completion:
    """One branch of a group, and every per-token fact that the trainer knows of it. Facts are added as passes compute
    them; those of reference and policy are views of a device tensor. `sampling_logp` is of the distribution that the
    tokens were drawn from (truncated, penalized), all others of the full distribution at the temperature."""

    token_ids: Tensor  # [C] int64, the end token included when there is one
    logp: Tensor | None  # [C] float32 of the rollout engine
    sampling_logp: Tensor | None  # [C] float32
    text: str
    finish_reason: str  # "stop" | "length"
    old_logp: Tensor | None = None  # [C] float32 of the ratio's denominator; None: of the update's own forward
    ref_logp: Tensor | None = None  # [C] float32 of the reference model
    importance_denominator: Tensor | None = None  # [C] float32: the weight is min(exp(old_logp - this), cap)

    def on_host(self) -> Completion:
        """A copy whose tensors are in host memory and have storage of their own, for checkpoints and other ranks."""
        facts = {name: getattr(self, name) for name in PER_TOKEN}
        copies: dict[str, Any] = {name: value.cpu().clone() for name, value in facts.items() if value is not None}
        return replace(self, **copies)


@dataclass(frozen=True)
class Group:
    """One Prompt and its G Completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: Tensor | None = None  # [G, R] float32
    advantages: Tensor | None = None  # [G] float32
    kl: Tensor | None = None  # [G] float32, summed over the completion, where it is in the reward


@dataclass(frozen=True)
class Pack:
    """View of several Groups as one row: prompts first, then branches. It can be made again at any time, and holds
    nothing that its groups do not."""

    input_ids: Tensor  # [L] int64
    positions: Tensor  # [K, L] int64
    layout: PrefixLayout  # which tokens are whose prefix
    images: tuple[ImageInputs, ...]  # the images to encode, each once
    image_refs: tuple[ImageRef, ...]  # where each is from
    image_ids: tuple[int, ...]  # which of them stands at each placeholder run, in order
    rows: Tensor  # [N] int64: the rows whose hidden states predict completion tokens
    targets: Tensor  # [N] int64
    seq_ids: Tensor  # [N] int64, 0..B-1, sorted
    advantages: Tensor | None  # [B] float32; None before they are known
    old_logp: Tensor | None = None  # [N] float32; this and the next three as in Completion, None where one lacks it
    ref_logp: Tensor | None = None  # [N] float32
    rollout_logp: Tensor | None = None  # [N] float32: `logp` of the completions
    importance_denominator: Tensor | None = None  # [N] float32
    weight: float = 1.0  # of its loss; 0: a dummy pack
    groups: tuple[Group, ...] = ()  # what it is a view of

    @property
    def completions(self) -> list[Completion]:
        """The B completions, in order."""
        return [completion for group in self.groups for completion in group.completions]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """[N] -> B views [C], one a completion."""
        return values.split([len(completion.token_ids) for completion in self.completions])


@dataclass(frozen=True)
class StepMetrics:
    """Everything one update reports: means over the step, seconds and peak memory by phase."""

    values: dict[str, float]
    seconds: dict[str, float]  # by phase: rollout, reward, reference, old, forward, backward, update
    memory: dict[str, float] = field(default_factory=dict)  # MiB by phase, where it is measured
