"""Settings of the packages: where they are declared, what a package receives, old names, and their help."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from vlmr1.cli import COMMANDS
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.settings_help import TRL_DEFAULTS, TRL_SFT_DEFAULTS, every_setting, one_setting
from vlmr1.config import GRPOConfig, SFTConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.settings import ObjectiveSettings
from vlmr1.lifecycle import renamed
from vlmr1.lifecycle.run_settings import LAUNCH, check_settings
from vlmr1.rewards import score
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rollout.settings import RolloutSettings
from vlmr1.training.run_config import SUPPORTED_ARGS

CPU = ["--use_cpu", "true"]
DATA = Path(__file__).parents[1] / "data"
INHERITED = {each.name for each in fields(TrainingArguments)}
SUPPORTED = {name for names in SUPPORTED_ARGS.values() for name in names}


@pytest.mark.parametrize("kind", [GRPOConfig, SFTConfig])
def test_each_setting_is_declared_once(kind):
    """By one package; those of transformers by none, save for the help of output_dir."""
    declared = [name for part in kind.parts() for name in vars(part)["__annotations__"]]
    assert len(declared) == len(set(declared)) and not set(declared) & INHERITED
    assert set(declared) == {each.name for each in fields(kind)} - INHERITED


def test_a_package_receives_a_read_only_copy_of_its_own_settings():
    config = GRPOConfig(use_cpu=True, seed=3, temperature=0.5, stop_strings=["a"])
    settings = RolloutSettings.of(config)
    config.temperature = 0.7
    config.stop_strings.append("b")
    assert (settings.temperature, settings.seed, settings.stop_strings) == (0.5, 3, ["a"])
    with pytest.raises(FrozenInstanceError, match="temperature"):
        settings.temperature = 0.1
    for part in GRPOConfig.parts():
        own = {each.name for each in fields(part)} | set(part.shared)  # type: ignore[arg-type]
        assert vars(part.of(config)).keys() - {"_read_only"} == own
    assert ObjectiveSettings.of(config).objective() == config.objective()


FAULTS = {
    "one package": ({"temperature": 0.0, "top_p": 2.0}, ["temperature is 0.0", "top_p is 2.0"]),
    "packages": (
        {"num_generations": 1, "beta": -1.0, "lora_r": 4, "eval_limit": 3},
        ["lora_r needs use_peft", "num_generations is 1", "beta is -1.0", "eval_limit needs eval_steps"],
    ),
    "inherited and own": (
        {"label_smoothing_factor": 0.1, "top_k": -1},
        ["label_smoothing_factor cannot", "top_k is -1"],
    ),
    "between packages": (
        {"reference": "adapter", "save_strategy": "best", "top_k": -1},
        ["top_k is -1", "reference=adapter needs use_peft", "save_strategy=best needs eval_steps"],
    ),
}


@pytest.mark.parametrize("settings, expected", FAULTS.values(), ids=FAULTS.keys())
def test_all_faults_are_reported_together(settings, expected):
    with pytest.raises(SettingError) as caught:
        GRPOConfig(use_cpu=True, **settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    assert all(any(line.startswith(each) for line in lines) for each in expected)


# What this machine cannot do

DEVICE = {
    "optim": {"optim": "paged_adamw_8bit"},
    "activation_offload": {"activation_offload": True, "activation_checkpointing": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "fused_layers": {"fused_layers": "liger"},
    "cuda_graphs": {"cuda_graphs": True},
}


@pytest.mark.parametrize("name", DEVICE)
def test_the_device_is_checked_by_the_preflight_alone(name, model, processor, tmp_path):
    """Settings can be made anywhere, for a plan; a trainer on this device cannot."""
    from vlmr1.grpo.trainer import GRPOTrainer

    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **DEVICE[name])
    with pytest.raises(SettingError, match=name):
        config.check_device()
    with pytest.raises(SettingError, match=name):
        GRPOTrainer(model, config, [], processor, ["format"])


def test_use_liger_kernel_means_fused_layers():
    """Trainer would change classes of the library."""
    config = GRPOConfig(use_cpu=True, use_liger_kernel=True)
    assert (config.fused_layers, config.use_liger_kernel) == ("liger", False)
    assert GRPOConfig(use_cpu=True).fused_layers == "auto"


def test_the_preflight_reports_all_faults_together():
    config = GRPOConfig(use_cpu=True, **DEVICE["optim"], **DEVICE["cuda_graphs"])
    with pytest.raises(SettingError) as caught:
        config.check_device()
    assert [line.split("=")[0].split()[0] for line in str(caught.value).splitlines()] == ["optim", "cuda_graphs"]


def test_what_a_gpu_can_do_passes(monkeypatch):
    monkeypatch.setattr("vlmr1.errors.find_spec", lambda name: True)
    GRPOConfig(use_cpu=True, **{name: value for each in DEVICE.values() for name, value in each.items()}).check_device(
        "cuda"
    )
    with pytest.raises(SettingError, match="full_determinism"):
        GRPOConfig(use_cpu=True, full_determinism=True).check_device("cuda")


# Old names

OLD: dict[str, Any] = {"kl": "k2", "rollout_logp_alarm": 0.5, "reward_mode": "vlmr1"}
NEW = {"kl_estimator": "k2", "rollout_logp_warn_threshold": 0.5, "reward_mode": "vlm_r1"}


@pytest.fixture
def notes(caplog):
    renamed.note_spelling.cache_clear()
    caplog.set_level(logging.WARNING, "vlmr1")
    return caplog


@pytest.mark.parametrize("source", ["python", "command line", "file"])
def test_old_names(source, notes, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("kl: k2\nrollout_logp_alarm: 0.5\nreward_mode: vlmr1\n")
    words = ["--kl", "k2", "--rollout-logp-alarm=0.5", "--reward_mode", "vlmr1"]
    if source == "python":
        config = GRPOConfig(use_cpu=True, **OLD)
    else:
        config = parse_config([*CPU, *words]) if source == "command line" else parse_config(CPU, config=path)
    assert {name: getattr(config, name) for name in NEW} == NEW
    assert len(notes.records) == 3
    assert all(any(name in record.getMessage() for record in notes.records) for name in (*OLD, *NEW))
    assert (config.kl, config.rollout_logp_alarm) == ("k2", 0.5)  # read by older code


def test_old_mode_of_a_score(notes):
    text = "<think>a</think><answer>{}</answer>"
    assert RewardSettings(mode="vlmr1") == RewardSettings(mode="vlm_r1")  # type: ignore[arg-type]
    assert score("format", text, "x", mode="vlmr1") == score("format", text, "x", mode="vlm_r1")
    with pytest.raises(SettingError, match="reward_mode"):
        score("format", text, "x", mode="vlmr2")


def test_a_run_with_old_names_in_its_settings_is_continued(notes, tmp_path):
    """settings.json as a run wrote it before the renames: the same settings go on, others are refused by their name."""
    shutil.copy(DATA / "settings-before-renames.json", tmp_path / "settings.json")
    words = ["--output_dir", "out", "--max_steps", "4", "--save_steps", "2", "--prompts_per_device", "2"]
    words += ["--data_file_paths", "digits", "--reward_mode", "vlm_r1", *CPU]
    words += ["--beta", "1.0", "--learning_rate", "6e-5", "--freeze_vision", "false"]  # the recipe's of that time
    resume = tmp_path / "checkpoint-2"
    check_settings(parse_config([*words, "--kl_estimator", "k2"], recipe="tiny-digits"), LAUNCH, resume)
    changes = [*words, "--kl_estimator", "k2", "--rollout_logp_warn_threshold", "9"]
    check_settings(parse_config(changes, recipe="tiny-digits"), LAUNCH, resume)  # has no effect on what is computed
    with pytest.raises(SettingError, match=r"kl_estimator is 'k3', .* 'k2'"):
        check_settings(parse_config(words, recipe="tiny-digits"), LAUNCH, resume)
    words[words.index("vlm_r1")] = "strict"
    with pytest.raises(SettingError, match=r"reward_mode is 'strict', .* 'vlm_r1'"):
        check_settings(parse_config([*words, "--kl_estimator", "k2"], recipe="tiny-digits"), LAUNCH, resume)


# Help


@pytest.mark.parametrize(("kind", "width"), [(GRPOConfig, 80), (GRPOConfig, 200), (SFTConfig, 200)])
def test_help_has_a_line_for_each_setting_that_a_run_may_have(kind, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = every_setting(kind).splitlines()
    assert max(map(len, lines)) <= width
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert len(names) == len(set(names)) and set(names) == {each.name for each in fields(kind)} & (
        SUPPORTED | ({each.name for each in fields(kind)} - INHERITED)
    )
    assert all(each.metadata.get("help") for part in kind.parts() for each in fields(part))  # type: ignore[arg-type]
    headings = [line for line in lines[2:] if line and not line.startswith(" ")]
    assert headings == list(kind.groups())


def test_help_of_one_setting():
    text = one_setting("loss_type")
    assert "grpo | bnpo | dapo | dr_grpo | cispo | gspo" in text and "Objective" in text
    assert [line.split()[-1] for line in text.splitlines() if "default" in line] == ["grpo", "dapo"]  # ours, TRL's
    assert "refused" in one_setting("hub_token")


@pytest.mark.parametrize(("kind", "defaults"), [(GRPOConfig, TRL_DEFAULTS), (SFTConfig, TRL_SFT_DEFAULTS)])
def test_defaults_of_trl(kind, defaults):
    trl = getattr(pytest.importorskip("trl"), kind.__name__).__dataclass_fields__
    assert {name: trl[name].default for name in defaults} == defaults
    assert all(kind.__dataclass_fields__[name].default != value for name, value in defaults.items())


HELP = [[name, "--help"] for name in COMMANDS if name != "data"]
HELP += [
    ["--help"],
    ["data", "--help"],
    ["data", "check", "--help"],
    ["data", "rate", "--help"],
    ["train", "--help", "beta"],
    ["sft", "--help", "max_length"],
]


# Each command is a fork of a process that has imported the program, and ends as the program does.
FORKS = r"""
import gc, json, os, sys
import vlmr1.config
from vlmr1 import cli
gc.freeze()
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv[1:] = words
        cli.command()
    print("\nended:", *words, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


@pytest.mark.slow
def test_nobody_reads_the_help_to_its_end():
    """As in `vlmr1 train --help | head -1`: no traceback, not even at the interpreter's exit."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "ignore", "-c", FORKS, json.dumps(HELP)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    ended = [line for line in done.stderr.splitlines() if line.startswith("ended:")]
    assert ended == [" ".join(["ended:", *words, "0"]) for words in HELP]
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
