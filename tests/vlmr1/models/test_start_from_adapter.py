"""Runs that start from a PEFT adapter, as peft's `save_pretrained` writes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers.digit_runs import command
from tests.helpers.families import build
from tests.helpers.lora_steps import perturb
from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from tests.helpers.updates import update
from vlmr1.cli import main
from vlmr1.commands.merge import merge
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import planned_model
from vlmr1.report.progress import read_metrics
from vlmr1.tiny import CHECKPOINT

WEIGHTS = "adapter_model.safetensors"


def sft(folder: Path, base: Path = CHECKPOINT, **settings: Any) -> Path:
    """A directory with an adapter of a tiny model that has learned something, and nothing else."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    perturb(model)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft(tmp_path_factory.mktemp("sft"), lora_alpha=8, lora_dropout=0.05)


def trainer_of(adapter: Path | str, processor: Any, output: Path, **settings: Any) -> GRPOTrainer:
    given = {"num_generations": 2, "max_completion_length": 12, "use_cpu": True, "adapter": str(adapter)} | settings
    given |= {"old_logprobs": "recompute"}  # groups that are made by hand have other log-probs
    config = GRPOConfig(output_dir=str(output), **given)
    return GRPOTrainer(load_model(CHECKPOINT), config, [], processor, reward_funcs=["format"])


def of_peft(folder: Path) -> Any:
    """The oracle: the model as peft reads it."""
    return PeftModel.from_pretrained(load_model(CHECKPOINT), str(folder)).get_base_model()


def logprobs(model: Any, pack: Any) -> torch.Tensor:
    return PackedPolicy(model, family_of(model), temperature=1.0).logprobs(pack)


def groups_of(make: Maker) -> list[Any]:
    return [make.group(make.prompt("Locate the digit 7.", (112,)), (9, 14))]


# Whatever peft writes

FORMS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16},
    "regular expression": {"target_modules": r".*language_model.*\.(v_proj|o_proj)", "use_rslora": True},
    "all linear, tower too": {"target_modules": "all-linear", "exclude_modules": r".*patch_embed.*", "r": 2},
    "a rank for each": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True},
    "projector whole": {"modules_to_save": ["merger"]},
}


@pytest.mark.parametrize("form", mostly_slow([*FORMS], "names", "dora"))
def test_training_goes_on_in_the_adapter(form, make, processor, tmp_path):
    """Policy and reference are the model as peft reads it; every weight of the adapter has a gradient."""
    folder = sft(tmp_path / "sft", **FORMS[form])
    trainer = trainer_of(folder, processor, tmp_path)
    groups = groups_of(make)
    pack = make_pack(groups)
    expected = logprobs(of_peft(folder), pack)
    assert float((expected - logprobs(make.model, pack)).abs().max()) > 1e-2
    torch.testing.assert_close(trainer.policy.logprobs(pack), expected, rtol=1e-5, atol=1e-5)
    assert trainer.reference is not None
    torch.testing.assert_close(trainer.reference.logprobs(pack), expected, rtol=1e-5, atol=1e-5)
    _, metrics, gradients = update(trainer, groups)
    assert abs(metrics["kl"]) < 1e-7
    saved = load_file(folder / WEIGHTS)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    graded = {name for name, gradient in gradients.items() if gradient.norm() > 0}
    assert len(trained) == len(saved) and trained == graded
    trainer.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize("kind", mostly_slow(["auto", "copy", "offload", "adapter"], "auto", "adapter"))
def test_the_reference_stays_where_the_run_began(kind, plain, make, processor, tmp_path):
    """Base and starting adapter while the policy moves; only with reference=adapter the bare base."""
    trainer = trainer_of(plain, processor, tmp_path, reference=kind)
    groups = groups_of(make)
    pack = make_pack(groups)
    expected = logprobs(load_model(CHECKPOINT) if kind == "adapter" else of_peft(plain), pack)
    perturb(trainer.model)
    assert trainer.reference is not None
    torch.testing.assert_close(trainer.reference.logprobs(pack), expected, rtol=1e-5, atol=1e-5)
    policy = trainer.policy.logprobs(pack)
    difference = expected - policy
    _, metrics, _ = update(trainer, groups)
    assert metrics["kl"] == pytest.approx(float((difference.exp() - difference - 1).mean()), rel=1e-4)
    shared = trainer.reference.model.lm_head.weight.data_ptr() == trainer.policy.model.lm_head.weight.data_ptr()
    assert shared  # only the adapter is copied


