"""The passes of a step: groups -> packs under the token budget -> log-probs; smaller packs where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vlmr1.distributed.sharded import whole
from vlmr1.errors import MemoryShort
from vlmr1.grpo.buffer import Part
from vlmr1.grpo.pack_budget import PackTooLarge, carried_over, free_memory, guarded
from vlmr1.grpo.packing import (
    make_pack,
    plan_packs,
    repeated_prompt_tokens,
    with_image,
    with_signal,
    without_weight,
)
from vlmr1.grpo.policy import PackedPolicy, call
from vlmr1.grpo.reference import Reference
from vlmr1.models.attention import autocast
from vlmr1.models.features import FeatureCache, encode, unique_images
from vlmr1.telemetry.phases import Phases
from vlmr1.training.hf_trainer import BaseTrainer
from vlmr1.types import Group, Pack

T = TypeVar("T")


class PassesTrainer(BaseTrainer):
    """What rollouts and updates are computed in."""

    family: Any
    engine: Any
    policy: PackedPolicy
    reference: Reference | None
    features: FeatureCache | None
    blank: Any

    def with_signal(self, groups: Sequence[Group]) -> list[Group]:
        """What of the groups has a part in the loss."""
        skip, mask = self.args.skips_zero_advantage, self.args.mask_truncated_completions
        return with_signal(groups, skip_zero_advantage=skip, mask_truncated=mask)

    def pack(self, groups: Sequence[Group]) -> tuple[list[Pack], dict[str, float]]:
        """Groups -> packed rows under the token budget, as many on every rank, and what they count."""
        plan = self._plan(self.with_signal(groups))
        packs = self.made(plan, groups)
        return packs, {
            "packs": float(len(packs)),
            "packed_tokens": float(sum(len(pack.input_ids) for pack in packs)),
            "repeated_prompt_tokens": float(repeated_prompt_tokens(plan)),
            "tokens_per_pack": float(self.budget.tokens),
        }

    def made(self, plan: Sequence[Sequence[Group]], groups: Sequence[Group]) -> list[Pack]:
        """The packs of a plan, and passes of no weight over one of the groups behind them: engines need as many
        passes on every rank, each of which calls the same modules."""
        packs = self.made_alone(plan)
        packs += [without_weight(groups)] * (self.ranks.all_reduce_max(max(len(packs), 1)) - len(packs))
        return packs if self.blank is None else [with_image(pack, *self.blank) for pack in packs]

    def made_alone(self, plan: Sequence[Sequence[Group]]) -> list[Pack]:
        """The packs of a plan and no more: for passes without gradient where each rank has all weights, which need not
        be as many on every rank. DDP sends its buffers in the first one only, and each rank has a first one."""
        return [make_pack(row, share_vision=self.args.share_vision) for row in plan]

    def _plan(self, groups: Sequence[Group]) -> list[list[Group]]:
        switches = {"share_prompt": self.args.share_prompt, "pack": self.args.pack}
        return plan_packs(groups, tokens_per_pack=self.budget.tokens, limit=self.budget.limit, **switches)

    def with_logprobs(self, model: Any, packs: Sequence[Pack], phases: Phases) -> list[Pack]:
        """The packs with the log-probs of reference and old policy."""
        with phases("reference"), nullcontext() if self.reference is None else self.reference.ready():
            packs = [guarded(pack, self.with_reference) for pack in packs]
        with phases("old"):
            return [guarded(pack, lambda pack: self.with_old(model, pack)) for pack in packs]

    def with_reference(self, pack: Pack) -> Pack:
        """The pack with the reference model's log-probs, where the objective needs them."""
        if self.reference is None:
            return pack
        return replace(pack, ref_logp=self.reference.logprobs(pack))

    def with_old(self, model: Any, pack: Pack) -> Pack:
        """The pack with the log-probs of the policy that drew it: the engine's, or the policy's own."""
        if self.args.old_logprobs == "rollout":
            return pack
        needed = self.args.kl_in_reward or self.args.importance_sampling_correction != "none"
        if self.args.steps_per_generation * self.args.num_iterations == 1 and not needed:
            return replace(pack, old_logp=None)  # the update's own forward computes them
        model.eval()
        with self.policy.attention():
            return replace(pack, old_logp=call(model, self.policy.model, lambda: self.policy.logprobs(pack)))

    def with_passes(self, part: Part, run: Callable[[Pack], Pack]) -> Part:
        """The part with what `run` adds to each of its packs."""
        part, packs = self.fitting(part, lambda packs: [guarded(pack, run) for pack in packs])
        return replace(part, packs=packs)

    def fitting(self, part: Part, run: Callable[[list[Pack]], T]) -> tuple[Part, T]:
        """`run` over the packs of a part; where memory runs out in one, over all of them again, cut smaller. Returns
        the part as it was packed in the end, and what `run` returned."""
        while True:
            try:
                return part, run(part.packs)
            except PackTooLarge as error:
                self.shrink(error)
            part = self.packed_anew(part)

    def shrink(self, error: PackTooLarge) -> None:
        """Smaller packs from now on."""
        if self.joins_tower:  # the others would not make the passes again
            raise MemoryShort(f"out of memory in a pass: lower tokens_per_pack ({error})") from error
        self.budget.shrink(error)
        free_memory()

    def packed_anew(self, part: Part) -> Part:
        """The part in packs of the present budget, with the log-probs that it has."""
        packs, counts = self.pack(part.groups)
        return replace(part, packs=carried_over(packs, part.packs), counts=part.counts | counts)

    def encode_ahead(self, groups: Sequence[Group]) -> None:
        """The features of these groups, where the passes of several ranks would not meet in a sharded tower."""
        if self.features is None or self.sharding is None:
            return
        images, refs, _ = unique_images([group.prompt for group in groups])
        if not self.ranks.all_reduce_max(sum(ref not in self.features.kept for ref in refs)):
            return
        precision = autocast(self.args.device, self.policy.dtype)  # as in a rollout
        with whole(self.model, self.sharding), precision, torch.no_grad():
            encode(self.family, self.engine.model, refs, images, self.features)
