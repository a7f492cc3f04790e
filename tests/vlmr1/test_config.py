"""Where settings come from, which are refused and in what words, and what they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.refused import CPU, refusal
from vlmr1.cli import main
from vlmr1.commands.arguments import RECIPES, parse_config, recipe_names
from vlmr1.commands.schedule import describe_schedule
from vlmr1.config import RENAMED_ARGS, GRPOConfig
from vlmr1.data.templates import TEMPLATES, question_text
from vlmr1.errors import SettingError
from vlmr1_kernels import GRPOSettings


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Sources


def test_precedence(tmp_path):
    """Recipe, then file, then command line; what none of them names keeps its default."""
    text = "learning_rate: 2e-6\nbeta: 0.3\nreward_funcs: [format]\npack: false\nseed: null\nquestion_template: none\n"
    path = yaml_file(tmp_path, text)
    config = parse_config([*CPU, "--beta", "0.5", "--max_steps=7"], recipe="rec-3b", config=path)
    assert config.model_name_or_path == "Qwen/Qwen2.5-VL-3B-Instruct" and config.num_train_epochs == 2
    assert (config.learning_rate, config.reward_funcs, config.pack) == (2e-6, ["format"], False)
    assert (config.beta, config.max_steps) == (0.5, 7)
    assert (config.seed, config.kl_estimator, config.share_prompt) == (42, "k3", True)
    assert question_text(config.question_template) == TEMPLATES["none"] == "{question}"


def test_defaults():
    config = parse_config(CPU)
    assert (config.num_generations, config.beta, config.epsilon, config.loss_type) == (8, 0.04, 0.2, "grpo")
    assert (config.share_vision, config.share_prompt, config.pack) == (True, True, True)
    assert config.reward_funcs == ["accuracy", "format"]
    assert config.per_device_train_batch_size == config.prompts_per_device == 8


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses(name):
    config = parse_config(CPU, recipe=name)
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert settings and {setting: getattr(config, setting) for setting in settings} == settings


def test_published_settings():
    config = parse_config(CPU, recipe="rec-3b")
    expected = {
        "learning_rate": 1e-6,
        "beta": 0.04,
        "epsilon": 0.2,
        "num_generations": 8,
        "temperature": 1.0,
        "max_completion_length": 2048,
        "bf16": True,
        "loss_type": "grpo",
        "kl_estimator": "k3",
        "reward_funcs": ["accuracy", "format"],
        "question_template": "rec",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert set(recipe_names()) >= {"rec-3b", "tiny-digits"}


# Refusals

REFUSED = {
    "num_generations 1": (["--num_generations", "1"], "num_generations is 1"),
    "num_generations 0": (["--num_generations", "0"], "num_generations is 0"),
    "temperature 0": (["--temperature", "0"], "temperature is 0.0"),
    "beta": (["--beta", "-0.1"], "beta is -0.1"),
    "top_k": (["--top_k", "-1"], "top_k is -1"),
    "top_p 0": (["--top_p", "0"], "top_p is 0.0"),
    "top_p": (["--top_p", "1.5"], "top_p is 1.5"),
    "min_p": (["--min_p", "-0.1"], "min_p is -0.1"),
    "repetition_penalty": (["--repetition_penalty", "0"], "repetition_penalty is 0.0"),
    "stop_strings": (["--stop_strings", ""], "stop_strings holds an empty text"),
    "rollout_kv_mib": (["--rollout_kv_mib", "0"], "rollout_kv_mib is 0.0"),
    "rollout_kv_mib elsewhere": (
        ["--rollout_kv_mib", "8", "--rollout_engine", "transformers"],
        "rollout_kv_mib needs rollout_engine native",
    ),
    "overlong_prompts": (["--overlong_prompts", "filter"], "overlong_prompts=filter needs max_prompt_length"),
    "cuda_graphs": (["--cuda_graphs", "true"], "cuda_graphs needs a GPU"),
    "steps_per_generation": (["--steps_per_generation", "0"], "steps_per_generation is 0"),
    "num_iterations": (["--num_iterations", "0"], "num_iterations is 0"),
    "ignore_data_skip": (["--ignore_data_skip", "true", "--num_iterations", "2"], "ignore_data_skip=True cannot be"),
    "dataloader_in_order": (
        ["--dataloader_in_order", "false", "--steps_per_generation", "2"],
        "dataloader_in_order=False cannot be",
    ),
    "judge_model": (["--judge_model", "qwen"], "judge_model needs judge_url"),
    "judge_url": (["--judge_url", "localhost", "--judge_model", "qwen"], "judge_url is 'localhost'"),
    "reward_workers": (["--reward_workers", "-1"], "reward_workers is -1"),
    "reward_timeout": (["--reward_timeout", "0"], "reward_timeout is 0.0"),
    "reward_mode": (["--reward_mode", "loose"], "--reward_mode"),
    "overlong_cache_length": (["--overlong_cache_length", "300"], "overlong_cache_length is 300"),
    "val_split_ratio": (["--val_split_ratio", "1"], "val_split_ratio is 1.0"),
    "min_pixels": (["--min_pixels", "0"], "min_pixels is 0: it must be at least 1"),
    "max_anyres_num": (["--max_anyres_num", "0"], "max_anyres_num is 0: it must be at least 1"),
    "min_pixels above max_pixels": (["--min_pixels", "9", "--max_pixels", "8"], "min_pixels is 9: it is above max_pix"),
    "box_coordinates": (["--box_coordinates", "pixels"], "--box_coordinates"),
    "box_coordinates with vlm_r1": (
        ["--box_coordinates", "original", "--reward_mode", "vlm_r1"],
        "box_coordinates is 'original' with reward_mode vlm_r1",
    ),
    "rollout_logp_warn_threshold": (["--rollout_logp_warn_threshold", "0"], "rollout_logp_warn_threshold is 0.0"),
    "skip_zero_advantage": (["--skip_zero_advantage", "true"], "skip_zero_advantage needs beta 0"),
    "prompts_per_device": (["--prompts_per_device", "0"], "prompts_per_device is 0"),
    "max_completion_length": (["--max_completion_length", "0"], "max_completion_length is 0"),
    "tokens_per_pack": (["--tokens_per_pack", "0"], "tokens_per_pack is 0"),
    "reward_weights": (["--reward_weights", "1"], "reward_weights has 1 values for 2 reward_funcs"),
    "question_template": (["--question_template", "grec"], "question_template is 'grec'"),
    "loss_type": (["--loss_type", "ppo"], "--loss_type"),
    "not a number": (["--learning_rate", "fast"], "--learning_rate"),
    "a word too many": (["fast"], "unexpected argument 'fast'"),
    "share_vision": (["--share_vision", "false"], "share_vision=false needs share_prompt=false"),
    "abbreviation": (["--max_step", "3"], "unknown setting 'max_step' on the command line; did you mean 'max_steps'?"),
    "unknown": (["--max_completion_len=3"], "'max_completion_len' on the command line; did you mean 'max_completion_"),
    "nothing near": (["--qqq", "3"], "unknown setting 'qqq' on the command line"),
    # What the kernels, or transformers, would refuse later and in their own words
    "epsilon": (["--epsilon", "2"], "epsilon"),
    "cispo": (["--loss_type", "cispo"], "epsilon_high"),
    "delta": (["--delta", "0.9"], "delta is 0.9"),
    "delta of cispo": (["--loss_type", "cispo", "--epsilon_high", "5", "--delta", "2"], "delta is 2.0"),
    "epsilon of cispo": (
        ["--loss_type", "cispo", "--epsilon_high", "5", "--epsilon", "0.1"],
        "epsilon has no effect with loss_type=cispo",
    ),
    "importance_sampling_level": (["--importance_sampling_level", "word"], "--importance_sampling_level"),
    "importance_sampling_level of gspo": (
        ["--loss_type", "gspo", "--importance_sampling_level", "token"],
        "importance_sampling_level=token contradicts loss_type=gspo",
    ),
    "entropy_coef": (["--entropy_coef", "inf"], "entropy_coef is inf"),
    "entropy_coef and skipping": (
        ["--beta", "0", "--entropy_coef", "0.1", "--skip_zero_advantage", "true"],
        "skip_zero_advantage needs entropy_coef 0, not 0.1",
    ),
    "kl_in_reward": (["--beta", "0", "--kl_in_reward", "true"], "kl_in_reward needs beta above 0"),
    "negative beta in the reward": (["--beta", "-1", "--kl_in_reward", "true"], "beta is -1.0"),
    "sync_ref_model": (["--beta", "0", "--sync_ref_model", "true"], "sync_ref_model needs beta above 0"),
    "ref_model_sync_steps": (
        ["--sync_ref_model", "true", "--ref_model_sync_steps", "0"],
        "ref_model_sync_steps is 0",
    ),
    "ref_model_mixup_alpha": (
        ["--sync_ref_model", "true", "--ref_model_mixup_alpha", "1.5"],
        "ref_model_mixup_alpha is 1.5",
    ),
    "ref_model_sync_steps alone": (["--ref_model_sync_steps", "3"], "has no effect without sync_ref_model"),
    "ref_model_mixup_alpha alone": (["--ref_model_mixup_alpha", "1"], "has no effect without sync_ref_model"),
    "dynamic_sampling_max_rounds": (
        ["--dynamic_sampling", "true", "--dynamic_sampling_max_rounds", "0"],
        "dynamic_sampling_max_rounds is 0",
    ),
    "dynamic_sampling_max_rounds alone": (
        ["--dynamic_sampling_max_rounds", "2"],
        "dynamic_sampling_max_rounds has no effect without dynamic_sampling",
    ),
    "importance_sampling_correction": (
        ["--importance_sampling_correction", "token_mask"],
        "importance_sampling_correction=token_mask needs old_logprobs=recompute",
    ),
    "importance_sampling_cap": (
        ["--importance_sampling_correction", "token_mask", "--importance_sampling_cap", "0"],
        "importance_sampling_cap is 0.0",
    ),
    "importance_sampling_cap alone": (
        ["--importance_sampling_cap", "2"],
        "importance_sampling_cap has no effect without importance_sampling_correction",
    ),
    "kernels": (["--kernels", "grpo_loss=none"], "grpo_loss has no implementation 'none'"),
    "bf16 and fp16": (["--bf16", "true", "--fp16", "true"], "fp16"),
    "save_strategy best": (["--save_strategy", "best"], "save_strategy"),
    # Settings of TrainingArguments that have no effect on GRPO
    "gradient_accumulation_steps": (
        ["--gradient_accumulation_steps", "2"],
        RENAMED_ARGS["gradient_accumulation_steps"],
    ),
    "per_device_train_batch_size": (
        ["--per_device_train_batch_size", "2"],
        RENAMED_ARGS["per_device_train_batch_size"],
    ),
    "fp16": (["--fp16", "true"], "fp16 cannot be set"),
    "neftune_noise_alpha": (["--neftune_noise_alpha", "5"], "neftune_noise_alpha cannot be set"),
    "torch_compile": (["--torch_compile", "true"], "torch_compile cannot be set"),
    "eval_strategy": (["--eval_strategy", "steps"], "eval_strategy cannot be set: use `vlmr1 evaluate`"),
    "push_to_hub": (["--push_to_hub", "true"], "push_to_hub cannot be set"),
    "label_names": (["--label_names", "labels"], "label_names cannot be set"),
    "label_smoothing_factor": (["--label_smoothing_factor", "0.1"], "label_smoothing_factor cannot be set"),
    "a default of true": (["--average_tokens_across_devices", "false"], "average_tokens_across_devices cannot be set"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(arguments, message):
    assert message in refusal(*arguments)


def test_settings_of_transformers_that_this_machine_cannot_honour(monkeypatch):
    """One line that names the setting, as for our own: the published recipe asks for bf16."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(SettingError, match="bf16"):
        parse_config([], recipe="rec-3b")


