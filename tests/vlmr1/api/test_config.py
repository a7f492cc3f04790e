"""The exported GRPOConfig: TRL's fields and defaults, its arithmetic, and what is refused, by name and all together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import vlmr1
from tests.helpers.api import settings_of
from vlmr1.api.config import ELSEWHERE
from vlmr1.api.refused import REASONS
from vlmr1.config import GRPOConfig as CoreConfig
from vlmr1.errors import SettingError

OTHERS: dict[type, Any] = {bool: True, int: 7, float: 0.5, str: "other", type(None): 1}  # values by the default's type


def test_every_field_of_trl_is_there_with_its_default() -> None:
    trl = pytest.importorskip("trl")
    own = {each.name: each.default for each in fields(vlmr1.GRPOConfig)}
    theirs = {each.name: each.default for each in fields(trl.GRPOConfig)}
    assert {name for name in theirs if name not in own} == set()
    assert {name for name in theirs if own[name] != theirs[name]} == {"output_dir"}  # which TRL fills in


def test_a_parser_of_trl_takes_the_settings_beside_its_own() -> None:
    trl = pytest.importorskip("trl")
    from trl.scripts.grpo import GRPOScriptArguments

    words = "--output_dir out --use_cpu true --bf16 false --dataset_name rows --lora_r 8 --beta 0.1 --reward_funcs mine"
    parser = trl.TrlParser((GRPOScriptArguments, vlmr1.GRPOConfig, trl.ModelConfig))
    script, args, model = parser.parse_args_and_config(words.split())
    assert (script.dataset_name, args.beta, model.lora_r) == ("rows", 0.1, 8)
    assert "beta" in args.given and "logging_steps" not in args.given  # although the parser passes every field


def test_names_of_other_places_exist() -> None:
    known = {each.name for each in fields(CoreConfig)}
    assert {name for name in ELSEWHERE if name not in known} <= {"adapter"}


@pytest.mark.parametrize("name", sorted(REASONS))
def test_what_cannot_be_honoured_is_refused_by_name(name: str, tmp_path: Path) -> None:
    default = vlmr1.GRPOConfig.__dataclass_fields__[name].default
    other = not default if isinstance(default, bool) else OTHERS[type(default)]
    with pytest.raises(SettingError, match=f"^{name} is "):
        settings_of(tmp_path, **{name: other})


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all_together": (
        dict(use_vllm=True, top_entropy_quantile=0.2, per_device_train_batch_size=3, scale_rewards="bogus"),
        ["use_vllm", "top_entropy_quantile", "per_device_train_batch_size", "scale_rewards"],
    ),
    "loss_type": (dict(loss_type="luspo"), ["loss_type is 'luspo'"]),
    "bnpo_accumulated": (dict(loss_type="bnpo", gradient_accumulation_steps=2), ["loss_type=bnpo"]),
    "entropy_of_means": (dict(loss_type="grpo", entropy_coef=0.1), ["entropy_coef"]),
    "entropy_of_sequences": (dict(importance_sampling_level="sequence", entropy_coef=0.1), ["entropy_coef"]),
    "entropy_of_passes": (dict(gradient_accumulation_steps=2, entropy_coef=0.1), ["entropy_coef"]),
    "once": (dict(fp16=True), ["fp16 is True"]),
    "level": (dict(importance_sampling_level="both"), ["must be one of token, sequence, or None"]),
    "of_another_fault": (dict(hub_strategy="checkpoint", chat_template_kwargs='{"a": 1}'), ["hub_strategy"]),
    "twice": (dict(generation_batch_size=8, steps_per_generation=2), ["generation_batch_size"]),
    "not_a_multiple": (dict(generation_batch_size=6), ["generation_batch_size"]),
    "steps": (dict(gradient_accumulation_steps=2, steps_per_generation=3), ["steps_per_generation is 3"]),
    "groups": (dict(per_device_train_batch_size=2, num_generations=4), ["num_generations, 4"]),
    "no_length": (dict(max_completion_length=None), ["max_completion_length"]),
    "engine": (dict(rollout_engine="vllm"), ["rollout_engine"]),
    "generation": (dict(generation_kwargs={"num_beams": 2}), ["generation_kwargs has 'num_beams'"]),
    "loading": (dict(model_init_kwargs={"max_memory": {0: 1}}), ["model_init_kwargs has 'max_memory'"]),
    "device_map": (dict(model_init_kwargs={"device_map": "balanced"}), ["device_map is 'balanced'"]),
    "dtype": (dict(model_init_kwargs={"dtype": "float16"}), ["dtype is float16"]),
    "no_dict": (dict(generation_kwargs="top_k=1"), ["generation_kwargs"]),
    "template": (dict(chat_template_kwargs="thinking"), ["chat_template_kwargs"]),
    "hub_strategy": (dict(hub_strategy="checkpoint"), ["hub_strategy"]),
    "best": (dict(load_best_model_at_end=True, eval_strategy="steps"), ["load_best_model_at_end"]),
    "best_of_others": (
        dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=3, eval_steps=2),
        ["save_steps"],
    ),
    "batch": (dict(per_device_train_batch_size=0), ["per_device_train_batch_size"]),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_faults_of_settings(settings: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingError) as error:
        settings_of(tmp_path, **settings)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value).splitlines()) == len(words)


def test_a_row_of_the_command_line_is_no_setting_of_a_script(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="data_file_paths"):
        settings_of(tmp_path, data_file_paths=["rows.jsonl"])


BATCHES = {  # settings; prompts an update, updates a generation, TRL's steps, completions a generation
    "plain": ({}, (2, 1, 1, 4)),
    "accumulated": (dict(gradient_accumulation_steps=4), (8, 1, 4, 16)),
    "steps": (dict(gradient_accumulation_steps=2, steps_per_generation=6), (4, 3, 6, 24)),
    "fewer_steps": (dict(gradient_accumulation_steps=4, steps_per_generation=2), (8, 1, 2, 8)),
    "size": (dict(generation_batch_size=16), (2, 4, 4, 16)),
}


@pytest.mark.parametrize(("settings", "expected"), BATCHES.values(), ids=BATCHES.keys())
def test_batches(settings: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    args = settings_of(tmp_path, **settings)
    found = (args.prompts_per_device, args.updates_per_generation, args.steps_per_generation)
    assert (*found, args.generation_batch_size) == expected


def test_values_that_change_nothing(tmp_path: Path) -> None:
    args = settings_of(tmp_path, top_k=None, generation_kwargs={"do_sample": True}, hub_strategy="end")
    assert args.sampling().top_k == 0 and args.top_k is None


def test_json_texts_are_read(tmp_path: Path) -> None:
    args = settings_of(tmp_path, generation_kwargs='{"top_k": 3, "max_new_tokens": 9}', chat_template_kwargs='{"a": 1}')
    assert (args.top_k, args.max_completion_length, args.chat_template_kwargs) == (3, 9, {"a": 1})
    assert args.sampling().min_p == 0.0 and args.min_p is None


def test_the_command_line_does_not_import_the_api() -> None:
    code = "import sys, vlmr1; print('torch' in sys.modules); import vlmr1.cli; print('vlmr1.api' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
