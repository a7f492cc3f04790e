"""Two processes (gloo, CPU) against one with the same rows: loss, gradients and weights of two updates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.answers import assert_moved_alike, command, write_rows
from tests.helpers.forked_ranks import run_command
from tests.helpers.two_ranks import ENGINES, ROOT, Weights
from vlmr1.cli import main
from vlmr1.report.progress import read_metrics
from vlmr1.sft.loss import CrossEntropy
from vlmr1.sft.trainer import SFTTrainer

pytestmark = pytest.mark.slow
NAMES = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens", "completion_length", "truncated")
LORA = ["--use_peft", "true", "--lora_r", "4", "--learning_rate", "5"]
UPDATES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long answers to questions without an image, short ones to those about one, one to three a prompt: ranks with as
    many tokens train on unequal numbers of answer tokens."""
    folder = write_rows(tmp_path_factory.mktemp("ranks"))
    path, lines = folder / "train.jsonl", []
    for place, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line) | {"response": ["<answer>no</answer>", "no", "no"][: 1 + place % 3]}
        if place % 3 == 0:
            row = {"prompt": f"What is {place}?", "response": [f"The digit {place}. " * 9, "A digit."]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return folder


def words(folder: Path, output: Path, prompts: int, *more: str, engine: str = "ddp") -> list[str]:
    """Two updates by plain gradient descent: how far a weight moves shows its gradient."""
    plain = ["--optim", "sgd", "--max_grad_norm", "0", "--lr_scheduler_type", "constant", "--save_steps", str(UPDATES)]
    sizes = ["--prompts_per_device", str(prompts), "--max_steps", str(UPDATES), "--disable_tqdm", "true"]
    sizes += ["--use_cpu", str(engine == "ddp").lower()]  # by which DDP alone finds the other rank
    settings = [*plain, *sizes, *more, *([] if "--learning_rate" in more else ["--learning_rate", "0.2"])]
    return command(folder, output, *settings)


def alone(folder: Path, output: Path, *more: str) -> list[dict[str, float]]:
    assert main(words(folder, output, 4, *more)) == 0
    return read_metrics(output)


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    alone(folder, folder / "alone")
    return folder / "alone"


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2]
    for one, other in zip(found, expected, strict=True):
        for name in NAMES:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (name, one["step"])


def weights_of(run: Path, name: str = "model") -> Weights:
    weights = load_file(run / f"checkpoint-{UPDATES}" / f"{name}.safetensors")
    weights.pop("lm_head.weight", None)  # tied to the embeddings: not every engine writes it
    return weights


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_do_what_one_process_does(engine, folder, single, tmp_path):
    run = tmp_path / "run"
    assert_same(run_command(engine, words(folder, run, 2, engine=engine), run), read_metrics(single))
    start = load_file(ROOT / "vlmr1/tiny/checkpoint/model.safetensors")
    assert_moved_alike(weights_of(run), weights_of(single), start)


def test_an_adapter_on_two_ranks(folder, tmp_path):
    expected = alone(folder, tmp_path / "alone", *LORA)
    run = tmp_path / "run"
    assert_same(run_command("zero2", words(folder, run, 2, *LORA, engine="zero2"), run), expected)
    found, single = (weights_of(each, "adapter_model") for each in (run, tmp_path / "alone"))
    # The first weights of A are the seed's; B begins as zeros.
    behind, alike = ({name: value for name, value in each.items() if "lora_B" in name} for each in (found, single))
    assert_moved_alike(behind, alike, {})
    torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-6)


def mean_of_rank_means() -> None:
    """Have each rank divide by its own answer tokens."""

    def backward(self, model, groups):
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return self.pass_over(model, groups, CrossEntropy(float(tokens * self.ranks.world_size)))

    SFTTrainer.backward = backward


def test_a_mean_of_rank_means_is_another_loss(folder, single, tmp_path):
    """The tokens of the ranks are so unequal that the assertions above tell it from a mean over all tokens."""
    found = run_command("ddp", words(folder, tmp_path / "run", 2), tmp_path / "run", mean_of_rank_means)
    for one, other in zip(found, read_metrics(single), strict=True):
        assert abs(one["loss"] / other["loss"] - 1) > 1e-3 and abs(one["grad_norm"] / other["grad_norm"] - 1) > 1e-3
