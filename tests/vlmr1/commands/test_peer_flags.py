"""Flags of TRL and VLM-R1 that are read as settings of this project; refused_settings.txt has refused ones."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers.digit_runs import command
from vlmr1.cli import main
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.train import train
from vlmr1.config import GRPOConfig
from vlmr1.distributed.deepspeed_file import engine_name, read_deepspeed
from vlmr1.errors import SettingError
from vlmr1.evaluation.callback import EVALUATIONS
from vlmr1.lifecycle import renamed
from vlmr1.lifecycle.checkpoint import last_complete
from vlmr1.models import load_model
from vlmr1.report.progress import METRICS, read_lines
from vlmr1.tiny import CHECKPOINT

CPU = ["--use_cpu", "true"]
BATCH = "--per_device_train_batch_size {} --gradient_accumulation_steps {}"
MODULE = "--is_reward_customized_from_vlm_module true --task_type rec --model_name_or_path {}"
READ = {
    "batch": (BATCH.format(8, 2), {"prompts_per_device": 2}),
    "batch of other groups": (BATCH.format(4, 8) + " --num_generations 16", {"prompts_per_device": 2}),
    "batch alone": ("--per_device_train_batch_size 24", {"prompts_per_device": 3}),
    "accumulation alone": ("--gradient_accumulation_steps 4", {"prompts_per_device": 4}),
    "no accumulation": ("--gradient_accumulation_steps 1 --prompts_per_device 3", {"prompts_per_device": 3}),
    "resume": ("--resume_from_checkpoint True", {"resume_from_checkpoint": None}),
    "start over": ("--resume_from_checkpoint False", {"resume_from_checkpoint": False}),
    "nothing to do": ("--use_vllm False --ds3_gather_for_generation --lora_task_type CAUSAL_LM", {"use_peft": False}),
    "unused data set": ("--dataset-name not_used --data_file_paths a.jsonl", {"data_file_paths": ["a.jsonl"]}),
    "data set": ("--dataset_name owner/set@train", {"data_file_paths": ["owner/set@train"]}),
    "template": ("--task_type odLength", {"question_template": "odLength", "accu_reward_method": ["default"]}),
    "template without one": ("--task-type gui_defect", {"question_template": "default"}),
    "general rewards": (
        "--is_reward_customized_from_vlm_module False --reward_method all_match",
        {"accu_reward_method": ["all_match"], "reward_funcs": ["accuracy", "format"]},
    ),
    "rewards of Qwen": (MODULE.format("Qwen2.5-VL"), {"reward_funcs": ["iou_qwen", "format_rec_qwen"]}),
    "rewards of GLM": (MODULE.format("zai/GLM-4.1V") + " --reward_funcs format", {"reward_funcs": ["format_rec_glm"]}),
    "dropout": (
        "--use_peft true --lora_dropout 0.05",
        {"lora_dropout": 0.05, "share_prompt": True, "pack": True},
    ),
    "names": (
        "--freeze_vision_modules true --image_root images --torch_dtype float32",
        {"freeze_vision": True, "image_folders": ["images"], "model_dtype": "float32"},
    ),
    "values": ("--log_completions true --scale_rewards False", {"log_completions": 4, "scale_rewards": "none"}),
    "evaluation": ("--eval_strategy steps --eval_steps 5 --eval_limit 3", {"eval_steps": 5}),
    "twice the same": ("--beta 0.1 --beta=0.10 --bf16 --bf16 true", {"beta": 0.1, "bf16": True}),
}


@pytest.mark.parametrize("words, expected", READ.values(), ids=READ)
def test_read_as(words, expected):
    config = parse_config([*CPU, *words.split()])
    assert {name: getattr(config, name) for name in expected} == expected


def test_from_python():
    """As a script for TRL writes it."""
    config = GRPOConfig(use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=4, num_generations=4)
    assert (config.prompts_per_device, config.gradient_accumulation_steps) == (4, 1)
    with pytest.raises(SettingError, match=r"no multiple of num_generations(.|\n)*top_k is -1"):
        GRPOConfig(use_cpu=True, per_device_train_batch_size=3, top_k=-1)


def test_later_sources_replace(tmp_path):
    """A flag replaces what stands for it in a recipe, and in a file, where null is no value."""
    file = tmp_path / "run.yaml"
    file.write_text("per_device_train_batch_size: 16\ntask_type: null\nuse_vllm: false\n")
    assert parse_config(CPU, recipe="rec-3b").prompts_per_device == 2
    config = parse_config([*CPU, "--task_type", "ic"], recipe="rec-3b", config=file)
    assert (config.prompts_per_device, config.question_template) == (2, "ic")
    assert config.accu_reward_method == ["iou"]  # the recipe's
    assert parse_config([*CPU, "--prompts_per_device", "5"], recipe="rec-3b", config=file).prompts_per_device == 5


def test_each_reading_is_said(caplog):
    renamed.note_spelling.cache_clear()
    parse_config([*CPU, *READ["batch"][0].split(), *READ["names"][0].split()])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert "per_device_train_batch_size 8 x gradient_accumulation_steps 2 is read as prompts_per_device 2" in said[-1]


TOGETHER = {  # words, a file of --config, a part of each line of the message
    "own settings": (
        "--use_cpu true --foo 3 --max_step=3 --num_generations many --loss_type ppo --temperature 0",
        "lerning_rate: 1\nnum_itrations: 2\ntop_k: -1\n",
        "lerning_rate | num_itrations | top_k | foo | max_step | num_generations | loss_type | temperature",
    ),
    "flags of peers": (
        "--use_vllm true --beta 1 --beta 2 --learning_rate --fp16 true --report_to wandb --vllm_mode colocate "
        "--top_k -1 --data_file_paths a.jsonl:b.parquet --deepspeed ds.json --reward_funcs a,b",
        "",
        "use_vllm | beta | learning_rate | fp16 | wandb | vllm_mode | top_k | a.jsonl | b.parquet | ds.json | a,b",
    ),
    "options of the command": (
        "--launch ddp --launch zero2 --processes two --recipe none --temperature 0",
        "beta: 0.1\nepsilon: 0.2\nbeta: 0.2\n",
        "launch is given twice: ddp and zero2 | --processes is 'two' | --recipe: unknown recipe 'none' | "
        "beta is given twice in run.yaml | temperature is 0.0",
    ),
    "a launch and a file": (
        '--launch zero3 --processes 0 --deepspeed {"zero_optimization":{"stage":3}}',
        "",
        "--launch zero3 and --deepspeed | --processes is 0",
    ),
}


@pytest.mark.parametrize("words, file, expected", TOGETHER.values(), ids=TOGETHER)
def test_all_faults_of_a_command_are_reported_together(words, file, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(file)
    assert main(["train", *words.split(), *(["--config", "run.yaml"] if file else [])]) == 2
    lines = capsys.readouterr().err.partition("vlmr1: ")[2].splitlines()
    assert len(lines) == len(expected.split(" | "))
    assert [each for each in expected.split(" | ") if not any(each in line for line in lines)] == [], lines


# No update


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs"])
def test_no_update_is_made(name, data, tmp_path, capsys):
    """Everything is read and evaluated, nothing is trained or saved."""
    more = ["--eval_on_start", "true", "--eval_data_file_paths", str(data / "train.jsonl")]
    more += ["--eval_image_folders", str(data / "images"), "--eval_limit", "1"]
    steps = {"max_steps": "-1"} | {name: "0"}
    more += [word for name, value in steps.items() for word in (f"--{name}", value)]
    words = command(data, tmp_path / "out", *more)
    trainer = train(parse_config(words[3:], recipe=words[2]))
    assert "0 in all" in capsys.readouterr().out
    before, after = load_model(CHECKPOINT).state_dict(), trainer.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert last_complete(tmp_path / "out") is None and not (tmp_path / "out" / METRICS).exists()
    assert [line["step"] for line in read_lines(tmp_path / "out" / EVALUATIONS)] == [0]


# A DeepSpeed configuration of the user

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5}, "train_batch_size": "auto"}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}


def test_a_configuration_is_joined_with_ours(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ZERO3 | {"optimizer": ADAM, "bf16": {"enabled": True}, "steps_per_print": 7}))
    made = read_deepspeed(str(file), bf16=True)
    assert made["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 5,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert (made["steps_per_print"], made["communication_data_type"], made["bf16"]) == (7, "fp32", {"enabled": "auto"})
    assert not made.keys() & {"optimizer", "train_batch_size"}
    assert engine_name(made) == "zero3"
    offloaded = read_deepspeed(json.dumps(OFFLOAD), bf16=False)
    assert engine_name(offloaded) == "zero3-offload" and offloaded["zero_force_ds_cpu_optimizer"] is False


FAULTS = {
    "stage": ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage is 1"]),
    "no stage": ({"train_batch_size": "auto"}, ["zero_optimization.stage is None"]),
    "nvme": ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload to cpu"]),
    "values": (
        ZERO3 | {"train_batch_size": 8, "gradient_clipping": 1.0, "fp16": {"enabled": True}, "autotuning": {}},
        ["train_batch_size: use prompts_per_device", "use max_grad_norm", "fp16: use bf16", "autotuning is not"],
    ),
    "optimizer": (
        ZERO3 | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
        ["optimizer: use optim, learning_rate"],
    ),
    "another optimizer": (ZERO3 | {"optimizer": {"type": "Lamb"}}, ["optimizer: use optim"]),
    "scheduler": (ZERO3 | {"scheduler": {"type": "WarmupLR"}}, ["scheduler: use lr_scheduler_type"]),
    "bf16": (ZERO3 | {"bf16": {"enabled": True}}, ["bf16.enabled is True, but the setting bf16 is False"]),
    "a list": ([], ["a JSON object is expected"]),
}


@pytest.mark.parametrize("content, expected", FAULTS.values(), ids=FAULTS)
def test_configurations_that_are_refused(content, expected, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SettingError) as caught:
        read_deepspeed(str(file), bf16=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    assert all(str(file) in line and words in line for line, words in zip(lines, expected, strict=True))
