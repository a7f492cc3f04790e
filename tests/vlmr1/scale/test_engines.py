"""Two processes (gloo, CPU) against one: the same losses, gradient norms and rewards for the same global batches.

The rows are laid out by the seeded order of the data so that in the first update one rank has no image, in the second
one rank has only groups of equal rewards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlmr1.arguments import parse_config
from vlmr1.base_trainer import as_list
from vlmr1.errors import SettingError
from vlmr1.models import load_model, load_processor
from vlmr1.run import check_settings, last_complete, train
from vlmr1.scale.launch import FSDP2, LAUNCHES, launch_command
from vlmr1.trainer import GRPOTrainer

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
ROOT = Path(__file__).parents[3]
ROWS = 8
UPDATES = 4
SETTINGS = {
    "model_name_or_path": "tiny",
    "accu_reward_method": "default",
    "num_generations": 3,
    "max_completion_length": 8,
    "max_steps": UPDATES,
    "steps_per_generation": 2,
    "save_steps": 3,  # in the middle of a generation
    "learning_rate": 1e-4,
    "reward_workers": 0,
    "question_template": "none",
    "disable_tqdm": "true",
}
REWARD = """
import zlib

def noise(prompts, completions, flat, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [0.0 if same else zlib.crc32(text.encode()) % 1000 / 1000 for text, same in zip(texts, flat)]
"""


def words(folder: Path, output: Path, **more: Any) -> list[str]:
    settings = SETTINGS | {
        "data_file_paths": folder / "data.jsonl",
        "image_folders": folder,
        "reward_funcs": f"{folder / 'reward.py'}:noise",
        "output_dir": output,
    }
    return [word for name, value in (settings | more).items() for word in (f"--{name}", str(value))]


def order_of_rows(folder: Path) -> list[int]:
    """The places of the rows in the order in which a run takes them."""
    config = parse_config(words(folder, folder / "unused", prompts_per_device=4, use_cpu="true"))
    model, processor = load_model(ROOT / "vlmr1/tiny/checkpoint"), load_processor(ROOT / "vlmr1/tiny/checkpoint")
    trainer = GRPOTrainer(model, config, [], processor)
    trainer.train_dataset = list(range(ROWS))
    trainer.data_collator = as_list
    return [row for batch in trainer.get_train_dataloader() for row in batch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    rng = np.random.default_rng(0)
    rows: list[dict] = [{}] * ROWS
    (folder / "data.jsonl").write_text('{"prompt": "?", "solution": "1", "flat": true}\n', encoding="utf-8")
    for place, row in enumerate(order_of_rows(folder)):
        update, rank = place // 2 % 2, place % 2  # two prompts an update, one a rank
        rows[row] = {"prompt": f"What is {row}?", "solution": "1", "flat": update == 1 and rank == 1}
        if update == 1 or rank == 0:
            size = (56, 84, 112)[row % 3]
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{row}.png")
            rows[row] |= {"prompt": f"Locate the digit {row}.", "image": f"{row}.png"}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def computed(step: dict[str, float]) -> dict[str, float]:
    """What of a step's metrics was not measured."""
    measured = ("second", "memory", "runtime")
    return {name: value for name, value in step.items() if not any(word in name for word in measured)}


def two_ranks(engine: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """As `vlmr1 train --launch` runs it; FSDP with the CPU in the place of a GPU."""
    if engine == "fsdp2":
        worker = str(Path(__file__).parent / "fsdp_on_cpu.py")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment, command = FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"}, [*torchrun, worker, "train", *arguments]
    else:
        environment, command = launch_command(engine, 2, arguments)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **environment, **paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)


def resumable(run: Path, copy: Path) -> Path:
    """What is left of a run that was killed behind its third update."""
    shutil.copytree(run / "checkpoint-3", copy / "checkpoint-3")
    for name in ("settings.json", "metrics.jsonl", "completions.jsonl"):
        shutil.copy(run / name, copy / name)
    return copy


def run_two(engine: str, folder: Path, output: Path, **more: Any) -> list[dict[str, float]]:
    done = two_ranks(engine, words(folder, output, prompts_per_device=1, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(output)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[float, list[dict[str, float]]]:
    """One process with twice the prompts, by beta."""
    found = {}
    for beta in (0.0, 0.04):
        output = folder / f"alone-{beta}"
        arguments = words(folder, output, prompts_per_device=2, beta=beta, use_cpu="true")
        train(parse_config(arguments))
        found[beta] = metrics(output)
    return found


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    names = ("loss", "grad_norm", "reward", "kl", "entropy", "tokens", "completion_length", "zero_variance_groups")
    for one, other in zip(found, expected, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (name, one["step"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_do_what_one_process_does_and_resume_exactly(engine, folder, alone, tmp_path):
    """With a reference model. The checkpoint lies between two updates of one generation."""
    found = run_two(engine, folder, tmp_path / "run", beta=0.04)
    assert_same(found, alone[0.04])
    assert found[1]["kl"] > 0

    resumed = resumable(tmp_path / "run", tmp_path / "resumed")
    again = run_two(engine, folder, resumed, beta=0.04)
    assert [computed(step) for step in again] == [computed(step) for step in found]

    exported = [load_file(path / "checkpoint-4" / "model.safetensors") for path in (tmp_path / "run", resumed)]
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        assert torch.equal(value, exported[1][name]), name
    read = load_model(tmp_path / "run" / "checkpoint-4")  # an ordinary directory
    before = load_model(ROOT / "vlmr1/tiny/checkpoint").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in read.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_lora_on_two_ranks(engine, folder, tmp_path):
    """The reference is the policy without its adapter; checkpoints hold the adapter."""
    lora = {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "beta": 0.04}
    train(parse_config(words(folder, tmp_path / "alone", prompts_per_device=2, use_cpu="true", **lora)))
    found = run_two(engine, folder, tmp_path / "run", **lora)
    assert_same(found, metrics(tmp_path / "alone"))
    assert found[-1]["kl"] > 0
    again = run_two(engine, folder, resumable(tmp_path / "run", tmp_path / "resumed"), **lora)
    assert [computed(step) for step in again] == [computed(step) for step in found]
    name = "checkpoint-4/adapter_model.safetensors"
    exported = [load_file(tmp_path / run / name) for run in ("run", "resumed", "alone")]
    for key, value in exported[0].items():
        assert torch.equal(value, exported[1][key]), key
        torch.testing.assert_close(value, exported[2][key], rtol=1e-3, atol=1e-5)


def evaluations(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "eval.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_frozen_tower_that_is_sharded(engine, folder, tmp_path):
    """Its features are made before the passes, also by a run that goes on within a generation; and the ranks share an
    evaluation."""
    more = {"beta": 0.04, "freeze_vision": "true", "eval_steps": 2}
    more |= {"eval_data_file_paths": folder / "data.jsonl", "eval_image_folders": folder}
    train(parse_config(words(folder, tmp_path / "alone", prompts_per_device=2, use_cpu="true", **more)))
    found = run_two(engine, folder, tmp_path / "run", **more)
    assert_same(found, metrics(tmp_path / "alone"))
    one, other = evaluations(tmp_path / "run"), evaluations(tmp_path / "alone")
    assert [row["step"] for row in one] == [2, 4] and [row["rows"] for row in one] == [ROWS, ROWS]
    for row, expected in zip(one, other, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    again = run_two(engine, folder, resumable(tmp_path / "run", tmp_path / "resumed"), **more)
    assert [computed(step) for step in again] == [computed(step) for step in found]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_signal_joins_every_pass(engine, folder, alone, tmp_path):
    """Without a KL, groups of equal rewards have no part in the passes: one rank has nothing else in an update."""
    assert_same(run_two(engine, folder, tmp_path, beta=0.0, save_strategy="no"), alone[0.0])
    assert alone[0.0][1]["dropped_rows"] > 0


@pytest.mark.slow
def test_the_rank_that_fails_says_why_and_ends_all(folder, tmp_path):
    reward = tmp_path / "bad.py"
    reward.write_text(
        "import os\n\ndef bad(prompts, completions, **columns):\n"
        "    return ['x' if os.environ['RANK'] == '1' else 0.0 for _ in completions]\n",
        encoding="utf-8",
    )
    done = two_ranks("ddp", words(folder, tmp_path / "run", prompts_per_device=1, reward_funcs=f"{reward}:bad"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("vlmr1: ")]
    assert said[0].startswith(f"vlmr1: rank 1: reward {reward}:bad: returned 'x'")
    assert said[1:] in ([], ["vlmr1: rank 0: another rank has ended: see what it wrote"])


def test_another_number_of_processes_is_refused(folder, tmp_path):
    config = parse_config(words(folder, tmp_path, prompts_per_device=2, use_cpu="true"))
    written = json.loads(config.to_json_string()) | {"processes": 2, "launch": "ddp"}
    (tmp_path / "settings.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(SettingError, match=r"processes is 1, but the run in .* was started with 2"):
        check_settings(config, tmp_path / "checkpoint-3")
    assert last_complete(tmp_path) is None


def test_launch_commands():
    environment, command = launch_command("zero3", 2, ["--recipe", "rec-3b"])
    config = json.loads(Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == 3
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    at = command.index("vlmr1.cli")
    assert command[at - 1 : at + 4] == ["-m", "vlmr1.cli", "train", "--recipe", "rec-3b"]
    assert "SIGUSR1" in command[command.index("--signals-to-handle") + 1]
    with pytest.raises(SettingError, match="unknown 'zero4'; known: ddp, fsdp2, zero2, zero3, zero3-offload"):
        launch_command("zero4", 2, [])
    with pytest.raises(SettingError, match="--processes is 0"):
        launch_command("ddp", 0, [])
    for name in LAUNCHES:
        if name.startswith("zero"):
            path = Path(LAUNCHES[name]["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
            assert json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"] == int(name[4])
