"""The golden runs: rows, reward, settings, and what shows that a run exercises what it is named after."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

UPDATES = 5
OUTPUT = "out"
ROWS = 12
CELL = 14  # px: one patch of the tiny model's tower
Metrics = Mapping[str, float]
# Many values, which depend on every character, and equal ones for rows marked `flat`.
REWARD = """
import zlib

def noise(completions, flat=None, **columns):
    texts = [completion[0]["content"] for completion in completions]
    flat = flat or [False] * len(texts)
    return [0.0 if same else zlib.crc32(text.encode()) % 1000 / 1000 for text, same in zip(texts, flat)]
"""
COMMON: Mapping[str, Any] = {
    "model_name_or_path": "tiny",
    "max_steps": UPDATES,
    "save_steps": 3,
    "prompts_per_device": 2,
    "num_generations": 3,
    "max_completion_length": 24,
    "temperature": 1.3,
    "learning_rate": 1e-4,
    "reward_workers": 0,
    "write_report": "false",
    "disable_tqdm": "true",
    "log_completions": 0,
}


@dataclass(frozen=True)
class Case:
    """One run: its settings beyond COMMON, its faults, and a check that it exercises its subject."""

    settings: Mapping[str, Any]
    shows: Callable[[Sequence[Metrics]], bool]
    data: Sequence[str] = ("rows",)
    rewards: Sequence[str] = ("accuracy", "noise")
    ranks: int = 1
    faults: Mapping[str, Sequence[int]] = field(default_factory=dict)
    killed: bool = False  # by its faults; the same command then continues it


def largest(rows: Sequence[Metrics], name: str) -> float:
    return max(row.get(name, 0.0) for row in rows)


def differs(rows: Sequence[Metrics], name: str) -> bool:
    return len({row[name] for row in rows}) > 1


OFF_POLICY = {
    "old_logprobs": "recompute",
    "importance_sampling_correction": "token_truncate",
    "importance_sampling_cap": 0.9,
    "steps_per_generation": 2,
}
TWO_ITERATIONS = {"steps_per_generation": 2, "num_iterations": 2}
CASES: Mapping[str, Case] = {
    "naive": Case(
        {"share_vision": "false", "share_prompt": "false", "pack": "false"},
        lambda rows: rows[0]["repeated_prompt_tokens"] > 100,
    ),
    "shared": Case({}, lambda rows: rows[0]["packs"] == 1 and largest(rows, "kl") > 0),
    "lora": Case(
        {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}, lambda rows: largest(rows, "kl") > 0
    ),
    "kl_in_reward": Case({"kl_in_reward": "true", "beta": 0.5}, lambda rows: differs(rows, "reward")),
    "dynamic_sampling": Case(
        {"dynamic_sampling": "true", "dynamic_sampling_max_rounds": 2, "question_template": "rec"},
        lambda rows: largest(rows, "dynamic_sampling/groups_replaced") > 0,
        data=("flat",),
        rewards=("noise",),
    ),
    "num_iterations": Case(TWO_ITERATIONS, lambda rows: rows[2]["ratio_max"] > 1.001),
    "off_policy": Case(OFF_POLICY, lambda rows: largest(rows, "rollout/importance_cut") > 0),
    "masked_truncation": Case(
        {"mask_truncated_completions": "true", "max_completion_length": 21},
        lambda rows: any(0 < row["truncated"] < 1 for row in rows),
    ),
    "out_of_memory": Case(
        {**OFF_POLICY, "num_generations": 8},
        lambda rows: largest(rows, "out_of_memory") == 3 and rows[0]["packs"] == 1 < rows[-1]["packs"],
        faults={"reference": [3], "forward": [4], "backward": [9]},
    ),
    "frozen_tower": Case({"freeze_vision": "true"}, lambda rows: differs(rows, "grad_norm")),
    "sync_ref_model": Case(
        {"sync_ref_model": "true", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
        lambda rows: largest(rows, "kl") > 0,
    ),
    "detection": Case(
        {"accu_reward_method": ["od_ap", "weighted_sum"], "question_template": "rec", "max_completion_length": 32},
        lambda rows: sum(row["rewards/accuracy/std"] > 0 for row in rows) > 1,
        data=("boxes_one", "boxes_two"),
        rewards=("accuracy", "format"),
    ),
    "text_only": Case(
        {"accu_reward_method": "default", "question_template": "none"},
        lambda rows: rows[0]["packed_tokens"] < 300,
        data=("texts",),
    ),
    "two_ranks": Case(
        {"prompts_per_device": 1, "steps_per_generation": 2}, lambda rows: differs(rows, "grad_norm"), ranks=2
    ),
    "resumed": Case(
        TWO_ITERATIONS, lambda rows: [row["step"] for row in rows] == [1, 2, 3, 4, 5], faults={"kill": [5]}, killed=True
    ),
}


def write_inputs(folder: Path) -> None:
    """Data files, images and the reward, the same on every machine."""
    (folder / "images").mkdir(parents=True)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    rng = np.random.default_rng(17)
    rows = [_row(folder, rng, number) for number in range(ROWS)]
    _write(folder / "rows.jsonl", rows)
    _write(folder / "flat.jsonl", [row | {"flat": number % 3 > 0} for number, row in enumerate(rows)])
    boxes = [row | {"solution": f"<answer>```json\n[{row['box']}]\n```</answer>"} for row in rows]
    _write(folder / "boxes_one.jsonl", boxes[: ROWS // 2])
    _write(folder / "boxes_two.jsonl", boxes[ROWS // 2 :])
    texts = [{"prompt": f"What is {n} plus {n * n % 7}?", "solution": str(n + n * n % 7)} for n in range(ROWS)]
    _write(folder / "texts.jsonl", texts)


def arguments(case: Case) -> list[str]:
    """The words behind `vlmr1 train`, run in the folder of the inputs: paths are relative, as metrics are named after
    them."""
    given = {
        "data_file_paths": [f"{name}.jsonl" for name in case.data],
        "image_folders": "images",
        "reward_funcs": ["reward.py:noise" if name == "noise" else name for name in case.rewards],
        "output_dir": OUTPUT,
    }
    launch = ["--launch", "ddp", "--processes", str(case.ranks)] if case.ranks > 1 else []
    words = [] if launch else ["--use_cpu", "true"]
    for name, value in (COMMON | given | dict(case.settings)).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*launch, *words]


def _row(folder: Path, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A canvas with a bright blot on a ramp, and the question where it is."""
    cells = int(rng.choice((8, 10)))
    left, top = (int(rng.integers(0, cells - 4)) * CELL for _ in range(2))
    right, bottom = left + 3 * CELL, top + 3 * CELL
    ramp = np.linspace(20, 220, cells * CELL)
    pixels = np.zeros((cells * CELL, cells * CELL, 3))
    pixels[..., 0], pixels[..., 1] = ramp[None, :], ramp[:, None]
    pixels[top:bottom, left:right, 2] = np.kron(rng.integers(60, 255, (3, 3)), np.ones((CELL, CELL)))
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
    box = json.dumps({"bbox_2d": [left, top, right, bottom], "label": str(number % 10)})
    question = f"Locate the digit {number % 10}."
    return {"prompt": question, "image": f"{number}.png", "solution": f"<answer>{box}</answer>", "box": box}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
