"""Where settings come from, which are refused and in what words, and what they become."""

from pathlib import Path

import pytest
import yaml

from tests.helpers.refused import CPU, refusal
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

REFUSED = (Path(__file__).parents[1] / "data" / "refused_settings.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.partition(" | ")[0])
def test_refused(line):
    """The words of a command and what the message must hold; beside the cases of `tests/golden/refusals.jsonl`."""
    words, message = line.split(" | ")
    assert message in refusal(*words.split())


def test_settings_of_transformers_that_this_machine_cannot_honour(monkeypatch):
    """One line that names the setting, as for our own: the published recipe asks for bf16."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(SettingError, match="bf16"):
        parse_config([], recipe="rec-3b")


FILES = {
    "not a name": ("3: 1\n", "unknown setting '3' in {path}"),
    "a bad value": ("num_generations: many\n", "num_generations"),
    "an empty list": ("reward_funcs: []\n", "reward_funcs"),
    "replaced": ("auto_find_batch_size: true\n", "auto_find_batch_size cannot be set"),
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
        ({"use_bias_correction_kl": True}, {"use_bias_correction_kl": True}),
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


WRONG = {"scale_rewards": "bogus", "rollout_engine": "vllm", "old_logprobs": "x", "model_dtype": "float16"}
WRONG |= {"max_completion_length": None, "num_generations": 2.5, "beta": True, "reward_weights": 1.0, "pack": "yes"}


def test_types_are_checked_from_python_too():
    with pytest.raises(SettingError) as caught:
        GRPOConfig(use_cpu=True, learning_rate=1, reward_funcs=("format",), output_dir=Path("out"), **WRONG)
    assert [line.partition(" is ")[0] for line in sorted(str(caught.value).splitlines())] == sorted(WRONG)


# words, rows, what is said
SCHEDULES = {
    "epochs": ("--prompts_per_device 8 --num_train_epochs 2", 100, "13 updates an epoch, 26 in all (2.0 epochs)"),
    "sequences": (
        "--prompts_per_device 8",
        100,
        "100 rows; an update: 8 prompts x 8 generations = 64 sequences on 1 dev",
    ),
    "max_steps": ("--prompts_per_device 4 --max_steps 10", 80, "20 updates an epoch, 10 in all (0.5 epochs)"),
    "1.5": ("--prompts_per_device 4 --num_train_epochs 1.5", 12, "3 updates an epoch, 5 in all"),
    "drop_last": ("--dataloader_drop_last true --num_train_epochs 2", 15, "1 updates an epoch, 2 in all"),
    "buffer": (  # two generations of four updates twice, and one row that is left out
        "--prompts_per_device 2 --steps_per_generation 4 --num_iterations 2",
        17,
        "a generation serves 8 updates; 16 updates an epoch, 48 in all (3.0 epochs); "
        "1 row is left over at the end of an epoch: an update needs 4",
    ),
    "drop_last left over": (
        "--dataloader_drop_last true --max_steps 2",
        15,
        "(2.0 epochs); 7 rows are left over at the end of an epoch: a generation has 8, and dataloader_drop_last",
    ),
    "stream": ("--streaming true --max_steps 5", None, "streamed rows; an update: 8 prompts x 8 generations"),
}


@pytest.mark.parametrize("words, rows, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(words, rows, expected):
    assert expected in describe_schedule(parse_config([*CPU, *words.split()]), rows)


def test_several_ranks(monkeypatch):
    """The words are for all ranks."""
    config = parse_config([*CPU, "--prompts_per_device", "2"])
    monkeypatch.setattr(GRPOConfig, "world_size", 4)
    expected = "8 prompts x 8 generations = 64 sequences on 4 devices; 4 updates an epoch, 12 in all"
    assert expected in describe_schedule(config, 30)
    assert "left over" not in describe_schedule(config, 30)  # the last update has 6 prompts
    assert "3 rows are left over at the end of an epoch: an update needs 4" in describe_schedule(config, 35)
