"""What is around a step and differs from `transformers.Trainer`: the loader, updates that are not finite, logs,
checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vlmr1.buffer import Buffer, BufferSampler
from vlmr1.checkpoint import rotate, staged
from vlmr1.config import GRPOConfig
from vlmr1.disk import writing
from vlmr1.errors import DivergedError, SettingError
from vlmr1.loss import MAXIMA
from vlmr1.models import load_model
from vlmr1.models.processor import save_processor
from vlmr1.processes import serve_run
from vlmr1.types import Group, Pack, Prompt, StepMetrics
from vlmr1.unlogged import load_unlogged, save_unlogged

logger = logging.getLogger(__name__)
ROLLOUTS = "rollouts.pt"  # of a checkpoint: the buffer, where updates on it are left


class BaseTrainer(Trainer):
    """Everything but the step."""

    args: GRPOConfig
    processor: Any
    buffer: Buffer

    def __init__(self, **options: Any):
        super().__init__(data_collator=as_list, **options)
        self.nonfinite = 0  # updates in a row
        self.skipped = 0  # updates in all
        self.last_loss = 0.0
        self.unlogged: list[StepMetrics] = []
        self._staging: Path | None = None

    def pack(self, groups: Sequence[Group]) -> tuple[list[Pack], dict[str, float]]:
        """Groups -> packed rows; of the step."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        """The prompts of one generation in a batch, empty batches for the other updates that it serves."""
        args = self.args
        sampler = BufferSampler(
            self._get_train_sampler(),  # type: ignore[arg-type]
            prompts=args.prompts_per_device,
            parts=args.steps_per_generation,
            iterations=args.num_iterations,
            drop_last=args.dataloader_drop_last,
        )
        if not len(sampler):
            raise SettingError(
                f"{len(self.train_dataset)} rows are too few: an update needs one, and steps_per_generation is "  # type: ignore[arg-type]
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
        loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=as_list, **workers)  # type: ignore[arg-type]
        return self.accelerator.prepare(loader)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm; where it or the loss is not finite, the update is skipped: parameters without gradient
        are left alone by every optimizer."""
        of_model: Any = super()._get_grad_norm(model, grad_norm)
        norm = float(of_model)
        if math.isfinite(norm) and math.isfinite(self.last_loss):
            self.nonfinite = 0
            return norm
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

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means, or maxima, of the steps since the last log; not to what is logged at the end of a run."""
        if self.unlogged and "loss" in logs:
            steps, self.unlogged = self.unlogged, []
            for name in dict.fromkeys(name for step in steps for name in step.values):
                known = [step.values[name] for step in steps if name in step.values]
                logs[name] = max(known) if name in MAXIMA else sum(known) / len(known)
            for phase in dict.fromkeys(phase for step in steps for phase in step.seconds):
                logs[f"seconds/{phase}"] = sum(step.seconds.get(phase, 0.0) for step in steps) / len(steps)
            logs["skipped_updates"] = float(self.skipped)  # since the run began
            logs["peak_memory_mib"] = max(step.peak_memory_mib for step in steps)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library's estimate knows neither images nor shared prompts."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self.args.output_dir or ".")
        name = f"checkpoint-{self.state.global_step}"
        with writing(name, output_dir), staged(output_dir, name) as self._staging:
            super()._save_checkpoint(model, trial)
            if not self.buffer.spent:
                torch.save(self.buffer.state(), self._staging / name / ROLLOUTS)
            if self.args.should_save:
                save_unlogged(self, self._staging / name)
        self._staging = None
        rotate(output_dir, self.args.save_total_limit, output_dir / name)

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
        rollouts = Path(resume_from_checkpoint) / ROLLOUTS
        if rollouts.exists():
            self.buffer.load(torch.load(rollouts, weights_only=True), self._prompt_of, self.pack)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that a resumed run reads, after the library has set its counts of the logs to nothing."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_unlogged(self, Path(checkpoint))

    def _prompt_of(self, sample: int) -> Prompt:
        dataset: Any = self.train_dataset
        return dataset.of_sample(sample)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        save_processor(self.processor, output_dir or self.args.output_dir or ".")


def as_list(prompts: Any) -> Any:
    return prompts
