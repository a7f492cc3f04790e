"""GRPO, step by step: rollout -> reward -> advantage -> pack -> reference -> policy -> update.

One `training_step` is one optimizer update. A generation (everything before the policy pass) serves
steps_per_generation * num_iterations updates from the buffer. Optimizers, schedulers, checkpoints, resume and callbacks
are those of `HFTrainer`; the policy pass is that of `PackTrainer`; packs, memory and ranks are the `PackRunner`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from vlmr1.distributed.metrics import over_ranks
from vlmr1.grpo import setup
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.buffer import Buffer, Minibatch
from vlmr1.grpo.dynamic_sampling import PromptReservoir, resample
from vlmr1.grpo.group_metrics import group_metrics, warn_if_logp_differs
from vlmr1.grpo.importance_sampling import set_importance_denominators
from vlmr1.grpo.kl_penalty import with_kl
from vlmr1.grpo.loss import Objective, logp_difference, normalizer
from vlmr1.grpo.pack_trainer import PackTrainer
from vlmr1.grpo.policy import call, weights_for_rollout
from vlmr1.grpo.reference import SyncReference
from vlmr1.rewards.groups import TimedOut, failure_counts, score_groups
from vlmr1.types import Group, Pack, Prompt, Sample, StepMetrics


class GRPOTrainer(PackTrainer):
    """GRPO on a vision-language model; each group's image and prompt are computed once."""

    def __init__(
        self,
        model: Any,
        args: Any,
        samples: Sequence[Sample],
        processor: Any,
        reward_funcs: Sequence[Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        eval_dataset: Any = None,
    ):
        self.settings = args.objective()
        self.sampling = args.sampling()
        self.rewards, self.reward_weights = setup.make_rewards(args, model, processor, reward_funcs)
        self.reward_pool = setup.make_reward_pool(args)
        self.reward_context = setup.make_reward_context()
        super().__init__(model, args, samples, processor, callbacks, optimizers, eval_dataset)
        dataset: Any = self.train_dataset
        self.engine = setup.make_engine(self, self.base, self.features)
        self.buffer = Buffer(args.num_iterations, dataset.of_sample, self.ranks)
        self.reference = setup.make_reference_model(self, self.base, self.model)
        self.reservoir = None
        if args.dynamic_sampling:
            seed = args.seed if args.data_seed is None else args.data_seed
            self.reservoir = PromptReservoir(dataset.indices(), seed)
        if args.sync_ref_model and self.reference is not None:
            self.add_callback(SyncReference(self.reference))
            self.members.append(self.reference)
        self.members += [self.reservoir] if self.reservoir is not None else []
        self.members += [] if args.save_only_model else [self.buffer]
        self.timed_out: list[TimedOut] = []  # of the last generation
        self.working_rewards: set[str] = set()  # names of functions that have scored a completion
        self.resampling: dict[str, float] = {}  # metrics of the last generation
        self.last_groups: list[Group] = []

    # The update

    def train(self, *given: Any, **options: Any) -> Any:
        """As `PackTrainer`; decode steps read the frozen weights where they are from now on."""
        self.engine.decode_forward = None
        return super().train(*given, **options)

    def _step(self, model: Any, items: Sequence[Prompt]) -> Tensor:
        drawn = self.buffer.spent
        if drawn:
            self.buffer.fill(self.generate(model, items))
        else:
            self.runner.encode_ahead(self.model, self.buffer.groups)  # a run that was resumed has no features
        minibatch = self.buffer.take()
        loss, metrics = self.backward(model, minibatch.groups)
        metrics |= self._metrics(minibatch, drawn=drawn)
        if drawn:
            warn_if_logp_differs(metrics, self.state.global_step + 1, self.args.rollout_logp_warn_threshold)
        else:  # the policy has moved since it drew these completions
            metrics = {name: value for name, value in metrics.items() if "logp_difference" not in name}
        if self.buffer.spent and self.features is not None:
            self.features.clear()
        self.pending.steps.append(StepMetrics(metrics, self.phases.seconds, self.phases.memory))
        self.last_groups = minibatch.groups
        self.last_loss = float(loss)
        return loss

    # Before the first update on a generation

    def generate(self, model: Any, prompts: Sequence[Prompt]) -> list[Minibatch]:
        """Prompts -> groups of completions with rewards, advantages, and the log-probs of reference and old policy."""
        with self.phases("rollout"):
            groups = self.rollout(prompts)
        self.timed_out = []
        groups = self.score(groups)
        if self.reservoir is not None:
            groups = self.resample(groups, self.reservoir)
        if self.args.kl_in_reward:
            self.runner.encode_ahead(self.model, groups)
            self.add_logprobs(model, groups, every=True)
            groups = with_kl(groups, self.args.kl_estimator)
        weights, scale = self.reward_weights, self.args.scale_rewards
        options = {"kl_weight": self.args.beta, "aggregation": self.args.multi_objective_aggregation}
        groups = with_advantages(groups, weights, scale, self.ranks, **options)
        self.timed_out = self.ranks.all_gather_list(self.timed_out)  # groups may go to other ranks
        return [Minibatch(own, self.prepare(model, own)) for own in self.balance(groups)]

    def rollout(self, prompts: Sequence[Prompt], number: int = 0, count: int | None = None) -> list[Group]:
        """Prompts -> groups of `count` completions (num_generations), drawn from the present policy; `number` of
        the round varies the draws."""
        step = self.state.global_step + (number << 32)
        trained, merge = self.accelerator.unwrap_model(self.model), self.args.lora_merge_rollout
        with weights_for_rollout(self.model, trained, self.sharding, merge_adapter=merge):
            if not prompts:  # other ranks have some, and gathered the weights with this one
                return []
            count = count or self.args.num_generations
            return self.engine.generate(prompts, count, self.sampling, step=step)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their rewards [G, R]."""
        with self.phases("reward"):
            self.reward_context.trainer_state = self.state
            options: dict[str, Any] = {"pool": self.reward_pool, "timed_out": self.timed_out}
            options |= {"working": self.working_rewards, "context": self.reward_context}
            return score_groups(groups, self.rewards, **options)

    def resample(self, groups: Sequence[Group], reservoir: PromptReservoir) -> list[Group]:
        """The groups after further rounds for those without signal; rollout statistics are of all rounds."""
        dataset: Any = self.train_dataset

        def draw(rows: Sequence[int], number: int) -> list[Group]:
            before = self.engine.stats
            with self.phases("rollout"):
                drawn = self.rollout([dataset[row] for row in rows], number)
            if not drawn:
                return []
            self.engine.stats = before + self.engine.stats
            return self.score(drawn)

        rounds, gather = self.args.dynamic_sampling_max_rounds, self.ranks.all_gather_list
        options = {"rounds": rounds, "rank": self.ranks.rank, "gather": gather}
        groups, self.resampling = resample(groups, draw, reservoir, self.reward_weights, **options)
        return groups

    def add_logprobs(self, model: Any, groups: Sequence[Group], *, every: bool = False) -> None:
        """Add the log-probs of reference and old policy to the completions that contribute to the loss, or to `every`
        one; those that have them are left alone."""
        with self.phases("reference"):
            if self.reference is not None:
                with self.reference.ready():
                    self.runner.map(groups, self.reference.logprobs, into="ref_logp", every=every)
        with self.phases("old"):
            if self.args.old_logprobs == "rollout":
                for completion in (completion for group in groups for completion in group.completions):
                    completion.old_logp = completion.logp
            elif self.args.has_old_pass:
                self.runner.map(groups, lambda pack: self._policy_logprobs(model, pack), into="old_logp", every=every)

    def prepare(self, model: Any, groups: Sequence[Group]) -> dict[str, float]:
        """Add everything that the loss needs to the completions of an update; returns metrics."""
        self.add_logprobs(model, groups)
        mode, cap = self.args.importance_sampling_correction, self.args.importance_sampling_cap
        return {} if mode == "none" else set_importance_denominators(self.runner.packs(groups), mode, cap)

    def _policy_logprobs(self, model: Any, pack: Pack) -> Tensor:
        model.eval()
        with self.policy.attention():
            return call(model, self.policy.model, lambda: self.policy.logprobs(pack))

    # The policy pass

    def backward(self, model: Any, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the gradient of the update's loss over the packs of its groups; returns the loss and metrics."""
        masked = self.args.mask_truncated_completions
        count = self.ranks.all_reduce_sum(normalizer(groups, self.settings, mask_truncated=masked))
        return self.pass_over(model, groups, Objective(self.settings, max(count, 1.0)))

    # Metrics

    def pass_metrics(self, logp: Tensor, pack: Pack) -> dict[str, Tensor]:
        """Metrics of a pack's log-probs [N]."""
        return logp_difference(logp, pack)

    def _metrics(self, minibatch: Minibatch, *, drawn: bool) -> dict[str, float]:
        """Metrics of an update's groups, of all ranks; with `drawn` those of their generation too."""
        groups = minibatch.groups
        own = group_metrics(groups, self.rewards, self.reward_weights) | minibatch.metrics | self.runner.counts
        if drawn:
            own |= self.engine.stats.values() | failure_counts(self.timed_out) | self.resampling
            own |= self.reward_context.take()
        return over_ranks(own, len(groups), self.ranks)