FILES = {
    "unknown": ("lerning_rate: 1\n", "unknown setting 'lerning_rate' in {path}; did you mean 'learning_rate'?"),
    "not a name": ("3: 1\n", "unknown setting '3' in {path}"),
    "not YAML": ("beta: [1\n", "{path}: not YAML"),
    "a list": ("- beta\n", "{path}: a mapping of settings is expected"),
    "a bad value": ("num_generations: many\n", "num_generations"),
    "an empty list": ("reward_funcs: []\n", "reward_funcs"),
    "replaced": ("gradient_accumulation_steps: 4\n", "gradient_accumulation_steps cannot be set"),
}


@pytest.mark.parametrize("text, message", FILES.values(), ids=FILES.keys())
def test_refused_file(text, message, tmp_path):
    path = yaml_file(tmp_path, text)
    assert message.format(path=path) in refusal(config=path)


def test_refused_sources(tmp_path):
    assert refusal(recipe="rec-4b") == f"--recipe: unknown recipe 'rec-4b'; known: {', '.join(recipe_names())}"
    assert "rec-3b" in recipe_names()
    assert str(tmp_path / "none.yaml") in refusal(config=tmp_path / "none.yaml")


COMMANDS = {
    "command line": (["--lerning_rate", "1"], "unknown setting 'lerning_rate' on the command line"),
    "file": (["--config", "{path}"], "unknown setting 'lerning_rate' in {path}"),
    "recipe": (["--recipe", "rec-4b"], "--recipe: unknown recipe 'rec-4b'"),
    "value": (["--num_generations", "1"], "num_generations is 1"),
    "no model": ([], "model_name_or_path is not set"),
}


