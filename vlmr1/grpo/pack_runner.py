"""Passes over packs under a token budget: smaller packs where memory runs out, as many passes on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmr1.distributed.sharded import require_input_grads, summon_full_params
from vlmr1.errors import MemoryShort
from vlmr1.grpo import packing
from vlmr1.grpo.pack_budget import PackBudget, PackTooLarge, catch_oom, free_memory
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import autocast
from vlmr1.models.features import encode, unique_images
from vlmr1.training.parallel import Parallel
from vlmr1.types import Group, Pack

T = TypeVar("T")


class PackRunner:
    """Runs functions over the packs of groups. It alone knows the token budget, out-of-memory, equal numbers of passes
    over ranks, the dummy image, and when gradients are synchronized."""

    def __init__(self, policy: PackedPolicy, args: Any, parallel: Parallel, dummy_image: Any = None):
        """`dummy_image`: reference and inputs of an image that passes without one encode too, where every rank has to
        call the tower."""
        self.policy = policy
        self.args = args
        self.parallel = parallel
        self.dummy_image = dummy_image
        self.budget = PackBudget(args.tokens_per_pack)
        self.counts: dict[str, float] = {}  # metrics of the last packs of an update
        if dummy_image is not None and parallel.sharding is not None:
            require_input_grads(attrgetter(policy.family.decoder_path)(policy.model))

    # Groups -> packs

    def with_signal(self, groups: Sequence[Group]) -> list[Group]:
        """The completions that contribute to the loss."""
        skip, mask = self.args.skips_zero_advantage, self.args.mask_truncated_completions
        return packing.with_signal(groups, skip_zero_advantage=skip, mask_truncated=mask)

    def tokens_of(self, group: Group) -> int:
        """Tokens that an update computes of a group."""
        return sum(map(packing.tokens_of, self.with_signal([group])))

    def packs(self, groups: Sequence[Group]) -> list[Pack]:
        """The packs of an update on these groups, as many on every rank and at least one."""
        plan = self._plan(self.with_signal(groups))
        packs = self.make_packs(plan, pad=groups, at_least=1)
        self.counts = {
            "packs": float(len(packs)),
            "packed_tokens": float(sum(len(pack.input_ids) for pack in packs)),
            "repeated_prompt_tokens": float(packing.repeated_prompt_tokens(plan)),
            "tokens_per_pack": float(self.budget.tokens),
        }
        return packs

    def make_packs(
        self, plan: Sequence[Sequence[Group]], *, pad: Sequence[Group] | None = None, at_least: int = 0
    ) -> list[Pack]:
        """The packs of a plan; with `pad`, zero-weight dummy packs of one of these groups are appended so that all
        ranks run the same number of passes: engines count on it, and on every pass calling the same modules."""
        packs = [packing.make_pack(row, share_vision=self.args.share_vision) for row in plan]
        if pad is None:
            return packs
        missing = self.parallel.ranks.all_reduce_max(max(len(packs), at_least)) - len(packs)
        if missing:
            packs += [packing.dummy_pack(pad)] * missing
        image = self.dummy_image
        return packs if image is None else [packing.with_dummy_image(pack, *image) for pack in packs]

    def _plan(self, groups: Sequence[Group]) -> list[list[Group]]:
        switches = {"share_prompt": self.args.share_prompt, "pack": self.args.pack}
        return packing.plan_packs(groups, tokens_per_pack=self.budget.tokens, limit=self.budget.limit, **switches)

    # Passes

    def map(self, groups: Sequence[Group], fn: Callable[[Pack], Tensor], *, into: str, every: bool = False) -> None:
        """Run `fn` without gradient over packs of the completions that lack the fact `into`, and store its values [N]
        on them, as views. It sees the completions that contribute to the loss, or with `every` all of them.

        Where every rank has all weights, passes over `every` completion need not be as many on each rank. DDP sends
        its buffers in the first pass only, and each rank has a first one."""
        # If no completion contributes, the one of the dummy pack gets the fact.
        seen = groups if every else self.with_signal(groups) or [packing.first_completion(groups)]
        lacking = packing.select(seen, lambda completion, _: getattr(completion, into) is None)
        pad = None if every and self.parallel.sharding is None else groups

        def run() -> list[tuple[Pack, Tensor]]:
            packs = self.make_packs(self._plan(lacking), pad=pad)
            return [(pack, catch_oom(pack, fn)) for pack in packs]

        for pack, values in self.retry_smaller(run):
            for completion, piece in zip(pack.completions, pack.split(values), strict=True):
                if getattr(completion, into) is None:  # a dummy pack's completion may have it from its own pack
                    setattr(completion, into, piece)

    def run(self, groups: Sequence[Group], fn: Callable[[Pack], T], *, pad: Sequence[Group]) -> list[T]:
        """Run `fn` over packs of the groups, in as many passes on every rank; the further ones are dummies of `pad`.
        Returns what `fn` returned, dummies included."""
        return self.retry_smaller(
            lambda: [catch_oom(pack, fn) for pack in self.make_packs(self._plan(groups), pad=pad, at_least=0)]
        )

    def backward(self, model: Any, groups: Sequence[Group], fn: Callable[[Pack], T]) -> list[T]:
        """Run `fn`, which makes a backward pass, over the packs of an update; gradients add up. Where memory runs out,
        they are dropped, and all passes are made again in smaller packs. Returns what `fn` returned, pack by pack."""

        def run() -> list[T]:
            packs, done = self.packs(groups), []
            try:
                for i, pack in enumerate(packs):
                    with self._syncing(model, last=i == len(packs) - 1):
                        done.append(catch_oom(pack, fn))
            except PackTooLarge:
                model.zero_grad(set_to_none=True)
                raise
            return done

        results = self.retry_smaller(run)
        if self.dummy_image is None and any(group.prompt.images for group in groups):
            self.policy.family.fill_vision_gradients(self.policy.model)  # of what was computed, all may be text
        return results

    def retry_smaller(self, run: Callable[[], T]) -> T:
        """run(), again with a smaller budget each time that memory runs out in one of its packs."""
        while True:
            try:
                return run()
            except PackTooLarge as error:
                if self.parallel.in_lockstep:  # the other ranks would not make the passes again
                    raise MemoryShort(f"out of memory in a pass: lower tokens_per_pack ({error})") from error
                self.budget.shrink(error)
                free_memory()

    @contextmanager
    def _syncing(self, model: Any, *, last: bool) -> Iterator[None]:
        """Encloses a pass: the ranks add up their gradients in the last one of an update, with FSDP in each, where
        gradients stay in shards. DeepSpeed updates in the backward that is the last."""
        accelerator = self.parallel.accelerator
        accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last or self.parallel.has_engine else accelerator.no_sync(model):
            yield

    def encode_ahead(self, model: Any, groups: Sequence[Group]) -> None:
        """Cache the features of these groups' images where the tower is frozen and sharded: ranks whose packs have
        other images would call it at other times."""
        features, sharding = self.policy.features, self.parallel.sharding
        if features is None or sharding is None:
            return
        images, refs, _ = unique_images([group.prompt for group in groups])
        if not self.parallel.ranks.all_reduce_max(sum(ref not in features.kept for ref in refs)):
            return
        precision = autocast(self.args.device, self.policy.dtype)  # as in a rollout
        with summon_full_params(model, sharding), precision, torch.no_grad():
            encode(self.policy.family, self.policy.model, refs, images, features)
