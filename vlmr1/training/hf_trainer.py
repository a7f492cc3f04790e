"""What is around a step and differs from `transformers.Trainer`: the loader, updates that are not finite, logs,
checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vlmr1.config import GRPOConfig
from vlmr1.data.loader import Batches
from vlmr1.distributed.launch import check_launched
from vlmr1.distributed.preflight import check_saving
from vlmr1.distributed.ranks import Ranks
from vlmr1.distributed.sharded import Sharding, check_sharded, gathered_state, keep_float32, round_early, sharding_of
from vlmr1.errors import DivergedError, SettingError
from vlmr1.grpo.buffer import Buffer, BufferSampler
from vlmr1.grpo.pack_budget import PackBudget
from vlmr1.lifecycle.checkpoint import is_adapter, rotate, staged
from vlmr1.lifecycle.disk import writing
from vlmr1.lifecycle.processes import serve_run
from vlmr1.lifecycle.resume import is_last
from vlmr1.models import load_model
from vlmr1.models.lora import base_of, restore_adapter
from vlmr1.models.processor import save_processor
from vlmr1.telemetry.nvml import GpuMeter
from vlmr1.telemetry.phases import Phases, peak_memory_mib
from vlmr1.training.pending_metrics import combined, costs, load_unlogged, save_unlogged
from vlmr1.types import Group, Pack, Prompt, StepMetrics

logger = logging.getLogger(__name__)
ROLLOUTS = "rollouts.pt"  # of a checkpoint: the buffer, where updates on it are left
BUDGET = "pack_budget.json"  # of a checkpoint: how much smaller packs have become, where memory ran out


class Kept(Protocol):
    """What checkpoints hold besides model, optimizer and rollouts: a file of its own in their directory. Every rank
    calls the methods, and one of them writes."""

    def save(self, checkpoint: Path, *, writes: bool) -> None: ...
    def load(self, checkpoint: Path) -> None: ...


class BaseTrainer(Trainer):
    """Everything but the step."""

    args: GRPOConfig
    processor: Any
    buffer: Buffer

    def __init__(self, **options: Any):
        check_saving(options["args"])
        super().__init__(data_collator=as_list, **options)
        self.ranks = Ranks(self.args.process_index, self.args.world_size)
        check_launched(self.ranks.world, self.accelerator)
        self.sharding: Sharding | None = sharding_of(self.accelerator)
        check_sharded(self.args, self.sharding, engine=self.joins_tower)
        keep_float32(self.accelerator, self.sharding)
        round_early(self.model, self.accelerator, bf16=self.args.bf16)
        self.nonfinite = 0  # updates in a row
        self.skipped = 0  # updates in all
        self.last_loss = 0.0
        self.unlogged: list[StepMetrics] = []
        self.kept: list[Kept] = []
        self.budget = PackBudget(self.args.tokens_per_pack)
        self.phases = Phases()  # of the present update
        self.gpu = GpuMeter.of(self.args.device)
        self.add_callback(UpdateEnd(self.end_update))
        self._staging: Path | None = None

    def pack(self, groups: Sequence[Group]) -> tuple[list[Pack], dict[str, float]]:
        """Groups -> packed rows; of the step."""
        raise NotImplementedError

    def encode_ahead(self, groups: Sequence[Group]) -> None:
        """Features of a frozen tower that passes will need; of the step."""
        raise NotImplementedError

    # Around an update

    def begin_update(self) -> None:
        """Clocks and meters start anew."""
        self.phases = Phases(memory=self.args.memory_by_phase)
        if self.gpu is not None:
            self.gpu.begin()

    def end_update(self) -> None:
        """After the optimizer's step: what it took belongs to the metrics of the update too."""
        self.phases.stop("update")
        if self.gpu is not None:
            self.unlogged[-1].values.update(self.gpu.end())

    def get_train_dataloader(self) -> DataLoader:
        """The prompts of one generation in a batch, empty batches for the other updates that it serves."""
        args = self.args
        sampler = BufferSampler(
            self._get_train_sampler(),  # type: ignore[arg-type]
            prompts=args.prompts_per_device,
            parts=args.steps_per_generation,
            iterations=args.num_iterations,
            drop_last=args.dataloader_drop_last,
            ranks=self.ranks,
        )
        if not len(sampler):
            each = "" if self.ranks.world == 1 else f" on each of {self.ranks.world} ranks"
            raise SettingError(
                f"{len(self.train_dataset)} rows are too few: an update needs one{each}, and steps_per_generation is "  # type: ignore[arg-type]
                f"{args.steps_per_generation} (dataloader_drop_last is {args.dataloader_drop_last})"
            )
        workers = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context or None,
            "in_order": args.dataloader_in_order,
            "worker_init_fn": serve_run,
        }
        loader = DataLoader(Batches(self.train_dataset), batch_sampler=sampler, collate_fn=as_list, **workers)  # type: ignore[arg-type]
        config = self.accelerator.dataloader_config
        return prepare_data_loader(  # not the accelerator's: it would deal out batches that are dealt out already
            loader,
            num_processes=1,
            process_index=0,
            rng_types=self.accelerator.rng_types,  # type: ignore[arg-type]
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
        )

    @property
    def joins_tower(self) -> bool:
        """Whether a pass without an image has to call the tower too: engines count on gradients of every parameter."""
        return self.ranks.world > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled

    @contextmanager
    def syncing(self, model: Any, *, last: bool) -> Iterator[None]:
        """Around a pass: the ranks add up their gradients in the last one of an update, with FSDP in each, where they
        stay in shards. DeepSpeed updates in the backward that is the last."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        apart = last or self.is_deepspeed_enabled or self.is_fsdp_enabled
        with nullcontext() if apart else self.accelerator.no_sync(model):
            yield

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm; where it or the loss is not finite, the update is skipped: parameters without gradient
        are left alone by every optimizer."""
        of_model: Any = super()._get_grad_norm(model, grad_norm)
        norm = float(of_model)
        if math.isfinite(norm) and math.isfinite(self.last_loss):
            self.nonfinite = 0
            return norm
        if self.is_deepspeed_enabled and math.isfinite(norm):
            raise DivergedError(
                f"stopped at step {self.state.global_step + 1}: the loss is {self.last_loss}, and DeepSpeed has made "
                "the update; the last checkpoint is intact. A lower learning_rate may help"
            )
        self.nonfinite += 1
        self.skipped += 1
        logger.warning(
            "step %d: loss %s, gradient norm %s: not finite, the update is skipped (%d in a row)",
            self.state.global_step + 1,
            self.last_loss,
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

    def check_logp(self, values: dict[str, float]) -> None:
        """Warn: the engine's log-probs become the ratio's denominator: they should be the policy's."""
        difference = values.get("rollout/logp_difference", 0.0)
        if difference > self.args.rollout_logp_warn_threshold:
            logger.warning(
                "step %d: the log-probs of the rollout engine and of the policy differ by %.3f nats a token "
                "(rollout_logp_warn_threshold is %g); old_logprobs=recompute keeps them out of the ratio",
                self.state.global_step + 1,
                difference,
                self.args.rollout_logp_warn_threshold,
            )

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means, or maxima, of the steps since the last log; not to what is logged at the end of a run."""
        if self.unlogged and "loss" in logs:
            steps, self.unlogged = self.unlogged, []
            for name in dict.fromkeys(name for step in steps for name in step.values):
                known = [step.values[name] for step in steps if name in step.values]
                logs[name] = combined(name, known)
            logs |= costs(steps)
            logs["skipped_updates"] = float(self.skipped)  # since the run began
            logs["out_of_memory"] = float(self.budget.out_of_memory)  # of the run
            logs["memory/peak_mib"] = peak_memory_mib()
        super().log(logs, start_time)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Nothing: `eval_on_start`, by which the library calls it, is the evaluation callback's."""
        return {}

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library's estimate knows neither images nor shared prompts."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self.args.output_dir or ".")
        name = f"checkpoint-{self.state.global_step}"
        together = {"first": self.ranks.rank == 0, "barrier": self.ranks.barrier}
        with writing(name, output_dir), staged(output_dir, name, **together) as self._staging:
            super()._save_checkpoint(model, trial)
            checkpoint = self._staging / name
            for each in self.kept:
                each.save(checkpoint, writes=self.ranks.rank == 0)
            if self.ranks.rank == 0:
                self.budget.save(checkpoint / BUDGET)
            if not self.buffer.spent and not self.args.save_only_model:
                torch.save(self.buffer.state(), checkpoint / self.rollouts)
            if self.args.should_save:
                save_unlogged(self, checkpoint)
        self._staging = None
        if self.ranks.rank == 0:
            rotate(output_dir, self.args.save_total_limit, output_dir / name)

    @property
    def rollouts(self) -> str:
        """The file of this rank's buffer."""
        return ROLLOUTS if self.ranks.world == 1 else f"{self.ranks.rank}-{ROLLOUTS}"

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether this is the last checkpoint of a run, whose weights and state are then taken; `train` would go on."""
        if not is_last(checkpoint):
            return False
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.sharding is None:
            self._load_weights(str(checkpoint), self.model)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint, self.model if model is None else model)

    def _load_weights(self, checkpoint: str, model: Any) -> None:
        """By the names that the files have, which for some families are not the module's: every weight or an error."""
        if self.args.use_peft:
            restore_adapter(model, checkpoint)
        else:
            model.load_state_dict(load_model(checkpoint, dtype=model.dtype).state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        try:
            for each in self.kept:
                each.load(Path(checkpoint))
        except FileNotFoundError as error:
            raise SettingError(
                f"{checkpoint} was written without dynamic_sampling or sync_ref_model: {error}"
            ) from error
        self.budget.load(Path(checkpoint) / BUDGET)
        rollouts = Path(checkpoint) / self.rollouts
        if rollouts.exists():
            self.buffer.load(torch.load(rollouts, weights_only=True), self._prompt_of, self.pack)
            self.encode_ahead([group for part in self.buffer.parts for group in part.groups])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that a resumed run reads, after the library has set its counts of the logs to nothing."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_unlogged(self, Path(checkpoint))

    def _prompt_of(self, sample: int) -> Prompt:
        dataset: Any = self.train_dataset
        return dataset.of_sample(sample)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """An ordinary model directory, with FSDP's sharded checkpoints too."""
        if self.is_fsdp_enabled:
            self._save(output_dir, gathered_state(self.model, trained_only=self.args.use_peft))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir or "."
        save_processor(self.processor, folder)
        if is_adapter(folder):  # the processor's class, and how the weights were quantized
            base_of(self.model).config.save_pretrained(folder)


class UpdateEnd(TrainerCallback):
    """Calls a function after each step of the optimizer."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


def as_list(prompts: Any) -> Any:
    return prompts
