"""Where settings come from, which are refused and in what words, and what they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.refused import CPU, refusal, table
from vlmr1.cli import main
from vlmr1.commands.arguments import RECIPES, parse_config, recipe_names
from vlmr1.commands.schedule import describe_schedule
from vlmr1.config import GRPOConfig
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


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses(name):
    config = parse_config(CPU, recipe=name)
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert settings and {setting: getattr(config, setting) for setting in settings} == settings


# Refusals

REFUSED = """
--temperature 0 | temperature is 0.0
--beta -0.1 | beta is -0.1
--top_p 1.5 | top_p is 1.5
--rollout_kv_mib 0 | rollout_kv_mib is 0.0
--steps_per_generation 0 | steps_per_generation is 0
--num_iterations 0 | num_iterations is 0
--dataloader_in_order false --steps_per_generation 2 | dataloader_in_order=False cannot be
--reward_timeout 0 | reward_timeout is 0.0
--reward_mode loose | --reward_mode
--min_pixels 0 | min_pixels is 0
--max_anyres_num 0 | max_anyres_num is 0
--box_coordinates pixels | --box_coordinates
--rollout_logp_warn_threshold 0 | rollout_logp_warn_threshold is 0.0
--max_completion_length 0 | max_completion_length is 0
--tokens_per_pack 0 | tokens_per_pack is 0
--loss_type ppo | --loss_type
fast | unexpected argument 'fast'
--max_step 3 | unknown setting 'max_step' on the command line; did you mean 'max_steps'?
--max_completion_len=3 | 'max_completion_len' on the command line; did you mean 'max_completion_
--qqq 3 | unknown setting 'qqq' on the command line
--loss_type cispo | epsilon_high
--loss_type cispo --epsilon_high 5 --delta 2 | delta is 2.0
--importance_sampling_level word | --importance_sampling_level
--entropy_coef inf | entropy_coef is inf
--beta 0 --kl_in_reward true | kl_in_reward needs beta above 0
--sync_ref_model true --ref_model_mixup_alpha 1.5 | ref_model_mixup_alpha is 1.5
--ref_model_mixup_alpha 1 | ref_model_mixup_alpha has no effect without sync_ref_model
--dynamic_sampling_max_rounds 2 | dynamic_sampling_max_rounds has no effect without dynamic_sampling
--importance_sampling_cap 2 | importance_sampling_cap has no effect without importance_sampling_correction
--kernels grpo_loss=none | grpo_loss has no implementation 'none'
--bf16 true --fp16 true | fp16
--gradient_accumulation_steps 2 | gradient_accumulation_steps cannot be set: use prompts_per_device
--fp16 true | fp16 cannot be set
--neftune_noise_alpha 5 | neftune_noise_alpha cannot be set
--torch_compile true | torch_compile cannot be set
--eval_strategy steps | eval_strategy cannot be set: use `vlmr1 evaluate`
--push_to_hub true | push_to_hub cannot be set
--label_names labels | label_names cannot be set
--label_smoothing_factor 0.1 | label_smoothing_factor cannot be set
--average_tokens_across_devices false | average_tokens_across_devices cannot be set
"""


@pytest.mark.parametrize("arguments, message", table(REFUSED))
def test_refused(arguments, message):
    assert message in refusal(*arguments)


def test_settings_of_transformers_that_this_machine_cannot_honour(monkeypatch):
    """One line that names the setting, as for our own: the published recipe asks for bf16."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(SettingError, match="bf16"):
        parse_config([], recipe="rec-3b")


FILES = {
    "not a name": ("3: 1\n", "unknown setting '3' in {path}"),
    "a bad value": ("num_generations: many\n", "num_generations"),
    "an empty list": ("reward_funcs: []\n", "reward_funcs"),
    "replaced": ("gradient_accumulation_steps: 4\n", "gradient_accumulation_steps cannot be set"),
}


@pytest.mark.parametrize("text, message", FILES.values(), ids=FILES.keys())
def test_refused_file(text, message, tmp_path):
    path = yaml_file(tmp_path, text)
    assert message.format(path=path) in refusal(config=path)


def test_a_refusal_is_one_line(capsys):
    assert main(["train", "--num_generations", "1"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vlmr1: num_generations is 1") and len(err.splitlines()) == 1
    assert "updates in all" not in out


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
        pytest.param(  # two generations of four updates twice, and one row that is left out
            ["--prompts_per_device", "2", "--steps_per_generation", "4", "--num_iterations", "2"],
            17,
            "a generation serves 8 updates; 16 updates an epoch, 48 in all (3.0 epochs)",
            id="a buffer",
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
