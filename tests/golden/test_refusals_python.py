"""Refusals of `refusals.jsonl` that no command line shows: of calls from Python, of engines, of packages that are not
installed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer

from tests.helpers.refused import REFUSALS
from vlmr1.config import GRPOConfig
from vlmr1.data.image_limits import limit_images
from vlmr1.data.sources import open_sources
from vlmr1.distributed.launch import check_launched
from vlmr1.distributed.sharded import check_sharded
from vlmr1.evaluation.compare import comparison
from vlmr1.evaluation.decode import decode_missing
from vlmr1.evaluation.options import Options
from vlmr1.grpo.pack_budget import PackTooLarge
from vlmr1.grpo.pack_runner import PackRunner
from vlmr1.lifecycle.run_settings import check_settings
from vlmr1.models import attention, fused_layers
from vlmr1.models.lora import read_adapter, restore_adapter, with_lora
from vlmr1.models.precision import prepare_trained
from vlmr1.rewards import pool
from vlmr1.rewards.score import score
from vlmr1.rewards.settings import RewardSettings
from vlmr1.training.hf_trainer import HFTrainer
from vlmr1_kernels import linear_grpo_loss, registry
from vlmr1_kernels.native import library

Patch = pytest.MonkeyPatch
anything: Any = SimpleNamespace
NO_PEFT, NO_ENGINE = (sys.modules, "peft", None), anything(distributed_type=anything(value="NO"))
REWARD = ("format", {"prompts": [[]], "completions": [[{"content": ""}]], "solution": [""]})


def patched(patch: Patch, target: Any, name: str, value: Any, call: Callable[..., Any], *given: Any, **named: Any):
    (patch.setitem if hasattr(target, "keys") else patch.setattr)(target, name, value)
    call(*given, **named)


def diverged(patch: Patch) -> None:
    """The gradient norm of an update that DeepSpeed has made, with a loss that is not finite."""
    patch.setattr(Trainer, "_get_grad_norm", lambda *_: 1.0)
    trainer = object.__new__(HFTrainer)
    trainer.last_loss, trainer.is_deepspeed_enabled = float("nan"), True
    trainer.state = anything(global_step=0)
    trainer._get_grad_norm(None)


def another_adapter(folder: Path) -> None:
    """An adapter that has other weights than the checkpoint."""
    from peft import LoraConfig, get_peft_model

    save_file({"other": torch.zeros(1)}, folder / "adapter_model.safetensors")
    layers: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    restore_adapter(get_peft_model(layers, LoraConfig(target_modules=["0"])), folder)


def dead_worker() -> None:
    """A task for a process that has ended."""
    worker = pool._Worker()
    worker.stop = worker.connection.close
    worker.process.kill()
    worker.process.wait()
    for _ in range(2):  # the first may still find room in the socket
        worker.send(0, REWARD)


def unreadable_settings(folder: Path) -> None:
    (folder / "settings.json").write_text("{", encoding="utf-8")
    check_settings(GRPOConfig(use_cpu=True), {}, folder / "checkpoint-1")


def compared_tasks() -> None:
    """Results of two tasks over the same rows."""
    both = [{"rows": {}, "bootstrap": {}, "options": {"task": task}} for task in ("rec", "vqa")]
    comparison([anything(content=content, model="m", metrics={}) for content in both])


def bfloat16_beside_adapter() -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    prepare_trained(model, anything(bf16=False, stochastic_rounding=False, use_peft=True))


def unimportable() -> None:
    raise ImportError("cannot import name 'ops'")


def with_zero3(**settings: Any) -> None:
    names = ("stochastic_rounding", "load_in_4bit", "use_dora", "sync_ref_model", "use_peft")
    known = dict.fromkeys(names, False) | {"reference": "auto", "reference_kind": "copy", "adapter": None, "beta": 0.04}
    check_sharded(anything(**known | settings), "zero3", engine=True)


def no_token(patch: Patch) -> None:
    patch.setattr("vlmr1.training.settings.get_token", lambda: None)
    GRPOConfig(use_cpu=True, push_to_hub=True).check_device("cpu")


def other_rows() -> None:
    done = {0: anything(source="a:1")}
    decode_missing(anything(), [anything(source="b:1")], anything(path="records"), done, anything())


def shrink() -> None:
    def run() -> None:
        raise PackTooLarge(anything(), "out of memory")

    PackRunner.retry_smaller(anything(parallel=anything(in_lockstep=True)), run)


def rows_of_two_dimensions() -> None:
    rows = torch.zeros(1, 1, dtype=torch.long)
    ids = torch.zeros(2, dtype=torch.long)
    linear_grpo_loss(torch.zeros(2, 3), torch.zeros(4, 3), ids, ids, torch.zeros(1), active_rows=rows)


def sliding_window() -> None:
    q = torch.zeros(1, 1, 1, 8)
    attention._forward(anything(layer_idx=0), q, q, q, None, shared=anything(), sliding_window=4)


# By the condition in the list; a function is given what its arguments are named after.
CASES: dict[str, Callable[..., Any]] = {
    "An evaluation has an unknown task (from Python)": lambda: Options("none", ("a",)),  # type: ignore[arg-type]
    "An evaluation names no data file (from Python)": lambda: Options("rec", ()),
    "An evaluation has an unknown dtype, rollout engine or kind of box coordinates (from Python)": lambda: Options(
        "rec", ("a",), dtype="float16"
    ),
    "A list of data files is empty (from Python)": lambda: open_sources([], []),
    "A plan has reference=adapter without use_peft (from Python)": lambda: GRPOConfig(
        use_cpu=True, reference="adapter"
    ),
    "A plan has load_in_4bit without use_peft (from Python)": lambda: GRPOConfig(use_cpu=True, load_in_4bit=True),
    "A plan has activation_offload without gradient_checkpointing (from Python)": lambda: GRPOConfig(
        use_cpu=True, activation_offload=True
    ),
    "A plan has an unknown model_dtype (from Python)": lambda: GRPOConfig(use_cpu=True, model_dtype="float16"),
    "Reward settings have an unknown reward_mode (from Python)": lambda: RewardSettings(mode="none"),  # type: ignore[arg-type]
    "vlmr1 evaluate compare: the results are of different tasks": compared_tasks,
    "A saved record of an evaluation is of another row than the data has there": other_rows,
    "vlmr1 plan: use_peft is set and peft is not installed": lambda patch: patched(
        patch, *NO_PEFT, GRPOConfig, use_cpu=True, use_peft=True
    ),
    "use_peft is set and peft is not installed": lambda patch: patched(
        patch, *NO_PEFT, with_lora, None, anything(), anything()
    ),
    "A directory holds an adapter and peft is not installed": lambda patch: patched(
        patch, *NO_PEFT, read_adapter, None, "adapter"
    ),
    "lora_modules_to_save trains a module whose weights are bfloat16": bfloat16_beside_adapter,
    "The adapter of a checkpoint is not the one of the run that resumes it": another_adapter,
    "The environment asks for FSDP or DeepSpeed and accelerate uses another engine": lambda patch: patched(
        patch, os.environ, "ACCELERATE_USE_FSDP", "true", check_launched, 1, NO_ENGINE
    ),
    "fused_layers=liger and liger-kernel is not installed": lambda patch: patched(
        patch, sys.modules, "liger_kernel", None, GRPOConfig(use_cpu=True, fused_layers="liger").check_device, "cuda"
    ),
    "fused_layers=liger and liger-kernel cannot be imported": lambda patch: patched(
        patch, fused_layers, "liger_operators", unimportable, fused_layers.operators_for, "liger", "cuda"
    ),
    "fused_layers has an unknown value (from Python)": lambda: GRPOConfig(use_cpu=True, fused_layers="fast"),
    "A run starts from an adapter with ZeRO-3 and a copied reference": lambda: with_zero3(use_peft=True, adapter="a"),
    "Memory runs out in a pass of a run of several ranks, which cannot repack alone": shrink,
    "DeepSpeed has applied an update whose loss is not finite": diverged,
    "The process of a reward died before it took a completion": dead_worker,
    "The process of a reward did not start in time": lambda patch: patched(
        patch, pool, "START_LIMIT", 0, lambda: pool.RewardPool(1, 10.0).run([REWARD])
    ),
    "The native library was built from other sources than the installed ones": lambda patch: patched(
        patch, library, "_INTERFACE", -1, library.library.__wrapped__
    ),
    "active_rows does not have one dimension": rows_of_two_dimensions,
    "No implementation of an op serves the given device, dtype or shape": lambda patch: patched(
        patch, registry, "implementations", lambda op: {}, registry.resolve, "grpo_loss", "auto", anything()
    ),
    "The model's attention has a sliding window or a softcap, which shared prompts cannot serve": sliding_window,
    "max_anyres_num is below the number of tiles that the processor makes at least": lambda: limit_images(
        anything(image_processor=anything(min_patches=2, max_patches=6)), "internvl", max_anyres_num=1
    ),
    "accu_reward_method is an empty list (from Python)": lambda: GRPOConfig(use_cpu=True, accu_reward_method=[]),
    "Mode vlm_r1: iou_qwen is used without the columns image_grid_thw and image_size": lambda: score(
        "iou_qwen", "<answer>[0, 0, 9, 9]</answer>", "<answer>[0, 0, 9, 9]</answer>", mode="vlm_r1"
    ),
    "full_determinism is set on a GPU": lambda: GRPOConfig(use_cpu=True, full_determinism=True).check_device("cuda"),
    "push_to_hub is set and there is no token": no_token,
    "settings.json of a run that is resumed cannot be read": unreadable_settings,
}
LISTED = {e["condition"]: e for e in REFUSALS if e.get("test", "").endswith("::test_refused_in_python")}


@pytest.mark.parametrize("condition", list(CASES))
def test_refused_in_python(condition: str, tmp_path: Path, monkeypatch: Patch):
    if condition.startswith("The native library") and library.unavailable_reason() is not None:
        pytest.skip(str(library.unavailable_reason()))
    call = CASES[condition]
    names = call.__code__.co_varnames[: call.__code__.co_argcount]
    given = {"patch": monkeypatch, "folder": tmp_path}
    with pytest.raises(Exception) as caught:
        call(**{name: given[name] for name in names})
    assert [word for word in LISTED[condition]["words"] if word not in str(caught.value)] == [], caught.value


def test_every_case_is_listed():
    assert set(LISTED) == set(CASES)
