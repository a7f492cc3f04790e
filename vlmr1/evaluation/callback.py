"""Evaluation during training: the callback that runs it and writes eval.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from vlmr1.data.box_coordinates import Setting
from vlmr1.errors import SettingError
from vlmr1.evaluation.during_training import decoder_of, evaluate_during_training
from vlmr1.evaluation.settings import metric_name
from vlmr1.lifecycle.checkpoint import checkpoint_path, truncate_after
from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.progress import EVALUATIONS, read_lines
from vlmr1.types import Sample

if TYPE_CHECKING:
    from vlmr1.grpo.trainer import GRPOTrainer
    from vlmr1.lifecycle.signals import StopSignals


class PeriodicEvaluation(TrainerCallback):
    """Evaluate every `eval_steps` updates, and before the first with `eval_on_start`; each adds a line to eval.jsonl.
    A subclass has `measure`: the metrics by name, or None where `stopped()` became true.

    A resumed run drops the lines that it will write again, and adds the line of its own step where it is missing. A
    signal ends the run without an evaluation. With `stop` and one process, an evaluation ends after its batch."""

    def __init__(self, trainer: Any, samples: Sequence[Sample], *, stop: StopSignals | None = None):
        self.trainer = trainer
        self.samples = samples
        self.stop = stop if trainer.ranks.world_size == 1 else None  # ranks that gather must not part

    def measure(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missing = False
        if state.is_world_process_zero:
            with guard_writes(EVALUATIONS, Path(args.output_dir)):
                truncate_after(self._path(args), state.global_step)
            missing = all(line["step"] != state.global_step for line in read_lines(self._path(args)))
        due = args.eval_on_start if state.global_step == 0 else self._is_due(args, state)
        if due and self.trainer.ranks.all_gather(missing)[0]:
            self._evaluate(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the last step it is always set.
        stops = control.should_training_stop and state.global_step < state.max_steps
        compared = args.metric_for_best_model is not None and state.global_step == state.max_steps
        if (self._is_due(args, state) or compared) and not stops:
            self._evaluate(args, state, control)
            if self._is_stopped():
                assert self.stop is not None
                self.stop.on_step_end(args, state, control)  # a checkpoint of this step, not of the next

    def _is_due(self, args: Any, state: Any) -> bool:
        return args.eval_steps is not None and state.global_step % args.eval_steps == 0

    def _is_stopped(self) -> bool:
        return self.stop is not None and self.stop.caught > 0

    def _evaluate(self, args: Any, state: Any, control: Any) -> None:
        values = self.measure(self._is_stopped)
        if values is None:
            return
        self._compare(args, state, control, values)
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "rows": len(self.samples), **values}
        with guard_writes(EVALUATIONS, Path(args.output_dir)), self._path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not args.disable_tqdm:
            numbers = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
            with ignore_broken_pipe():
                tqdm.write(f"evaluation at step {state.global_step}  {numbers}")
        self._log({name.replace("eval/", "eval_", 1): value for name, value in values.items()}, control)

    def _compare(self, args: Any, state: Any, control: Any, values: dict[str, float]) -> None:
        """Record the checkpoint of this step as the best where its metric is; with save_strategy=best only then there
        is one."""
        by_best = args.save_strategy == SaveStrategy.BEST
        if args.metric_for_best_model is None or state.global_step == 0 or not (by_best or control.should_save):
            return
        name = f"eval/{metric_name(args.metric_for_best_model)}"
        if name not in values:
            raise SettingError(
                f"metric_for_best_model is {name!r}: an evaluation of these rows has {', '.join(values)}"
            )
        sign = 1 if args.greater_is_better else -1
        if state.best_metric is None or sign * values[name] > sign * state.best_metric:
            state.best_metric = values[name]
            state.best_model_checkpoint = str(checkpoint_path(Path(args.output_dir), state.global_step))
            control.should_save = True

    def _log(self, values: dict[str, float], control: Any) -> None:
        """Send values to the trackers, which show names with "eval_" as "eval/...".

        The state of training logs (pending metrics, whether a log is due) is restored."""
        trainer = self.trainer
        due = control.should_log
        steps, trainer.pending.steps = trainer.pending.steps, []
        trainer.log(values)
        trainer.pending.steps, control.should_log = steps, due

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir) / EVALUATIONS


class EvaluationCallback(PeriodicEvaluation):
    """Evaluate greedy completions by the run's rewards."""

    def __init__(
        self,
        trainer: GRPOTrainer,
        samples: Sequence[Sample],
        *,
        box_coordinates: Setting = "auto",
        stop: StopSignals | None = None,
    ):
        super().__init__(trainer, samples, stop=stop)
        self.decoder = decoder_of(trainer, box_coordinates)

    def measure(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        try:
            return evaluate_during_training(self.trainer, self.samples, self.decoder, stopped)
        finally:
            self.decoder.engine.free_cache()  # the engine of the rollouts has a cache of its own
