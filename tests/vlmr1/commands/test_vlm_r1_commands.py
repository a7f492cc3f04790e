"""The command lines that VLM-R1 publishes: flags and values of its scripts, in `tests/data/vlm_r1_commands.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.families import build
from tests.helpers.python import python
from vlmr1.cli import main
from vlmr1.report.progress import read_metrics

DATA = Path(__file__).parents[2] / "data"
PUBLISHED = json.loads((DATA / "vlm_r1_commands.json").read_text(encoding="utf-8"))
COMMANDS = PUBLISHED["commands"]
ROWS = {"run_grpo_rec_internvl.sh": "internvl-rec", "run_grpo_gui_defect_detection.sh": "gui-multi-image"}
SETTINGS = {  # what the flags become
    "run_grpo_rec.sh": {"reward_funcs": ["iou_qwen", "format_rec_qwen"], "question_template": "rec"},
    "run_grpo_rec_lora.sh": {"freeze_vision": True, "lora_dropout": 0.05, "share_prompt": True, "pack": True},
    "run_grpo_rec_internvl.sh": {"reward_funcs": ["iou_internvl", "format_rec_internvl"], "max_anyres_num": 6},
    "run_grpo_gui_defect_detection.sh": {"accu_reward_method": ["default"], "question_template": "default"},
    "run_grpo_rec_more_params.sh": {"epsilon_high": 0.28, "epsilon": 0.2},
}


def words(name: str, home: Path, replaced: dict[str, str]) -> list[str]:
    """The flags of a script as a shell passes them: an empty variable is no word."""
    flags = dict([*PUBLISHED["common"], *COMMANDS[name]["flags"]]) | replaced
    values = {flag: value.replace("REPO_HOME", str(home)) for flag, value in flags.items()}
    return [word for flag, value in values.items() for word in (flag, *value.split())]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny model of each family, with room for 2048 tokens; every eighth token ends a completion."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen2_5_vl", "internvl"):
        change(build(family, folder / family) / "config.json", "text_config", {"max_position_embeddings": 4096})
        ends = [*range(0, 400, 8)]
        change(folder / family / "generation_config.json", None, {"eos_token_id": ends})
    return folder


def change(path: Path, part: str | None, values: dict) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    (content[part] if part else content).update(values)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_line_trains(name, models, tmp_path):
    """Model, data, number of processes, tracker and attention are replaced, and two updates are made."""
    scripts = tmp_path / PUBLISHED["local_scripts"]
    scripts.mkdir(parents=True)
    for file, content in PUBLISHED["deepspeed"].items():
        (scripts / file).write_text(json.dumps(content), encoding="utf-8")
    rows = DATA / "standins" / f"{ROWS.get(name, 'rec-3b')}.jsonl"
    replaced = {
        "--model_name_or_path": str(models / COMMANDS[name]["family"]),
        "--data_file_paths": f"{rows}:{rows}",
        "--image_folders": ":".join([str(DATA / "standins" / "images")] * 2),
        "--report_to": "none",
        "--attn_implementation": "sdpa",
        "--max_steps": "2",
        "--processes": "1",
    }
    done = python("-m", "vlmr1.cli", "train", *words(name, tmp_path, replaced))
    assert done.returncode == 0, done.stderr[-3000:]
    (output,) = (tmp_path / "checkpoints" / "rl").iterdir()
    steps = read_metrics(output)
    assert [step["step"] for step in steps] == [1, 2]
    assert "20 rows; an update: 2 prompts x 8 generations = 16 sequences" in done.stdout
    written = json.loads((output / "settings.json").read_text(encoding="utf-8"))
    expected = SETTINGS[name] | {"bf16": True, "prompts_per_device": 2, "beta": 0.04, "launch": f"zero{stage(name)}"}
    assert {setting: written[setting] for setting in expected} == expected
    assert "Traceback" not in done.stderr


def stage(name: str) -> str:
    return dict(COMMANDS[name]["flags"])["--deepspeed"][-6]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_published_command_line_misses_is_one_message(name, tmp_path, capsys):
    assert main(["train", *words(name, tmp_path, {})]) == 2
    message = capsys.readouterr().err.partition("vlmr1: ")[2]
    flags = dict(COMMANDS[name]["flags"])
    missing = [
        "report_to=wandb needs wandb: pip install 'wandb'",
        "attn_implementation=flash_attention_2 needs flash-attn",
    ]
    missing += flags["--data_file_paths"].split(":")
    missing += [flags["--model_name_or_path"], "zero2.json" if stage(name) == "2" else "zero3.json"]
    missing += ["image_folders: /training/shz/dataset/coco" if flags["--image_folders"] else "--image_folders"]
    assert [each for each in missing if each not in message] == [], message
    assert len(message.splitlines()) == 5 + len(flags["--data_file_paths"].split(":"))