@pytest.mark.parametrize("arguments, message", COMMANDS.values(), ids=COMMANDS.keys())
def test_command_line_exits_with_2(arguments, message, tmp_path, capsys):
    path = yaml_file(tmp_path, "lerning_rate: 1\n")
    assert main(["train", *(word.format(path=path) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmr1: ") and message.format(path=path) in err and len(err.splitlines()) == 1
    assert "Traceback" not in err and "updates in all" not in out


# What they become

SEQUENCE_GSPO = {"loss_type": "gspo", "importance_level": "sequence"}


def test_grpo_settings_of_the_defaults():
    assert GRPOConfig(use_cpu=True).objective() == GRPOSettings(
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.04,
        kl="k3",
        temperature=1.0,
        max_completion_length=256,
    )


@pytest.mark.parametrize(
    "setting, expected",
    [
        *(({"loss_type": name}, {"loss_type": name}) for name in ("bnpo", "dapo", "dr_grpo", "gspo")),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"loss_type": "cispo", "epsilon_high": 5.0}),
        *(({"kl_estimator": name}, {"kl": name}) for name in ("k1", "k2")),
        ({"beta": 0.0}, {"beta": 0.0}),
        ({"epsilon": 0.1}, {"epsilon_low": 0.1, "epsilon_high": 0.1}),
        ({"epsilon": 0.1, "epsilon_high": 0.28}, {"epsilon_low": 0.1, "epsilon_high": 0.28}),
        ({"epsilon_high": 0.0}, {"epsilon_high": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"delta": 4.0}, {"delta": 4.0}),
        ({"importance_sampling_level": "token"}, {}),
        ({"importance_sampling_level": "sequence"}, {"importance_level": "sequence"}),
        ({"loss_type": "gspo", "importance_sampling_level": "sequence"}, SEQUENCE_GSPO),
        ({"entropy_coef": 0.1}, {"entropy_coef": 0.1}),
        ({"kl_in_reward": True}, {"beta": 0.0}),
        ({"importance_sampling_correction": "token_mask", "old_logprobs": "recompute"}, {"tis_cap": 3.0}),
        (
            {
                "importance_sampling_correction": "sequence_truncate",
                "old_logprobs": "recompute",
                "importance_sampling_cap": 2.0,
            },
            {"tis_cap": 2.0},
        ),
        ({"max_completion_length": 9}, {"max_completion_length": 9}),
    ],
    ids=str,
)
def test_grpo_settings(setting, expected):
    defaults = vars(GRPOConfig(use_cpu=True).objective())
    assert vars(GRPOConfig(use_cpu=True, **setting).objective()) == defaults | expected


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["share_vision", "share_prompt", "pack", "check_images", "freeze_vision"])
def test_flags(name, value):
    arguments = [f"--{name}", str(value).lower()] + ["--share_prompt", "false"] * (name == "share_vision")
    assert getattr(parse_config([*CPU, *arguments]), name) is value


