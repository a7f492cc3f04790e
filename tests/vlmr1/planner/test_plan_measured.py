"""The planned peak beside the bytes that a real run allocates. No constant of the plan was fitted to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.helpers.jobs import CONFIG, Allocated
from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model
from vlmr1.planner.job import Job
from vlmr1.planner.plan import Plan, Planner
from vlmr1.tiny import CHECKPOINT, digits


class SecondUpdate(TrainerCallback):
    """Forget the peak of the first update, which has no optimizer states before its end."""

    def __init__(self, run: Allocated):
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.run.restart()


def spread(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def run_and_plan(folder: Path, processor: Any, **settings: Any) -> tuple[int, Plan]:
    """Peak of the second of two updates whose completions all meet the limit, beyond the model that was there before;
    and the plan of the same settings."""
    digits.write(folder / "data", "train", 2 * settings["prompts_per_device"], seed=5)
    files, images = [folder / "data/train.jsonl"], [folder / "data/images"]
    samples = load_samples(files, images, question="{question}", check_images=False)
    given: dict[str, Any] = {"use_cpu": True, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    given |= {"report_to": "none", "reward_workers": 0, "memory_by_phase": False, "write_report": False}
    args = GRPOConfig(output_dir=str(folder / "output"), **given, **settings)
    model: Any = load_model(CHECKPOINT)
    run = Allocated("run")
    run.leave_out([*model.parameters(), *model.buffers()])
    with run:
        trainer: Any = GRPOTrainer(model, args, samples, processor, reward_funcs=[spread])
        trainer.engine.ignore_eos = True  # all completions meet the limit
        trainer.add_callback(SecondUpdate(run))
        trainer.train()
    ids = max((trainer.train_dataset[i].input_ids for i in range(len(samples))), key=len)
    image = int((ids == CONFIG.image_token_id).sum())
    plan = Planner().plan(Job(args, CONFIG, "cpu", image_tokens=image, text_tokens=len(ids) - image))
    return run.peak, plan


CASES: dict[str, dict[str, Any]] = {
    "groups in packs": {"num_generations": 16, "max_completion_length": 32, "prompts_per_device": 3, "beta": 0.04}
    | {"tokens_per_pack": 1000},
    "checkpointing": {"num_generations": 6, "max_completion_length": 48, "prompts_per_device": 4, "beta": 0.0}
    | {"activation_checkpointing": True, "skip_zero_advantage": False},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_the_peak_is_within_5_percent_of_what_a_run_allocates(settings, tmp_path, processor):
    allocated, plan = run_and_plan(tmp_path, processor, **settings)
    there = plan.phases["policy"]["weights"], plan.phases["policy"]["images"]  # numpy makes images, not an operator
    assert plan.peak_phase == "policy"
    assert plan.peak - sum(there) == pytest.approx(allocated, rel=0.05)
