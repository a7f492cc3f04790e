"""Evaluation while a run trains: greedy, by the run's own rewards, without a trace in what is trained."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from vlmr1.data.box_coordinates import Setting
from vlmr1.distributed.sharded import summon_full_params
from vlmr1.evaluation.coco import AveragePrecision, ImageBoxes
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.detection import asked, best_of_each, predicted, truths_of
from vlmr1.evaluation.rec import score_rec
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.run_rows import kind_of_boxes
from vlmr1.evaluation.scoring import sizes_of
from vlmr1.lifecycle.checkpoint import truncate_after
from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.progress import read_lines
from vlmr1.rewards.groups import score_groups
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rollout import ENGINES
from vlmr1.types import Sample
from vlmr1_kernels import use

if TYPE_CHECKING:
    from vlmr1.grpo.trainer import GRPOTrainer
    from vlmr1.lifecycle.signals import StopSignals

EVALUATIONS = "eval.jsonl"


class EvaluationCallback(TrainerCallback):
    """Evaluates every `eval_steps` updates, and before the first with `eval_on_start`; a line each in eval.jsonl.

    A resumed run drops the lines that it will write again, and makes up the one of its step where that is missing. A
    signal does not wait for an evaluation: at the step that it ends there is none, and where `stop` is given and there
    is one process, one that is running is given up after its batch."""

    def __init__(
        self,
        trainer: GRPOTrainer,
        samples: Sequence[Sample],
        *,
        box_coordinates: Setting = "auto",
        stop: StopSignals | None = None,
    ):
        self.trainer = trainer
        self.samples = samples
        self.decoder = decoder_of(trainer, box_coordinates)
        self.stop = stop if trainer.ranks.world_size == 1 else None  # ranks that gather must not part

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
        stops = control.should_training_stop and state.global_step < state.max_steps  # at the last step it always is
        if self._is_due(args, state) and not stops:
            self._evaluate(args, state, control)
            if self._is_stopped():
                assert self.stop is not None
                self.stop.on_step_end(args, state, control)  # a checkpoint of this step, not of the next

    def _is_due(self, args: Any, state: Any) -> bool:
        return args.eval_steps is not None and state.global_step % args.eval_steps == 0

    def _is_stopped(self) -> bool:
        return self.stop is not None and self.stop.caught > 0

    def _evaluate(self, args: Any, state: Any, control: Any) -> None:
        values = evaluate_during_training(self.trainer, self.samples, self.decoder, self._is_stopped)
        if values is None or not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "rows": len(self.samples), **values}
        with (
            guard_writes(EVALUATIONS, Path(args.output_dir)),
            self._path(args).open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")
        if not args.disable_tqdm:
            numbers = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
            with ignore_broken_pipe():
                tqdm.write(f"evaluation at step {state.global_step}  {numbers}")
        self._log({name.replace("eval/", "eval_", 1): value for name, value in values.items()}, control)

    def _log(self, values: dict[str, float], control: Any) -> None:
        """To trackers, which get what begins with "eval_" as "eval/...". What a log uses up, the steps since the last
        one and that one is due, is left to the log of the training."""
        trainer = self.trainer
        due = control.should_log
        steps, trainer.pending.steps = trainer.pending.steps, []
        trainer.log(values)
        trainer.pending.steps, control.should_log = steps, due

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir) / EVALUATIONS


def evaluate_during_training(
    trainer: GRPOTrainer,
    samples: Sequence[Sample],
    decoder: Decoder | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Greedy completions of these samples by the trainer's present weights, one each -> values by name; None where
    `stopped`, which is asked before each batch, was true.

    `eval/rewards/NAME/mean` of each of the run's rewards; where `accuracy` scores all rows by IoU `eval/rec/...`, where
    by boxes with labels `eval/ovd/...`; lengths. The model's mode and all random states are as before."""
    decoder = decoder or decoder_of(trainer)
    size = trainer.args.prompts_per_device * trainer.args.num_generations  # as many as the rollout has in flight
    ranks = trainer.ranks
    scored: list[tuple[int, list[float], Record]] = []  # row, rewards, what was decoded
    with untouched(), use(trainer.args.kernels), summon_full_params(trainer.model, trainer.sharding):
        for start in range(ranks.rank * size, len(samples), ranks.world_size * size):
            if stopped():
                return None
            drawn = decoder.groups(samples[start : start + size])
            groups = score_groups(drawn, trainer.rewards, pool=trainer.reward_pool)
            for i, group in enumerate(groups):
                assert group.rewards is not None
                scored.append((start + i, group.rewards[0].tolist(), decoder.record(drawn[i], start + i)))
    rows = sorted((row for own in ranks.all_gather(scored) for row in own), key=lambda row: row[0])
    rewards = torch.tensor([values for _, values, _ in rows], dtype=torch.float64)  # [rows, R]
    records = [record for _, _, record in rows]
    means = rewards.mean(0).tolist()
    values = {f"eval/rewards/{reward.name}/mean": mean for reward, mean in zip(trainer.rewards, means, strict=True)}
    values |= _box_metrics(trainer, samples, records)
    values["eval/completion_length"] = sum(len(record.token_ids) for record in records) / len(records)
    values["eval/truncated"] = sum(record.finish_reason == "length" for record in records) / len(records)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def decoder_of(trainer: GRPOTrainer, box_coordinates: Setting = "auto") -> Decoder:
    """Decodes with the trainer's model and settings, by an engine of its own: the run's one keeps its statistics."""
    args, engine = trainer.args, trainer.engine
    own = ENGINES[args.rollout_engine](
        engine.model,
        trainer.family,
        trainer.processor.tokenizer,
        dtype=trainer.dtype,
        kv_mib=args.rollout_kv_mib,
        cuda_graphs=args.cuda_graphs,
    )
    decoder = Decoder(
        engine.model,
        trainer.processor,
        max_completion_length=args.max_completion_length,
        box_coordinates=box_coordinates,
        with_boxes=any(settings.mode == "strict" for settings in accuracy_of(trainer)),
        engine=own,
    )
    decoder.sampling = replace(trainer.sampling, greedy=True)  # the run's stop strings and penalty
    return decoder