def test_settings_follow_from_the_adapter(plain, processor, tmp_path):
    """Named either way; its dropout is not taken over, and a plan has the same weights."""
    for given in ({"adapter": str(plain)}, {"model_name_or_path": str(plain)}):
        config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
        assert (config.use_peft, config.lora_r, config.lora_alpha, config.lora_dropout) == (True, 4, 8, 0.0)
        assert (config.model_name_or_path, config.adapter) == (str(CHECKPOINT), str(plain))
        assert config.reference_kind == "copy"
    planned = planned_model(str(CHECKPOINT), ParameterSettings.of(config))
    trained = trainer_of(plain, processor, tmp_path).model
    shapes = [{n: p.shape for n, p in each.named_parameters() if p.requires_grad} for each in (planned, trained)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 0


# The commands

RUN = ["--max_steps", "4", "--learning_rate", "3e-3"]


@pytest.mark.slow
def test_train_resume_and_start_again_from_the_result(plain, data, tmp_path):
    """A run that goes on has the reference of the start, not of the checkpoint: it ends bit-equal."""
    words = ["--model_name_or_path", str(plain), *RUN]
    assert main(command(data, tmp_path / "whole", *words)) == 0
    assert abs(read_metrics(tmp_path / "whole")[0]["kl"]) < 1e-7 < read_metrics(tmp_path / "whole")[-1]["kl"]
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert main(command(data, tmp_path / "resumed", *words)) == 0
    start, whole, resumed = (load_file(each / WEIGHTS) for each in (plain, tmp_path / "whole", tmp_path / "resumed"))
    assert start.keys() == whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(start[name], whole[name]) for name in whole)
    again = ["--adapter", str(tmp_path / "whole"), "--max_steps", "1", *RUN[2:]]  # the recipe names the base
    assert main(command(data, tmp_path / "again", *again)) == 0
    assert abs(read_metrics(tmp_path / "again")[0]["kl"]) < 1e-7


@pytest.mark.parametrize("form", mostly_slow(["names", "all linear, tower too", "dora"], "names"))
def test_merge_takes_the_directory(form, make, tmp_path):
    folder = sft(tmp_path / "sft", **FORMS[form])
    pack = make_pack(groups_of(make))
    assert main(["merge", "--checkpoint", str(folder), "--output", str(tmp_path / "merged")]) == 0
    load_processor(tmp_path / "merged")
    found = logprobs(load_model(tmp_path / "merged"), pack)
    torch.testing.assert_close(found, logprobs(of_peft(folder), pack), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_head(make, tmp_path):
    """Merged where the head has weights of its own; packed passes would read it without its adapter."""
    of_head = {"target_modules": ["q_proj", "lm_head"]}
    untied = build("internvl", tmp_path / "internvl")
    folder = sft(tmp_path / "sft", base=untied, **of_head)
    with pytest.raises(SettingError, match="vlmr1 merge"):
        load_model(folder)
    merge(folder, tmp_path / "merged")
    ids = torch.arange(20, 30)[None]
    expected = PeftModel.from_pretrained(load_model(untied), str(folder))(input_ids=ids).logits
    torch.testing.assert_close(load_model(tmp_path / "merged")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(SettingError, match="cannot be merged"):
        merge(sft(tmp_path / "tied", **of_head), tmp_path / "out")


def test_evaluate_takes_the_directory(plain, data, tmp_path, capsys):
    words = ["--data", str(data / "train.jsonl"), "--images", str(data / "images"), "--max_completion_length", "32"]
    words += ["--task", "rec", "--output_dir", str(tmp_path), "--limit", "2", "--use_cpu"]
    assert main(["evaluate", "--model", str(plain), *words]) == 0
    assert "acc@0.5" in capsys.readouterr().out


def test_all_linear_is_the_default(processor, tmp_path):
    def targets(**settings: Any) -> list[str]:
        config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, use_peft=True, lora_r=2, **settings)
        trainer = GRPOTrainer(load_model(CHECKPOINT), config, [], processor, reward_funcs=["format"])
        return trainer.model.base_model.targeted_module_names

    default = targets()
    assert targets(lora_target_modules=["all-linear"]) == default and not any("visual" in name for name in default)
    assert set(default) < set(targets(lora_target_modules=["all-linear"], lora_vision=True))


# Refusals


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, folder / WEIGHTS)


def of_the_head(folder: Path) -> None:
    sft(folder, target_modules=["q_proj", "lm_head"])


def in_the_tower(folder: Path) -> None:
    sft(folder, target_modules=["qkv"])


