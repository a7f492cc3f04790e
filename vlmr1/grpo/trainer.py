"""The loop, read aloud: rollout -> reward -> advantage -> pack -> reference -> policy -> update.

One `training_step` is one optimizer update. Optimizers, schedulers, checkpoints, resume and callbacks are those of
`transformers.Trainer`; what is around the step is in `base_trainer.py`, the passes in `passes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmr1.config import GRPOConfig
from vlmr1.data.loader import unpacked
from vlmr1.data.prompts import PromptBuilder, PromptDataset, without_overlong
from vlmr1.distributed.balance import exchange
from vlmr1.distributed.metrics import all_losses, over_ranks
from vlmr1.distributed.sharded import meet_in_backward, whole
from vlmr1.errors import SettingError
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.buffer import Buffer, Part
from vlmr1.grpo.dynamic_sampling import Reserve, resample
from vlmr1.grpo.group_metrics import group_statistics
from vlmr1.grpo.importance_sampling import with_correction
from vlmr1.grpo.kl_penalty import unjudged, with_kl
from vlmr1.grpo.loss import Objective, logp_difference, normalizer
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.pack_budget import PackTooLarge, guarded
from vlmr1.grpo.pack_runner import PassesTrainer
from vlmr1.grpo.packing import tokens_of
from vlmr1.grpo.policy import PackedPolicy, call
from vlmr1.grpo.reference import SyncReference, make_reference
from vlmr1.models import check_dropout, family_of
from vlmr1.models.features import FeatureCache
from vlmr1.models.lora import merged
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import apply_liger, choose_trained
from vlmr1.rewards.failures import unreadable
from vlmr1.rewards.groups import TimedOut, score_groups
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.rollout import ENGINES
from vlmr1.telemetry.phases import Phases
from vlmr1.types import Group, Pack, Prompt, Sample, StepMetrics
from vlmr1_kernels import use


class GRPOTrainer(PassesTrainer):
    """GRPO on a vision-language model; each group's image and prompt are computed once."""

    def __init__(
        self,
        model: Any,
        args: GRPOConfig,
        samples: Sequence[Sample],
        processor: Any,
        reward_funcs: Sequence[str | Reward | Callable] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        args.check_device()
        self.family = family_of(model)
        if args.share_prompt or args.pack:
            check_dropout(model.config)
        self.processor = processor
        settings = args.rewards().with_boxes(args.box_coordinates, model.config.model_type, processor.image_processor)
        self.rewards = [get_reward(reward, settings) for reward in (reward_funcs or args.reward_funcs)]
        self.timed_out: list[TimedOut] = []  # of the last generation
        self.reward_pool = RewardPool(args.reward_workers, args.reward_timeout) if args.reward_workers else None
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise SettingError(f"reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} rewards")
        self.settings = args.objective()
        self.dtype = torch.bfloat16 if args.bf16 else None
        if args.use_liger_kernel:
            args.liger_kernel_config = apply_liger(model)
        trained = choose_trained(model, self.family, ParameterSettings.of(args))
        if args.overlong_prompts == "filter" and args.max_prompt_length is not None:
            samples = without_overlong(samples, PromptBuilder(model, self.family, processor), args.max_prompt_length)
        builder = PromptBuilder(model, self.family, processor, max_prompt_length=args.max_prompt_length)
        dataset = PromptDataset(samples, builder)
        super().__init__(
            model=trained,
            args=args,
            train_dataset=dataset,
            processing_class=processor.tokenizer,
            callbacks=list(callbacks),
        )
        frozen = not any(parameter.requires_grad for parameter in self.family.vision_parameters(model))
        self.features = FeatureCache() if frozen and args.share_vision else None
        self.blank = builder.blank() if self.joins_tower and self.features is None else None
        if self.blank is not None and self.sharding is not None:
            meet_in_backward(attrgetter(self.family.decoder_path)(model))
        self.engine = ENGINES[args.rollout_engine](
            model,
            self.family,
            processor.tokenizer,
            dtype=self.dtype,
            features=self.features,
            kv_mib=args.rollout_kv_mib,
            cuda_graphs=args.cuda_graphs,
        )
        self.sampling = args.sampling()
        self.policy = self._forward_of(model)
        self.reference = None
        if args.beta > 0:
            source = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
            options = {"accelerator": self.accelerator, "sharding": self.sharding, "source": source}
            self.reference = make_reference(args.reference, self._forward_of(model), trained, **options)
        if args.sync_ref_model and self.reference is not None:
            self.kept.append(self.reference)
            self.add_callback(SyncReference(self.reference))
        self.reserve = None
        if args.dynamic_sampling:
            seed = args.seed if args.data_seed is None else args.data_seed
            self.reserve = Reserve(dataset.indices(), seed)
            self.kept.append(self.reserve)
        self.resampling: dict[str, float] = {}  # what the last generation took
        self.buffer = Buffer(args.num_iterations)
        self.last_groups: list[Group] = []

    def _forward_of(self, model: Any) -> PackedPolicy:
        kind = PackedPolicy if self.args.share_prompt or self.args.pack else NaivePolicy
        options = {"temperature": self.args.temperature, "dtype": self.dtype, "features": self.features}
        return kind(model, self.family, **options)

    # The step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One update's gradients from a list of Prompts; returns the loss."""
        self.begin_update()
        with use(self.args.kernels):
            loss = self._step(model, unpacked(inputs))
        self.phases.start("update")  # until the optimizer has made its step
        return loss

    def _step(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        drawn = self.buffer.spent  # else the buffer serves this update too
        if drawn:
            self.buffer.fill(self.generation(model, prompts, self.phases))
        part = self.buffer.take()
        if self.budget.limit is not None:  # memory ran out, perhaps since this was packed
            part = self.packed_anew(part)
        part, (loss, values) = self.fitting(part, lambda packs: self.backward(model, packs, part.groups))
        own = group_statistics(part.groups, [reward.name for reward in self.rewards], self.reward_weights)
        own |= part.counts | unreadable(part.groups, self.rewards)
        if drawn:
            own |= self.engine.stats.values() | {"reward_timeouts": float(len(self.timed_out))} | self.resampling
        values |= over_ranks(own, len(part.groups), self.ranks)
        if drawn:
            self.check_logp(values)
        else:  # the policy is not the one that drew these any more
            values = {name: value for name, value in values.items() if "logp_difference" not in name}
        if self.buffer.spent and self.features is not None:
            self.features.clear()
        self.unlogged.append(StepMetrics(values, self.phases.seconds, self.phases.memory))
        self.last_groups = part.groups
        self.last_loss = float(loss)
        return loss

    def generation(self, model: Any, prompts: Sequence[Prompt], phases: Phases) -> list[Part]:
        """Everything that is done before the first update: completions, rewards, advantages, packs, and the log-probs
        of reference and old policy."""
        with phases("rollout"):
            groups = self.rollout(prompts)
        self.timed_out = []
        groups = self.scored(groups, phases)
        if self.reserve is not None:
            groups = self.resampled(groups, self.reserve, phases)
        if self.args.kl_in_reward:
            groups = self.with_kl(model, groups, phases)
        weights, scale = self.reward_weights, self.args.scale_rewards
        groups = with_advantages(groups, weights, scale, self.ranks, kl_weight=self.args.beta)
        self.timed_out = self.ranks.all_gather_list(self.timed_out)  # groups may go to other ranks
        parts = []
        for of_part in self.shared_out(groups):
            part = Part(of_part, *self.pack(of_part))
            if not self.args.kl_in_reward:  # else the completions have brought them
                with phases("reference"), nullcontext() if self.reference is None else self.reference.ready():
                    part = self.with_passes(part, self.with_reference)
                with phases("old"):
                    part = self.with_passes(part, lambda pack: self.with_old(model, pack))
            mode, cap = self.args.importance_sampling_correction, self.args.importance_sampling_cap
            packs, ratios = with_correction(part.packs, mode, cap)
            parts.append(replace(part, packs=packs, counts=part.counts | ratios))
        return parts

    def rollout(self, prompts: Sequence[Prompt], number: int = 0) -> list[Group]:
        """Prompts -> groups of completions, drawn from the present policy; `number` of the round varies the draws."""
        step = self.state.global_step + (number << 32)
        merging = merged(self.accelerator.unwrap_model(self.model)) if self.args.lora_merge_rollout else nullcontext()
        with whole(self.model, self.sharding), merging:
            if not prompts:  # other ranks have some, and gathered the weights with this one
                return []
            return self.engine.generate(prompts, self.args.num_generations, self.sampling, step=step)

    def scored(self, groups: Sequence[Group], phases: Phases) -> list[Group]:
        with phases("reward"):
            return score_groups(groups, self.rewards, pool=self.reward_pool, timed_out=self.timed_out)

    def resampled(self, groups: Sequence[Group], reserve: Reserve, phases: Phases) -> list[Group]:
        """The groups after further rounds for those without signal; rollout statistics are of all rounds."""
        dataset: Any = self.train_dataset

        def draw(rows: Sequence[int], number: int) -> list[Group]:
            before = self.engine.stats
            with phases("rollout"):
                drawn = self.rollout([dataset[row] for row in rows], number)
            if not drawn:
                return []
            self.engine.stats = before + self.engine.stats
            return self.scored(drawn, phases)

        options = {
            "rounds": self.args.dynamic_sampling_max_rounds,
            "rank": self.ranks.rank,
            "gather": self.ranks.all_gather_list,
        }
        groups, self.resampling = resample(groups, draw, reserve, self.reward_weights, **options)
        return groups

    def with_kl(self, model: Any, groups: Sequence[Group], phases: Phases) -> list[Group]:
        """The groups with the KL that lowers their rewards; truncated completions have one too."""
        self.encode_ahead(groups)
        while True:
            plan = self._plan(unjudged(groups))
            packs = self.made_alone(plan) if self.sharding is None else self.made(plan, unjudged(groups))
            try:
                packs = self.with_logprobs(model, packs, phases)
                return with_kl(groups, plan, packs[: len(plan)], self.args.kl_estimator)
            except PackTooLarge as error:
                self.shrink(error)

    def shared_out(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups of each update that this rank trains on: about as many tokens on every rank."""
        tokens = [sum(map(tokens_of, self.with_signal([group]))) for group in groups]
        parts = exchange(groups, tokens, self.args.steps_per_generation, self.ranks, self._prompt_of)
        self.encode_ahead([group for part in parts for group in part])
        return parts

    def backward(self, model: Any, packs: Sequence[Pack], groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the gradient of the step's loss over its packs; returns the loss and the metrics.

        PackTooLarge where memory runs out: gradients are None again then, as before the step."""
        model.train()
        masked = self.args.mask_truncated_completions
        count = self.ranks.all_reduce_sum(normalizer(groups, self.settings, mask_truncated=masked))
        objective = Objective(self.settings, max(count, 1.0))
        total = torch.zeros((), device=self.args.device)
        parts = []
        try:
            for i, pack in enumerate(packs):
                last = i == len(packs) - 1
                loss, metrics = guarded(pack, lambda pack, last=last: self._pass(model, pack, objective, last=last))
                total += loss
                parts.append(metrics)
        except PackTooLarge:
            model.zero_grad(set_to_none=True)
            raise
        if self.blank is None and any(group.prompt.images for group in groups):
            self.family.fill_vision_gradients(self.policy.model)
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return all_losses(total, tokens, parts, self.ranks)

    def _pass(self, model: Any, pack: Pack, objective: Objective, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """One pack's forward and backward; its share of the loss, and its metrics."""
        with self.policy.attention(), self.syncing(model, last=last):
            with self.phases("forward"):
                loss, metrics = call(model, self.policy.model, lambda: self.policy.loss(pack, objective))
                loss = loss * pack.weight
            with self.phases("backward"):
                self.accelerator.backward(loss * self.ranks.world)  # of which the engines take the mean over ranks
        metrics |= logp_difference(metrics["logp"], pack)
        return loss.detach(), metrics if pack.weight else metrics | {"dropped_rows": metrics["tokens"]}
