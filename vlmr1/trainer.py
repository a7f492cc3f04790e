"""The loop, read aloud: rollout -> reward -> advantage -> pack -> reference -> policy -> update.

One `training_step` is one optimizer update. Optimizers, schedulers, checkpoints, resume and callbacks are those of
`transformers.Trainer`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from vlmr1.advantage import with_advantages
from vlmr1.checkpoint import staged
from vlmr1.config import GRPOConfig
from vlmr1.data.prompts import PromptBuilder, PromptDataset
from vlmr1.errors import DivergedError, SettingError
from vlmr1.loss import Objective, combine, logp_difference, normalizer
from vlmr1.memory.telemetry import Phases, peak_memory_mib
from vlmr1.models import adapter_of, check_dropout, load_model
from vlmr1.models.features import FeatureCache
from vlmr1.models.processor import save_processor
from vlmr1.naive import NaivePolicy
from vlmr1.packing import make_pack, plan_packs, repeated_prompt_tokens, with_signal, without_weight
from vlmr1.policy import PackedPolicy, call
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.rewards.score import score_groups
from vlmr1.rollout import ENGINES
from vlmr1.statistics import group_statistics
from vlmr1.types import Group, Pack, Prompt, Sample, StepMetrics
from vlmr1_kernels import use

logger = logging.getLogger(__name__)


class GRPOTrainer(Trainer):
    """GRPO on a vision-language model; each group's image and prompt are computed once."""

    args: GRPOConfig

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
        self.rewards = [get_reward(reward) for reward in (reward_funcs or args.reward_funcs)]
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise SettingError(f"reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} rewards")
        self.settings = args.objective()
        self.dtype = torch.bfloat16 if args.bf16 else None
        if args.freeze_vision:
            for parameter in self.adapter.vision_parameters(model):
                parameter.requires_grad_(False)
        builder = PromptBuilder(model, self.adapter, processor, max_prompt_length=args.max_prompt_length)
        super().__init__(
            model=model,
            args=args,
            train_dataset=PromptDataset(samples, builder),
            data_collator=_as_list,
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
        )
        self.sampling = args.sampling()
        self.policy = self._forward_of(model)
        self.reference = None
        if args.beta > 0:
            self.reference = self._forward_of(frozen_copy(model))
        self.nonfinite = 0
        self.skipped = 0
        self.last_groups: list[Group] = []
        self._last_loss = 0.0
        self._unlogged: list[StepMetrics] = []
        self._staging: Path | None = None

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
        with phases("rollout"):
            groups = self.rollout(prompts)
        with phases("reward"):
            groups = score_groups(groups, self.rewards)
            groups = with_advantages(groups, self.reward_weights, self.args.scale_rewards)
        packs, counts = self.pack(groups)
        with phases("reference"):
            packs = [self.with_reference(pack) for pack in packs]
        with phases("policy"):
            loss, values = self.backward(model, packs, groups)
        values |= group_statistics(groups, [reward.name for reward in self.rewards], self.reward_weights)
        self._check_logp(values)
        values |= counts | self.engine.stats.values() | {"skipped_updates": float(self.skipped)}
        if self.features is not None:
            self.features.clear()
        self._unlogged.append(StepMetrics(values, phases.seconds, peak_memory_mib()))
        self.last_groups = groups
        self._last_loss = float(loss)
        return loss

    def rollout(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Prompts -> groups of completions, drawn from the present policy."""
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
        if self.args.old_logprobs == "recompute":  # None: the forward of the only update there is
            packs = [replace(pack, old_logp=None) for pack in packs]
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
            parts.append(metrics | logp_difference(metrics["logp"], pack))
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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm; where it or the loss is not finite, the update is skipped: parameters without gradient
        are left alone by every optimizer."""
        of_model: Any = super()._get_grad_norm(model, grad_norm)
        norm = float(of_model)
        if math.isfinite(norm) and math.isfinite(self._last_loss):
            self.nonfinite = 0
            return norm
        self.nonfinite += 1
        self.skipped += 1
        logger.warning(
            "step %d: loss %s, gradient norm %s: not finite, the update is skipped (%d in a row)",
            self.state.global_step + 1,
            self._last_loss,
            norm,
            self.nonfinite,
        )
        if self.nonfinite >= self.args.max_nonfinite:
            raise DivergedError(
                f"stopped at step {self.state.global_step + 1}: {self.nonfinite} updates in a row were not finite "
                "(max_nonfinite); the last checkpoint is intact. A lower learning_rate may help"
            )
        model.zero_grad(set_to_none=True)
        return norm

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the steps since the last log."""
        if self._unlogged:
            steps, self._unlogged = self._unlogged, []
            for name in steps[0].values:
                logs[name] = sum(step.values[name] for step in steps) / len(steps)
            for phase in steps[0].seconds:
                logs[f"seconds/{phase}"] = sum(step.seconds[phase] for step in steps) / len(steps)
            logs["peak_memory_mib"] = max(step.peak_memory_mib for step in steps)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library's estimate knows neither images nor shared prompts."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self.args.output_dir or ".")
        with staged(output_dir, f"checkpoint-{self.state.global_step}") as self._staging:
            super()._save_checkpoint(model, trial)
        self._staging = None
        rotate_checkpoints(str(output_dir), self.args.save_total_limit)

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether this is the last checkpoint of a run, whose weights and state are then taken; `train` would go on."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """By the names that the files have, which for some families are not the module's: every weight or an error."""
        model = self.model if model is None else model
        saved = load_model(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_processor(self.processor, output_dir or self.args.output_dir or ".")


def frozen_copy(model: Any) -> Any:
    """A reference model: what is trained is copied, what is frozen is the model's own."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=frozen).eval().requires_grad_(False)


def _as_list(prompts: Any) -> Any:
    return prompts