@pytest.mark.parametrize(
    "settings, rows, expected",
    [
        pytest.param(
            ["--prompts_per_device", "8", "--num_train_epochs", "2"],
            100,
            "100 rows; an update: 8 prompts x 8 generations = 64 sequences on 1 device; "
            "13 updates an epoch, 26 in all (2.0 epochs)",
            id="epochs",
        ),
        pytest.param(
            ["--prompts_per_device", "4", "--num_generations", "6", "--max_steps", "10"],
            80,
            "80 rows; an update: 4 prompts x 6 generations = 24 sequences on 1 device; "
            "20 updates an epoch, 10 in all (0.5 epochs)",
            id="max_steps",
        ),
        pytest.param(
            ["--prompts_per_device", "4", "--num_train_epochs", "1.5"], 12, "3 updates an epoch, 5 in all", id="1.5"
        ),
        pytest.param(
            ["--prompts_per_device", "8", "--dataloader_drop_last", "true", "--num_train_epochs", "2"],
            15,
            "1 updates an epoch, 2 in all",
            id="drop_last",
        ),
    ],
)
def test_schedule(settings, rows, expected):
    assert expected in describe_schedule(parse_config([*CPU, *settings]), rows)


def test_several_ranks(monkeypatch):
    """The words are for all ranks."""
    config = parse_config([*CPU, "--prompts_per_device", "2"])
    monkeypatch.setattr(GRPOConfig, "world_size", 4)
    expected = "8 prompts x 8 generations = 64 sequences on 4 devices; 4 updates an epoch, 12 in all"
    assert expected in describe_schedule(config, 30)