Change = Callable[[Path], object]
REFUSED: dict[str, tuple[Change, dict[str, Any], tuple[str, ...]]] = {
    "other type": (lambda f: changed(f, peft_type="LOHA"), {}, ("adapter", "LOHA")),
    "trained biases": (lambda f: changed(f, bias="all"), {}, ("bias",)),
    "other base weights": (lambda f: changed(f, init_lora_weights="pissa_niter_4"), {}, ("pissa", "vlmr1 merge")),
    "token weights": (lambda f: changed(f, trainable_token_indices=[1]), {}, ("trainable_token_indices",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), {}, (WEIGHTS,)),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes(b"123"), {}, ("adapter", "cannot be read")),
    "a weight is missing": (without_a_weight, {}, ("lora_",)),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), {}, ("adapter_config.json",)),
    "base is gone": (
        lambda f: changed(f, base_model_name_or_path="/nowhere/base"),
        {},
        ("/nowhere/base", "model_name_or_path"),
    ),
    "no directory": (shutil.rmtree, {}, ("adapter",)),
    "modules of another model": (lambda f: changed(f, target_modules=["qq_proj"]), {}, ("adapter", "qq_proj")),
    "head": (of_the_head, {}, ("lm_head", "vlmr1 merge")),
    "embeddings whole": (lambda f: changed(f, modules_to_save=["embed_tokens"]), {}, ("embed_tokens",)),
    "frozen tower": (in_the_tower, {"freeze_vision": True}, ("freeze_vision",)),
    "other rank": (lambda f: None, {"lora_r": 8}, ("lora_r is 8", "has 4")),
    "other modules": (lambda f: None, {"lora_target_modules": ["v_proj"]}, ("lora_target_modules",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, plain, processor, tmp_path):
    change, settings, words = REFUSED[case]
    folder = Path(shutil.copytree(plain, tmp_path / "sft"))
    change(folder)
    with pytest.raises(SettingError) as caught:
        trainer_of(folder, processor, tmp_path / "out", **settings)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_a_whole_model_and_an_adapter(plain, data, tmp_path, capsys):
    """Training, evaluation, and each way to name them ask which is meant."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "both"))
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    assert main(command(data, tmp_path / "out", "--model_name_or_path", str(folder))) == 2
    assert main(command(data, tmp_path / "out", "--model_name_or_path", str(folder), "--adapter", str(plain))) == 2
    with pytest.raises(SettingError):
        load_model(folder)
    asked, two = capsys.readouterr().err.split("vlmr1: ")[1:]
    assert "Which one?" in asked and f"adapter={folder}" in asked
    assert str(plain) in two and "name the base model" in two
    chosen = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, adapter=str(folder))
    assert (chosen.adapter, chosen.model_name_or_path) == (str(folder), str(CHECKPOINT))


def test_an_adapter_of_another_model(plain, processor, tmp_path):
    other = build("qwen2_vl", tmp_path / "qwen2_vl")
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, adapter=str(plain), model_name_or_path=str(other))
    with pytest.raises(SettingError, match="does not fit"):
        GRPOTrainer(load_model(other), config, [], load_processor(other), reward_funcs=["format"])
    changed(Path(shutil.copytree(plain, tmp_path / "sft")), base_model_name_or_path=str(other))
    with pytest.raises(SettingError, match="does not fit"):
        merge(tmp_path / "sft", tmp_path / "merged")


def test_an_adapter_that_cannot_be_merged(tmp_path):
    model = load_model(CHECKPOINT)
    settings = {"num_virtual_tokens": 2, "token_dim": 64, "num_layers": 1, "num_attention_heads": 1}
    PeftModelForCausalLM(model, PromptTuningConfig(**settings)).save_pretrained(str(tmp_path / "prompt"))
    with pytest.raises(SettingError, match="PROMPT_TUNING"):
        merge(tmp_path / "prompt", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# Quantized checkpoints

QUANTIZED: dict[str, Any] = {
    "AWQ": {"quant_method": "awq", "bits": 4},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "BITSANDBYTES": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "FP8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("kind", [*QUANTIZED, "GGUF"])
def test_quantized_weights_are_named(kind, data, tmp_path, capsys):
    """By train, evaluate and plan, in one line."""
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "GGUF":
        (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    else:
        shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED[kind]}))
    rows = ["--data", str(data / "train.jsonl"), "--images", str(data / "images"), "--task", "rec"]
    commands = [command(data, tmp_path / "out", "--model_name_or_path", str(folder)), ["plan", "--model", str(folder)]]
    commands += [["evaluate", "--model", str(folder), *rows, "--output_dir", str(tmp_path / "eval"), "--use_cpu"]]
    for words in commands:
        assert main(words) == 2
        (message,) = capsys.readouterr().err.split("vlmr1: ")[-1].splitlines()
        assert str(folder) in message and kind in message and "load_in_4bit" in message
