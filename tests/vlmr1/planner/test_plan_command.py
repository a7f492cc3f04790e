"""`vlmr1 plan` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import args_of
from vlmr1.cli import main
from vlmr1.models.optimizers import OPTIMIZERS
from vlmr1.planner.job import Job
from vlmr1.planner.known_models import config_named
from vlmr1.planner.plan import Planner
from vlmr1.planner.remedies import remedies
from vlmr1.tiny import CHECKPOINT

# A model of such a shape that weights count beside the framework's allowance; few layers, so that it is soon planned.
WIDE: dict[str, Any] = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 65536}
WIDE |= {"num_attention_heads": 48, "num_key_value_heads": 8, "layer_types": ["full_attention"] * 2}
TOWER = {"hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32, "depth": 2, "out_hidden_size": 1536}
SMALL = ["--model", "tiny", "--image_tokens", "16", "--text_tokens", "40", "--num_generations", "3"]
SMALL += ["--prompts_per_device", "2", "--max_completion_length", "16"]


def test_table_and_json_say_the_same(tmp_path: Path, capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "24GiB", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    peak = figures["peak"]
    assert peak["bytes"] == max(sum(causes.values()) for causes in figures["phases"].values())
    assert f"It fits: the peak is {peak['bytes'] / 2**30:.2f} GiB, in {peak['phase']}; there are 24.00." in said
    assert f"tiny: {figures['parameters'] / 1e9:.2f} billion parameters" in said
    assert figures["fits"] and figures["remedies"] == []
    assert figures["inputs"]["num_generations"] == 3


def test_a_gpu_that_is_too_small(capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "100MiB"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit: the peak is" in said
    assert "Nothing fits: it misses by" in said  # the allowance alone is larger


WRONG = {
    "model": (["--model", "Qwen/Qwen9-VL"], "fetches nothing; it knows OpenGVLab/InternVL3-2B-hf"),
    "no model": ([], "--model is not set"),
    "gpu": (["--model", "tiny", "--gpu", "80"], "gpu is '80': a size is expected"),
    "setting": (["--model", "tiny", "--learning_rats", "1"], "unknown setting 'learning_rats'"),
    "optimizer": (["--model", "tiny", "--optim", "lomo"], "optim is 'lomo'"),
    "adapter": (["--model", "tiny", "--reference", "adapter"], "reference=adapter needs use_peft"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_one_line(words, message, capsys: Any):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


# What is printed is accepted


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"] |= WIDE
    config["vision_config"] |= TOWER
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Counts what several commands have in common once."""
    return Planner()


@pytest.fixture
def planned(wide: Path, planner: Planner, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Any:
    """Runs `vlmr1 plan` on the wide model: what it prints, and its figures."""
    monkeypatch.setattr("vlmr1.commands.plan.Planner", lambda: planner)
    small = ["--image_tokens", "64", "--text_tokens", "1500", "--num_generations", "2", "--prompts_per_device", "2"]
    small += ["--max_completion_length", "600"]

    def plan(*words: str, gpu: str = "1000GiB") -> tuple[str, dict[str, Any]]:
        path = tmp_path / "plan.json"
        given = [*small, *words]
        last = dict(zip(given[::2], given[1::2], strict=True))  # a remedy may change what one before it has set
        settings = [word for pair in last.items() for word in pair]
        status = main(["plan", "--model", str(wide), *settings, "--gpu", gpu, "--json", str(path)])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out, json.loads(path.read_text())

    return plan


# Settings to begin with, and the share of their peak that the GPU has.
STARTS: dict[str, tuple[list[str], float]] = {
    "three quarters": ([], 0.75),
    "half": ([], 0.5),
    "defaults": ([], 0),
    "KL in the reward": (["--kl_in_reward", "true"], 0),
    "paged": (["--optim", "paged_adamw_32bit", "--activation_checkpointing", "true"], 0),
    "stochastic": (["--model_dtype", "bfloat16", "--stochastic_rounding", "true", "--optim", "adamw_torch_8bit"], 0),
    "LoRA": (["--use_peft", "true", "--lora_merge_rollout", "true"], 0),
    "a trained projector": (["--freeze_vision", "true", "--freeze_merger", "false"], 0),
}


@pytest.mark.parametrize(("start", "share"), STARTS.values(), ids=STARTS.keys())
def test_every_remedy_that_is_printed_is_accepted_and_lowers_the_peak(start, share, planned):
    """Each with those before it, and all of them have the peak that was promised."""
    gpu = max(1, round(planned(*start)[1]["peak"]["bytes"] * share / 2**20))
    said, figures = planned(*start, gpu=f"{gpu}MiB")
    printed = [line.split("  saves ")[0].split() for line in said.splitlines() if line.startswith("  --")]
    assert len(printed) == len(figures["remedies"]) > 0
    peak, words = figures["peak"]["bytes"], list(start)
    for flags, remedy in zip(printed, figures["remedies"], strict=True):
        words += flags
        after = planned(*words)[1]["peak"]["bytes"]
        assert peak - after == remedy["saves"]
        peak = after
    assert peak == figures["with_remedies"]["peak"] < figures["peak"]["bytes"]


def test_every_remedy_is_accepted_alone(wide, planned):
    """On the job of the other tests, which reads the settings through the same command."""
    config = config_named(str(wide))
    args = args_of(num_generations=2, prompts_per_device=2, max_completion_length=600, tokens_per_pack=16384)
    for remedy in remedies(Job(args, config, image_tokens=64, text_tokens=1500)):
        planned(*str(remedy).split())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_train_is_planned(name, planned):
    said, figures = planned("--optim", name)
    assert "It fits" in said
    states = figures["phases"]["update"]["optimizer"]
    assert (states > 0) == (name != "sgd")
