"""Checkpoints that hold an adapter: small, resumed bit for bit, evaluated and merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.digit_runs import STEPS, command
from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from vlmr1.cli import main
from vlmr1.commands.merge import merge
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.models.quantization import quantization_of
from vlmr1.tiny import CHECKPOINT

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8", "--learning_rate", "3e-3"]
DROPOUT = ["--lora_dropout", "0.2", "--share_prompt", "false", "--pack", "false"]  # draws: their state is resumed too
KINDS = {"lora": DROPOUT, "qlora": ["--load_in_4bit", "true"], "dora": ["--use_dora", "true"]}


@pytest.fixture(scope="module", params=mostly_slow(["lora", "qlora"], "lora"))
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a whole run."""
    folder = tmp_path_factory.mktemp(request.param)
    assert main(command(data, folder, *LORA, *KINDS[request.param])) == 0
    return folder


def kind_of(run: Path) -> str:
    return run.name.rstrip("0123456789")


def adapter_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def logprobs(model: Any, processor: Any, image_files: Any) -> torch.Tensor:
    make = Maker(model, processor, image_files)
    pack = make_pack([make.group(make.prompt("Locate the digit 7.", (112,)), (9, 14))])
    return PackedPolicy(model, family_of(model), temperature=1.0).logprobs(pack)


def test_a_checkpoint_holds_the_adapter_only(run):
    checkpoint = run / f"checkpoint-{STEPS}"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "config.json" not in names  # transformers would look for a whole model
    assert not [name for name in names if name.startswith("model")]
    sizes = {each.dtype for each in adapter_weights(checkpoint).values()}
    assert sizes == {torch.float32}
    of_base = (CHECKPOINT / "model.safetensors").stat().st_size
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < of_base / 10
    assert ("quantization_config.json" in names) == (kind_of(run) == "qlora")
    before, after = adapter_weights(run / "checkpoint-4"), adapter_weights(checkpoint)
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in after)


def test_a_run_that_goes_on_ends_with_the_same_adapter(run, data, tmp_path, capsys):
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    assert main(command(data, tmp_path, *LORA, *KINDS[kind_of(run)])) == 0
    said = capsys.readouterr()
    assert "continuing from" in said.out and "missing keys" not in said.out + said.err
    expected, found = (adapter_weights(folder / f"checkpoint-{STEPS}") for folder in (run, tmp_path))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_load_model_reads_base_and_adapter(run, image_files):
    """As it was quantized in training; merged it gives the same logits, and the base alone gives others."""
    checkpoint = run / f"checkpoint-{STEPS}"
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert quantized == (kind_of(run) == "qlora")
    trained = logprobs(model, processor, image_files)
    base = logprobs(load_model(CHECKPOINT), processor, image_files)
    assert float((trained - base).abs().max()) > 1e-2
    assert_merged(checkpoint, run / "merged", trained, image_files)


def assert_merged(checkpoint: Path, output: Path, expected: torch.Tensor, image_files: Any) -> None:
    merge(checkpoint, output)
    assert not (output / "adapter_config.json").exists()
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    found = logprobs(load_model(output), load_processor(output), image_files)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_evaluate(run, data, tmp_path, capsys):
    checkpoint = run / f"checkpoint-{STEPS}"
    words = ["--data", str(data / "train.jsonl"), "--images", str(data / "images"), "--max_completion_length", "32"]
    words += ["--task", "rec", "--output_dir", str(tmp_path), "--limit", "4", "--use_cpu"]
    assert main(["evaluate", "--model", str(checkpoint), *words]) == 0
    assert "acc@0.5" in capsys.readouterr().out


def test_merge_command(run, tmp_path, capsys):
    checkpoint, output = run / f"checkpoint-{STEPS}", tmp_path / "merged"
    words = ["merge", "--checkpoint", str(checkpoint), "--output", str(output), "--dtype", "bfloat16"]
    assert main(words) == 0
    assert ("was trained in 4 bits" in capsys.readouterr().out) == (kind_of(run) == "qlora")
    assert {each.dtype for each in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


def test_a_checkpoint_with_the_configuration_of_its_base_is_read(run, tmp_path):
    """As they were written before: how the base was quantized stands in there."""
    checkpoint = Path(shutil.copytree(run / f"checkpoint-{STEPS}", tmp_path / "checkpoint"))
    model = load_model(checkpoint)
    model.config.save_pretrained(checkpoint)
    (checkpoint / "quantization_config.json").unlink(missing_ok=True)
    expected, found = quantization_of(run / f"checkpoint-{STEPS}"), quantization_of(checkpoint)
    assert (found is not None) == (expected is not None) == (kind_of(run) == "qlora")
    assert found is None or found.to_dict() == expected.to_dict()
    assert {type(module) for module in model.modules()} == {type(module) for module in load_model(checkpoint).modules()}


@pytest.mark.slow
def test_a_dora_adapter_merges(data, tmp_path, image_files):
    assert main(command(data, tmp_path, *LORA, *KINDS["dora"], "--max_steps", "2")) == 0
    checkpoint = tmp_path / "checkpoint-2"
    expected = logprobs(load_model(checkpoint), load_processor(checkpoint), image_files)
    assert_merged(checkpoint, tmp_path / "merged", expected, image_files)