def accuracy_of(trainer: GRPOTrainer) -> list[RewardSettings]:
    """The settings of the run's accuracy reward; none where it has none."""
    return [reward.settings for reward in trainer.rewards if reward.name == "accuracy" and reward.settings is not None]


def _box_metrics(trainer: GRPOTrainer, samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, float]:
    """Metrics of rec or ovd, where the accuracy reward of every row is of that kind and every row has one image."""
    kind = next((kind_of_boxes(samples, settings) for settings in accuracy_of(trainer)), None)
    if kind is None:
        return {}
    texts = [record.completion for record in records]
    sizes = [sizes_of(record) for record in records]
    if kind == "rec":
        result = score_rec(texts, [sample.solution for sample in samples], sizes)
        return {"eval/rec/acc@0.5": result.accuracy, "eval/rec/mean_iou": result.mean_iou}
    said = [predicted(text, *size) or () for text, size in zip(texts, sizes, strict=True)]
    images = [ImageBoxes(truths_of(sample), boxes) for sample, boxes in zip(samples, said, strict=True)]
    labels = {label for sample in samples for label in asked(sample)}
    labels |= {true.label for image in images for true in image.truths}
    plain = AveragePrecision(images, sorted(labels))
    best = AveragePrecision([best_of_each(image) for image in images], sorted(labels))
    values = {f"eval/ovd/{name}": plain.value(name) for name in ("ap", "ap50")}
    return values | {"eval/ovd/nms_ap": best.value("ap")}


@contextmanager
def untouched() -> Iterator[None]:
    """Random states at the end as at the beginning."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
