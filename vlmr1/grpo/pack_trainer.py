"""HFTrainer whose updates are passes over packs of groups, whatever their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from vlmr1.data.loader import as_list, batch_loader, unpacked
from vlmr1.distributed.balance import exchange
from vlmr1.distributed.metrics import all_losses
from vlmr1.grpo import setup
from vlmr1.grpo.buffer import BufferSampler
from vlmr1.grpo.loss import PackLoss
from vlmr1.grpo.pack_runner import PackRunner
from vlmr1.grpo.policy import PackedPolicy, call
from vlmr1.models.frozen import frozen_in
from vlmr1.training.hf_trainer import HFTrainer
from vlmr1.types import Group, Pack, Sample
from vlmr1_kernels import use


class PackTrainer(HFTrainer):
    """A model, the rows that it trains on, and passes over packs of them. A subclass has `_step`: the items of a batch
    -> the loss of an update, with its gradients."""

    def __init__(
        self,
        model: Any,
        args: Any,
        samples: Sequence[Sample],
        processor: Any,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        eval_dataset: Any = None,
    ):
        self.processor = processor
        self.dtype = torch.bfloat16 if args.bf16 else None
        self.base, self.family, trained = setup.prepare_model(model, args)
        super().__init__(
            model=trained,
            args=args,
            train_dataset=self.make_dataset(samples, args),
            processing_class=processor.tokenizer,
            data_collator=as_list,
            callbacks=list(callbacks),
            optimizers=optimizers,
            eval_dataset=eval_dataset,
        )
        self.features = setup.make_features(self.base, self.family, args)
        self.policy: PackedPolicy = setup.make_policy(self, self.base)
        self.runner = PackRunner(self.policy, args, self.parallel, setup.make_dummy_image(self, self.base))
        self.members.append(self.runner.budget)

    def make_dataset(self, samples: Sequence[Sample], args: Any) -> Any:
        """The data set of the rows."""
        return setup.make_dataset(self.base, self.family, self.processor, samples, args)

    def train(self, *given: Any, **options: Any) -> Any:
        """As the library's; frozen weights are in the dtype of autocast meanwhile."""
        with frozen_in(self.base, None if self.parallel.has_engine else self.dtype):
            return super().train(*given, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One update's gradients from a list of items of the data set; returns the loss."""
        self.begin_update()
        with use(self.args.kernels):
            loss = self._step(model, unpacked(inputs))
        self.phases.start("update")  # until the optimizer has made its step
        return loss

    def _step(self, model: Any, items: Sequence[Any]) -> Tensor:
        raise NotImplementedError

    def balance(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups of each update that this rank trains on: about as many tokens on every rank."""
        tokens = [self.runner.tokens_of(group) for group in groups]
        dataset: Any = self.train_dataset
        parts = exchange(groups, tokens, self.args.updates_per_generation, self.ranks, dataset.of_sample)
        self.runner.encode_ahead(self.model, [group for part in parts for group in part])
        return parts

    def pass_over(self, model: Any, groups: Sequence[Group], objective: PackLoss) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the gradient of an update's loss over the packs of its groups; returns the loss and metrics."""
        model.train()
        passes = self.runner.backward(model, groups, lambda pack: self._pass(model, pack, objective))
        total = torch.zeros((), device=self.args.device)
        for loss, _ in passes:
            total += loss
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return all_losses(total, tokens, [metrics for _, metrics in passes], self.ranks)

    def _pass(self, model: Any, pack: Pack, objective: PackLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """One pack's forward and backward; its share of the loss, and its metrics."""
        with self.policy.attention():
            with self.phases("forward"):
                loss, metrics = call(model, self.policy.model, lambda: self.policy.loss(pack, objective))
                loss = loss * pack.weight
            with self.phases("backward"):
                if loss.requires_grad:  # not where the vision tower alone is trained and the pack has no image
                    self.accelerator.backward(loss * self.ranks.world_size)  # engines take the mean over ranks
        metrics |= self.pass_metrics(metrics["logp"], pack)
        return loss.detach(), metrics if pack.weight else metrics | {"dropped_rows": metrics["tokens"]}

    def pass_metrics(self, logp: Tensor, pack: Pack) -> dict[str, Tensor]:
        """Metrics of a pack's log-probs [N]."""
        return {}

    def get_train_dataloader(self) -> DataLoader:
        """The rows of one generation in a batch, then empty batches for the other updates that it serves: the
        Trainer's loop takes one an update."""
        sampler = BufferSampler.of(self.args, setup.make_sampler(self), self.ranks)
        return batch_loader(self.train_dataset, sampler, self.args, self.accelerator)

    def totals(self) -> dict[str, float]:
        """Counts since the run began."""
        return super().totals() | {"out_of_memory": float(self.runner.budget.out_of_memory)}
