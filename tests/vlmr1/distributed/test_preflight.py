"""What can be known of a run before its model is read is said before: nothing has been loaded then."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from vlmr1.commands.arguments import parse_config
from vlmr1.commands.train import train
from vlmr1.distributed.launch import CONFIGS
from vlmr1.distributed.preflight import undivided
from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import STAGING, publish
from vlmr1.lifecycle.disk import checkpoint_bytes
from vlmr1.models import family_of, load_model
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import choose_trained, planned_model
from vlmr1.tiny import CHECKPOINT, digits


class Loaded(Exception):
    """The run has come to the point where it reads weights."""


def config_of(folder: Path, **more: Any) -> Any:
    settings = {"data_file_paths": folder / "train.jsonl", "image_folders": folder / "images"}
    settings |= {"model_name_or_path": "tiny", "use_cpu": "true", "output_dir": folder / "out", **more}
    return parse_config([word for name, value in settings.items() for word in (f"--{name}", str(value))])


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begins a run with further settings, under an engine, which has to come to where weights would be read."""
    digits.write(tmp_path, "train", 4, seed=3)
    monkeypatch.setattr("vlmr1.commands.prepare.load_model", Mock(side_effect=Loaded))

    def begin(engine: str = "", **more: Any) -> None:
        config = config_of(tmp_path, **more)
        if engine.startswith("zero"):
            config.deepspeed_plugin = SimpleNamespace(zero_stage=int(engine[-1]), dschf=None)
        if engine.startswith("fsdp"):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            monkeypatch.setenv("FSDP_VERSION", engine[-1])
        if engine == "apart":
            monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(Loaded):
            train(config)

    return begin


BEST = {"load_best_model_at_end": "true", "eval_steps": 100, "val_split_ratio": 0.5}
SYNCED = {"use_peft": "true", "reference": "copy", "sync_ref_model": "true"}
ROUNDED = {"model_dtype": "bfloat16", "optim": "adamw_torch_8bit", "stochastic_rounding": "true"}
REFUSED = {
    "offload": ("zero3", {"reference": "offload"}, "reference=offload is not supported with zero3"),
    "dora": ("zero3", {"use_peft": "true", "use_dora": "true"}, "use_dora is not supported with zero3"),
    "synced-adapter": ("zero3", SYNCED, "sync_ref_model with use_peft is not supported with zero3"),
    "4-bit, zero3": ("zero3", {"use_peft": "true", "load_in_4bit": "true"}, "load_in_4bit.*zero3"),
    "4-bit, fsdp2": ("fsdp2", {"use_peft": "true", "load_in_4bit": "true"}, "load_in_4bit.*fsdp2"),
    "kept-cache": ("fsdp2", {"rollout_keep_cache": "true"}, "rollout_keep_cache is not supported with fsdp2"),
    "weights-only": ("fsdp2", {"save_only_model": "true"}, "save_only_model is not supported with fsdp2"),
    "best-of-shards": ("zero3", BEST, "load_best_model_at_end is not supported with zero3"),
    "best-of-weights-only": ("zero2", BEST | {"save_only_model": "true"}, "save_only_model is not supported with load"),
    "old-fsdp": ("fsdp1", {}, "fsdp_version"),
    "rounding": ("zero2", ROUNDED, "stochastic_rounding needs one process"),
}


@pytest.mark.parametrize(("engine", "settings", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_an_engine_cannot_honour(engine, settings, says, begin):
    with pytest.raises(SettingError, match=says):
        begin(engine, **settings)


@pytest.mark.parametrize("name", ["kl_in_reward", "sync_ref_model", "dynamic_sampling"])
def test_settings_that_sharded_weights_honour(name, begin):
    begin("fsdp2", **{name: "true"})


def test_processes_that_do_not_see_each_other(begin):
    with pytest.raises(SettingError, match="2 processes were launched, but this one sees 1"):
        begin("apart")


def checkpoint(folder: Path, *, step: int) -> None:
    """For a run of 4 steps, with weights only."""
    made = folder / "made"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 4}), encoding="utf-8")
    publish(made, folder / f"checkpoint-{step}")


def test_a_checkpoint_that_no_run_goes_on_from(begin, tmp_path):
    checkpoint(tmp_path / "out", step=2)
    with pytest.raises(SettingError, match=r"checkpoint-2 has no optimizer state \(save_only_model\)"):
        begin()
    checkpoint(tmp_path / "out", step=4)  # the run has ended: there is nothing to go on with
    begin()


def test_a_run_that_starts_over_beside_a_checkpoint(begin, tmp_path):
    begin(resume_from_checkpoint="false")
    checkpoint(tmp_path / "out", step=2)
    with pytest.raises(SettingError, match=r"resume_from_checkpoint is false, and .*checkpoint-2 is there"):
        begin(resume_from_checkpoint="False")


