"""The loop, read aloud: rollout -> reward -> advantage -> pack -> reference -> policy -> update.

One `training_step` is one optimizer update. Optimizers, schedulers, checkpoints, resume and callbacks are those of
`transformers.Trainer`; what is around the step is in `base_trainer.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmr1.advantage import with_advantages
from vlmr1.base_trainer import BaseTrainer
from vlmr1.buffer import Buffer, Part, parts_of
from vlmr1.config import GRPOConfig
from vlmr1.data.prompts import PromptBuilder, PromptDataset, without_overlong
from vlmr1.errors import SettingError
from vlmr1.loss import Objective, combine, logp_difference, normalizer
from vlmr1.memory.telemetry import Phases, peak_memory_mib
from vlmr1.models import adapter_of, check_dropout
from vlmr1.models.features import FeatureCache
from vlmr1.models.lora import merged
from vlmr1.naive import NaivePolicy
from vlmr1.packing import make_pack, plan_packs, repeated_prompt_tokens, with_signal, without_weight
from vlmr1.parameters import choose_trained
from vlmr1.policy import PackedPolicy, call
from vlmr1.reference import make_reference
from vlmr1.rewards.groups import TimedOut, score_groups
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.rollout import ENGINES
from vlmr1.statistics import group_statistics
from vlmr1.types import Group, Pack, Prompt, Sample, StepMetrics
from vlmr1_kernels import use

logger = logging.getLogger(__name__)


class GRPOTrainer(BaseTrainer):
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
        self.adapter = adapter_of(model)
        if args.share_prompt or args.pack:
            check_dropout(model.config)
        self.processor = processor
        settings = args.rewards()
        self.rewards = [get_reward(reward, settings) for reward in (reward_funcs or args.reward_funcs)]
        self.timed_out: list[TimedOut] = []  # of the last generation
        self.reward_pool = RewardPool(args.reward_workers, args.reward_timeout) if args.reward_workers else None
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise SettingError(f"reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} rewards")
        self.settings = args.objective()
        self.dtype = torch.bfloat16 if args.bf16 else None
        trained = choose_trained(model, self.adapter, args)
        if args.overlong_prompts == "filter" and args.max_prompt_length is not None:
            samples = without_overlong(samples, PromptBuilder(model, self.adapter, processor), args.max_prompt_length)
        builder = PromptBuilder(model, self.adapter, processor, max_prompt_length=args.max_prompt_length)
        super().__init__(
            model=trained,
            args=args,
            train_dataset=PromptDataset(samples, builder),
            processing_class=processor.tokenizer,
            callbacks=list(callbacks),
        )
        frozen = not any(parameter.requires_grad for parameter in self.adapter.vision_parameters(model))
        self.features = FeatureCache() if frozen and args.share_vision else None
        self.engine = ENGINES[args.rollout_engine](
            model,
            self.adapter,
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
            self.reference = make_reference(args.reference, self._forward_of(model), trained)
        self.buffer = Buffer(args.num_iterations)
        self.last_groups: list[Group] = []

    def _forward_of(self, model: Any) -> PackedPolicy:
        kind = PackedPolicy if self.args.share_prompt or self.args.pack else NaivePolicy
        options = {"temperature": self.args.temperature, "dtype": self.dtype, "features": self.features}
        return kind(model, self.adapter, **options)

    # The step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One update's gradients from a list of Prompts; returns the loss."""
        with use(self.args.kernels):
            return self._step(model, inputs)

    def _step(self, model: Any, prompts: Sequence[Prompt]) -> Tensor:
        phases = Phases()
        if prompts:  # none where the buffer serves this update too
            self.buffer.fill(self.generation(model, prompts, phases))
        part = self.buffer.take()
        with phases("policy"):
            loss, values = self.backward(model, part.packs, part.groups)
        values |= group_statistics(part.groups, [reward.name for reward in self.rewards], self.reward_weights)
        values |= part.counts
        if prompts:
            values |= self.engine.stats.values() | {"reward_timeouts": float(len(self.timed_out))}
            self._check_logp(values)
        else:  # the policy is not the one that drew these any more
            values = {name: value for name, value in values.items() if "logp_difference" not in name}
        if self.buffer.spent and self.features is not None:
            self.features.clear()
        self.unlogged.append(StepMetrics(values, phases.seconds, peak_memory_mib()))
        self.last_groups = part.groups
        self.last_loss = float(loss)
        return loss

    def generation(self, model: Any, prompts: Sequence[Prompt], phases: Phases) -> list[Part]:
        """Everything that is done before the first update: completions, rewards, advantages, packs, and the log-probs
        of reference and old policy."""
        with phases("rollout"):
            groups = self.rollout(prompts)
        with phases("reward"):
            self.timed_out = []
            groups = score_groups(groups, self.rewards, pool=self.reward_pool, timed_out=self.timed_out)
            groups = with_advantages(groups, self.reward_weights, self.args.scale_rewards)
        parts = []
        for part in parts_of(groups, self.args.steps_per_generation):
            packs, counts = self.pack(part)
            with phases("reference"), nullcontext() if self.reference is None else self.reference.ready():
                packs = [self.with_reference(pack) for pack in packs]
            with phases("old"):
                packs = [self.with_old(model, pack) for pack in packs]
            parts.append(Part(part, packs, counts))
        return parts

    def rollout(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Prompts -> groups of completions, drawn from the present policy."""
        with merged(self.model) if self.args.lora_merge_rollout else nullcontext():
            return self.engine.generate(prompts, self.args.num_generations, self.sampling, step=self.state.global_step)

    def pack(self, groups: Sequence[Group]) -> tuple[list[Pack], dict[str, float]]:
        """Groups -> packed rows under the token budget, and what they count."""
        plan = plan_packs(
            with_signal(
                groups,
                skip_zero_advantage=self.args.skips_zero_advantage,
                mask_truncated=self.args.mask_truncated_completions,
            ),
            tokens_per_pack=self.args.tokens_per_pack,
            share_prompt=self.args.share_prompt,
            pack=self.args.pack,
        )
        packs = [make_pack(row, share_vision=self.args.share_vision) for row in plan] or [without_weight(groups)]
        return packs, {
            "packs": float(len(packs)),
            "packed_tokens": float(sum(len(pack.input_ids) for pack in packs)),
            "repeated_prompt_tokens": float(repeated_prompt_tokens(plan)),
        }

    def with_reference(self, pack: Pack) -> Pack:
        """The pack with the reference model's log-probs, where the objective needs them."""
        if self.reference is None:
            return pack
        return replace(pack, ref_logp=self.reference.logprobs(pack))

    def with_old(self, model: Any, pack: Pack) -> Pack:
        """The pack with the log-probs of the policy that drew it: the engine's, or the policy's own."""
        if self.args.old_logprobs == "rollout":
            return pack
        if self.args.steps_per_generation * self.args.num_iterations == 1:
            return replace(pack, old_logp=None)  # the update's own forward computes them
        with self.policy.attention():
            return replace(pack, old_logp=call(model, self.policy.model, lambda: self.policy.logprobs(pack)))

    def backward(self, model: Any, packs: Sequence[Pack], groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the gradient of the step's loss over its packs; returns the loss and the metrics."""
        model.train()
        masked = self.args.mask_truncated_completions
        count = normalizer(groups, self.settings, mask_truncated=masked)
        objective = Objective(self.settings, max(count, 1.0))
        total = torch.zeros((), device=self.args.device)
        parts = []
        for pack in packs:
            with self.policy.attention():
                loss, metrics = call(model, self.policy.model, lambda pack=pack: self.policy.loss(pack, objective))
                loss = loss * pack.weight
                self.accelerator.backward(loss)
            total += loss.detach()
            metrics |= logp_difference(metrics["logp"], pack)
            parts.append(metrics if pack.weight else metrics | {"dropped_rows": metrics["tokens"]})
        if any(group.prompt.images for group in groups):
            self.adapter.fill_vision_gradients(self.policy.model)
        return total, combine(parts, tokens=sum(len(c.token_ids) for group in groups for c in group.completions))

    def _check_logp(self, values: dict[str, float]) -> None:
        """The engine's log-probs become the ratio's denominator: they should be the policy's."""
        difference = values.get("rollout/logp_difference", 0.0)
        if difference > self.args.rollout_logp_alarm:
            logger.warning(
                "step %d: the log-probs of the rollout engine and of the policy differ by %.3f nats a token "
                "(rollout_logp_alarm is %g); old_logprobs=recompute keeps them out of the ratio",
                self.state.global_step + 1,
                difference,
                self.args.rollout_logp_alarm,
            )
