"""Evaluation while a run trains: greedy, by the run's own rewards, without a trace in what is trained."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from vlmr1.checkpoint import truncate_after
from vlmr1.data.samples import Samples, load_samples
from vlmr1.data.sources import split_names
from vlmr1.data.templates import question_text
from vlmr1.errors import SettingError
from vlmr1.evaluation.coco import AveragePrecision, ImageBoxes
from vlmr1.evaluation.coordinates import Coordinates
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.detection import asked, best_of_each, predicted, truths_of
from vlmr1.evaluation.rec import score_rec
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.scored import sizes_of
from vlmr1.rewards.groups import score_groups
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.registry import checks_of
from vlmr1.rewards.score import METHOD
from vlmr1.rollout import ENGINES
from vlmr1.scale.sharded import whole
from vlmr1.types import Sample
from vlmr1_kernels import use

if TYPE_CHECKING:
    from vlmr1.config import GRPOConfig
    from vlmr1.trainer import GRPOTrainer

EVALUATIONS = "eval.jsonl"
OF_BOXES = ("map", "od_ap", "od_ap50", "odLength", "weighted_sum")


def evaluation_samples(
    config: GRPOConfig, model_type: str, processor: Any, validation: Sequence[Sample] | None = None
) -> Sequence[Sample] | None:
    """The rows that a run evaluates, each checked against its rewards: of `eval_data_file_paths`, else `validation`,
    the part of the data that was kept from training. None where the settings ask for no evaluation."""
    if config.eval_steps is None and not config.eval_on_start:
        return None
    if config.eval_data_file_paths:
        rewards = config.rewards().with_boxes(config.box_coordinates, model_type, processor.image_processor)
        files = split_names(config.eval_data_file_paths)
        samples: Sequence[Sample] = load_samples(
            files,
            config.eval_image_folders,
            question=question_text(config.question_template, model_type),
            check_images=config.check_images,
            prompt_column=config.prompt_column,
            solution_column=config.solution_column,
            checks=checks_of(config.reward_funcs, rewards),
            defaults=columns_of_files(len(files), config.accu_reward_method),
        )
    elif validation is not None:
        samples = validation
    else:
        name = "eval_on_start" if config.eval_steps is None else "eval_steps"
        raise SettingError(f"{name} needs data to evaluate on: set eval_data_file_paths, or val_split_ratio")
    if config.eval_limit is not None:
        samples = _first(samples, config.eval_limit)
    return samples


def _first(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """The first samples, read when they are asked for where these are."""
    return samples.select(samples.indices[:count]) if isinstance(samples, Samples) else samples[:count]


class EvaluationCallback(TrainerCallback):
    """Evaluates every `eval_steps` updates, and before the first with `eval_on_start`; a line each in eval.jsonl.

    A resumed run drops the lines that it will write again."""

    def __init__(self, trainer: GRPOTrainer, samples: Sequence[Sample], *, box_coordinates: Coordinates = "auto"):
        self.trainer = trainer
        self.samples = samples
        self.decoder = decoder_of(trainer, box_coordinates)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            truncate_after(self._path(args), state.global_step)
        if args.eval_on_start and state.global_step == 0:
            self._evaluate(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_steps is not None and state.global_step % args.eval_steps == 0:
            self._evaluate(args, state, control)

    def _evaluate(self, args: Any, state: Any, control: Any) -> None:
        values = evaluate_during_training(self.trainer, self.samples, self.decoder)
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "rows": len(self.samples), **values}
        with self._path(args).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not args.disable_tqdm:
            numbers = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
            tqdm.write(f"evaluation at step {state.global_step}  {numbers}")
        self._log({name.replace("eval/", "eval_", 1): value for name, value in values.items()}, control)

    def _log(self, values: dict[str, float], control: Any) -> None:
        """To trackers, which get what begins with "eval_" as "eval/...". What a log uses up, the steps since the last
        one and that one is due, is left to the log of the training."""
        trainer = self.trainer
        due = control.should_log
        unlogged, trainer.unlogged = trainer.unlogged, []
        trainer.log(values)
        trainer.unlogged, control.should_log = unlogged, due

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir) / EVALUATIONS


def evaluate_during_training(
    trainer: GRPOTrainer, samples: Sequence[Sample], decoder: Decoder | None = None
) -> dict[str, float]:
    """Greedy completions of these samples by the trainer's present weights, one each -> values by name.

    `eval/rewards/NAME/mean` of each of the run's rewards; where `accuracy` scores all rows by IoU `eval/rec/...`, where
    by boxes with labels `eval/ovd/...`; lengths. The model's mode and all random states are as before."""
    decoder = decoder or decoder_of(trainer)
    size = trainer.args.prompts_per_device * trainer.args.num_generations  # as many as the rollout has in flight
    ranks = trainer.ranks
    scored: list[tuple[int, list[float], Record]] = []  # row, rewards, what was decoded
    with untouched(), use(trainer.args.kernels), whole(decoder.engine.model, trainer.sharding):
        for start in range(ranks.rank * size, len(samples), ranks.world * size):
            drawn = decoder.groups(samples[start : start + size])
            groups = score_groups(drawn, trainer.rewards, pool=trainer.reward_pool)
            for i, group in enumerate(groups):
                assert group.rewards is not None
                scored.append((start + i, group.rewards[0].tolist(), decoder.record(drawn[i], start + i)))
    rows = sorted((row for own in ranks.gather(scored) for row in own), key=lambda row: row[0])
    rewards = torch.tensor([values for _, values, _ in rows], dtype=torch.float64)  # [rows, R]
    records = [record for _, _, record in rows]
    means = rewards.mean(0).tolist()
    values = {f"eval/rewards/{reward.name}/mean": mean for reward, mean in zip(trainer.rewards, means, strict=True)}
    values |= _box_metrics(trainer, samples, records)
    values["eval/completion_length"] = sum(len(record.token_ids) for record in records) / len(records)
    values["eval/truncated"] = sum(record.finish_reason == "length" for record in records) / len(records)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def decoder_of(trainer: GRPOTrainer, box_coordinates: Coordinates = "auto") -> Decoder:
    """Decodes with the trainer's model and settings, by an engine of its own: the run's one keeps its statistics."""
    args, engine = trainer.args, trainer.engine
    own = ENGINES[args.rollout_engine](
        engine.model,
        trainer.adapter,
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
        with_boxes="accuracy" in [reward.name for reward in trainer.rewards],
        engine=own,
    )
    decoder.sampling = replace(trainer.sampling, greedy=True)  # the run's stop strings and penalty
    return decoder


def _box_metrics(trainer: GRPOTrainer, samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, float]:
    """Metrics of rec or ovd, where the accuracy reward of every row is of that kind and every row has one image."""
    settings = next((reward.settings for reward in trainer.rewards if reward.name == "accuracy"), None)
    if settings is None or any(record.box_extent is None for record in records):
        return {}
    methods = {sample.columns.get(METHOD) or settings.accu_reward_method for sample in samples}
    texts = [record.completion for record in records]
    sizes = [sizes_of(record) for record in records]
    if methods == {"iou"}:
        result = score_rec(texts, [sample.solution for sample in samples], sizes)
        return {"eval/rec/acc@0.5": result.accuracy, "eval/rec/mean_iou": result.mean_iou}
    if not methods <= set(OF_BOXES):
        return {}
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
