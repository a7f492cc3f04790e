"""HF Trainer plus non-finite updates, logs and checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from vlmr1.distributed.preflight import check_saving
from vlmr1.distributed.sharded import Sharding, full_state_dict
from vlmr1.errors import DivergedError, SettingError
from vlmr1.lifecycle.checkpoint import rotate, staged
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.lifecycle.resume import is_final
from vlmr1.telemetry.nvml import GpuMeter
from vlmr1.telemetry.phases import Phases, peak_memory_mib
from vlmr1.training.final_model import leave_and_push
from vlmr1.training.parallel import make_parallel
from vlmr1.training.pending_metrics import PendingMetrics, load_pending, save_pending
from vlmr1.training.weights import as_read, complete_model_directory, load_weights

logger = logging.getLogger(__name__)


class Checkpointable(Protocol):
    """State that checkpoints hold besides model and optimizer, in files of its own in their directory. Every rank calls
    both methods; files that all ranks share are written by the one whose `writes` is true."""

    def save(self, checkpoint: Path, *, writes: bool) -> None: ...
    def load(self, checkpoint: Path) -> None: ...


class HFTrainer(Trainer):
    """`transformers.Trainer` with what this project needs whatever the loss is. A subclass has a `training_step`, which
    sets `last_loss` and appends to `pending`, and appends its state to `members`."""

    args: Any
    processor: Any

    def __init__(self, **options: Any):
        check_saving(options["args"])
        super().__init__(**options)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.parallel = make_parallel(self.args, self.accelerator, self.model)
        self.ranks = self.parallel.ranks
        self.sharding: Sharding | None = self.parallel.sharding
        self.nonfinite = 0  # updates in a row
        self.skipped = 0  # updates in all
        self.last_loss = self.last_grad_norm = 0.0
        self.pending = PendingMetrics()
        self.members: list[Checkpointable] = []
        self.phases = Phases()  # of the present update
        self.gpu = GpuMeter.of(self.args.device)
        self.add_callback(UpdateEnd(self.end_update))
        self._staging: Path | None = None

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """Numbers of epochs, steps and rows; no epoch where there is no update to make (`max_steps` 0), for which the
        library makes one."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        return (epochs if max_steps else 0, *others, max_steps)

    # Around an update

    def begin_update(self) -> None:
        """Start clocks and meters anew."""
        self.phases = Phases(memory=self.args.memory_by_phase)
        if self.gpu is not None:
            self.gpu.begin()

    def end_update(self) -> None:
        """After the optimizer's step: its time belongs to the metrics of the update too."""
        self.phases.stop("update")
        self.phases.settle()  # once an update: its metrics have the dictionary
        if self.gpu is not None:
            self.pending.steps[-1].values.update(self.gpu.end())

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm; where it or the loss is not finite, the update is skipped: optimizers leave parameters
        without gradient alone."""
        of_model: Any = super()._get_grad_norm(model, grad_norm)
        norm = self.last_grad_norm = float(of_model)
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

    # Logs

    def totals(self) -> dict[str, float]:
        """Counts since the run began."""
        return {"skipped_updates": float(self.skipped)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log; not to what is logged at the end of a run."""
        if self.pending.steps and "loss" in logs:
            self.add_metrics(logs)
        super().log(logs, start_time)

    def add_metrics(self, logs: dict[str, float]) -> None:
        """Add the metrics of the steps since the last log."""
        logs.update(self.pending.take() | self.totals() | {"memory/peak_mib": peak_memory_mib()})

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Nothing: the evaluation callback acts on `eval_on_start`, by which the library calls this."""
        return {}

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the library's estimate knows neither images nor shared prompts."""
        return 0

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self.args.output_dir or ".")
        name = f"checkpoint-{self.state.global_step}"
        together = {"first": self.ranks.rank == 0, "barrier": self.ranks.barrier}
        with guard_writes(name, output_dir), staged(output_dir, name, **together) as self._staging:
            super()._save_checkpoint(model, trial)
            checkpoint = self._staging / name
            for member in self.members:
                member.save(checkpoint, writes=self.ranks.rank == 0)
            if self.args.should_save:
                save_pending(self, checkpoint)
        self._staging = None
        if self.ranks.rank == 0:
            rotate(output_dir, self.args.save_total_limit, output_dir / name, self.state.best_model_checkpoint)

    def is_finished(self, checkpoint: Path) -> bool:
        """Return whether this is the last checkpoint of a run, and load its weights and state. `train` would go on."""
        if not is_final(checkpoint):
            return False
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if self.sharding is None:
            load_weights(self.model, best or str(checkpoint), adapter=self.args.use_peft)
        return True

    def _load_best_model(self) -> None:
        """Called by the library at the end of a run with `load_best_model_at_end`; it knows no staged checkpoints."""
        load_weights(self.model, str(self.state.best_model_checkpoint), adapter=self.args.use_peft)

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """Keep the last checkpoint beside the best, also with `save_total_limit` 1: a finished run is known by it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **options)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            target = self.model if model is None else model
            load_weights(target, resume_from_checkpoint, adapter=self.args.use_peft)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        try:
            for member in self.members:
                member.load(Path(checkpoint))
        except FileNotFoundError as error:
            if error.filename and Path(checkpoint) not in Path(error.filename).parents:
                raise
            raise SettingError(
                f"{checkpoint} was written without dynamic_sampling or sync_ref_model: {error}"
            ) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that a resumed run reads, after the library has reset its counts of the logs."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_pending(self, Path(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an ordinary model directory, with FSDP's sharded checkpoints too."""
        if self.is_fsdp_enabled:
            self._save(output_dir, full_state_dict(self.model, trained_only=self.args.use_peft))
        else:
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with as_read(self.model, adapter=self.args.use_peft):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete_model_directory(output_dir or self.args.output_dir or ".", self.model, self.processor)

    # Hub: the model alone is pushed, once; the library would push every checkpoint, and all of output_dir

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: `push_to_hub` makes the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing."""

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Leave the model in output_dir and upload it, on every rank; return the repository's address on the first."""
        return leave_and_push(self, None, commit_message)


class UpdateEnd(TrainerCallback):
    """Calls a function after each step of the optimizer."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()