OTHERS = {  # settings of the run before, and what is said of them
    "setting": ({"num_iterations": 4}, "num_iterations is 1, but the run in {} was started with 4"),
    "processes": ({"processes": 2, "launch": "ddp"}, "processes is 1, but the run in {} was started with 2"),
}


@pytest.mark.parametrize("settings, says", OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_other_settings(settings, says, begin, tmp_path):
    """Whatever directory the run is to write to. A setting that it was written without may have any value."""
    run, written = tmp_path / "out", json.loads(config_of(tmp_path).to_json_string())
    checkpoint(run, step=4)
    (run / "settings.json").write_text(json.dumps(written | settings), encoding="utf-8")
    for more in ({}, {"output_dir": tmp_path / "other", "resume_from_checkpoint": run / "checkpoint-4"}):
        with pytest.raises(SettingError, match=says.format(run)):
            begin(**more)
    absent = {name: value for name, value in written.items() if name not in settings}
    (run / "settings.json").write_text(json.dumps(absent), encoding="utf-8")
    begin()


@pytest.fixture
def free(monkeypatch):
    """5 MiB are free: enough for an adapter and its optimizer, not for the model and its own."""
    usage = SimpleNamespace(total=2**40, used=2**40, free=5 * 2**20)
    monkeypatch.setattr("vlmr1.lifecycle.disk.shutil.disk_usage", lambda path: usage)
    return usage


def test_a_finished_run_on_a_full_disk(begin, free, tmp_path, caplog):
    free.free = 0
    checkpoint(tmp_path / "out", step=4)
    begin()
    assert "a checkpoint takes about" not in caplog.text


def test_what_a_killed_run_left_is_gone_before_the_room_is_looked_at(begin, tmp_path):
    left = tmp_path / "out" / f"{STAGING}checkpoint-2"
    left.mkdir(parents=True)
    begin()
    assert not left.exists()


@pytest.mark.parametrize("engine", ["", "zero3"])
def test_a_full_disk(engine, begin, free, monkeypatch, caplog):
    monkeypatch.setattr("vlmr1.distributed.preflight.set_hf_deepspeed_config", lambda config: None)
    begin(engine, use_peft="true", lora_r=4)
    assert "a checkpoint takes about" not in caplog.text
    begin(engine)
    assert "has 0.00 GiB free, but a checkpoint takes about 0.03 GiB" in caplog.text
    caplog.clear()
    begin(engine, save_strategy="no")
    assert "a checkpoint takes about" not in caplog.text


@pytest.mark.parametrize(
    "more",
    [{}, {"freeze_vision": "true"}, {"use_peft": "true", "model_dtype": "bfloat16", "lora_vision": "true"}],
    ids=["all", "decoder", "adapter"],
)
def test_what_a_checkpoint_takes_is_known_without_weights(more):
    config = parse_config(["--use_cpu", "true", *(w for name, value in more.items() for w in (f"--{name}", value))])
    model = load_model(CHECKPOINT, dtype=getattr(torch, config.model_dtype))
    read = choose_trained(model, family_of(model), ParameterSettings.of(config))
    planned = planned_model(str(CHECKPOINT), ParameterSettings.of(config))
    assert {parameter.device.type for parameter in planned.parameters()} == {"meta"}
    for only in (True, False):
        sizes = [checkpoint_bytes(each, "adamw_torch_fused", weights_only=only) for each in (planned, read)]
        assert sizes[0] == sizes[1] > 0


def test_a_model_is_planned_as_it_is_read(tmp_path, monkeypatch):
    """With the attention that is asked for, not that of its configuration; with its own code, where that is allowed."""
    code = "from transformers import Qwen2_5_VLForConditionalGeneration as Base\nclass Own(Base):\n    pass\n"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(code, encoding="utf-8")
    written = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    written |= {"attn_implementation": "flash_attention_2", "auto_map": {"AutoModelForImageTextToText": "own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(written), encoding="utf-8")
    config = parse_config(["--use_cpu", "true", "--trust_remote_code", "true"])
    planned = planned_model(str(tmp_path / "model"), ParameterSettings.of(config))
    assert type(planned).__name__ == "Own" and planned.config._attn_implementation == config.attn_implementation


# Models that one rank makes alone, under ZeRO-3


@pytest.fixture
def zero3() -> Any:
    """What transformers goes by when it makes a model; it holds the configuration weakly."""
    pytest.importorskip("deepspeed")
    yield HfDeepSpeedConfig(json.loads((CONFIGS / "zero3.json").read_text(encoding="utf-8")))
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("failing", [False, True], ids=["done", "failed"])
def test_a_model_that_one_rank_makes_is_whole(failing, zero3):
    with undivided(None):  # without a plugin nothing changes
        assert is_deepspeed_zero3_enabled()
    with suppress(OSError), undivided(SimpleNamespace(dschf=zero3)):
        assert not is_deepspeed_zero3_enabled()
        if failing:
            raise OSError
    assert is_deepspeed_zero3_enabled()
    assert deepspeed_config() is zero3.config
