"""Adapters on two processes (gloo, CPU) against one; the reference is the policy without its adapter."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.helpers.forked_ranks import assert_resumes, run_forked
from tests.helpers.two_ranks import (
    ENGINES,
    ROOT,
    assert_close,
    assert_moved,
    assert_same,
    evaluations,
    metrics,
    run_alone,
)
from vlmr1.distributed.launch import LAUNCHES
from vlmr1.grpo import pack_trainer, policy, reference, trainer
from vlmr1.models import load_model

LORA = {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "beta": 0.04}
LORA |= {"adam_epsilon": 1e-5}  # what is only rounding moves no weight
SETTINGS = {
    "tower": {"lora_vision": "true", "gradient_checkpointing": "true"},
    "copy": {"reference": "copy", "lora_modules_to_save": "visual.merger"},
    "merged": {"lora_merge_rollout": "true", "eval_steps": 2},
    "dora": {"use_dora": "true"},
}


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-4" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., Path]:
    """A function that returns the output directory of one process with the given settings. Each run is made once."""
    names = map("alone-{}".format, count())

    @cache
    def alone(**more: Any) -> Path:
        output = folder / next(names)
        run_alone(folder, output, **more)
        return output

    return alone


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_lora_on_two_ranks(engine, folder, alone, tmp_path):
    """The checkpoint lies between two updates of one generation; it is an ordinary directory of an adapter."""
    single = alone(**LORA)
    found = run_forked(engine, folder, tmp_path / "run", **LORA)
    assert_same(found, metrics(single))
    assert found[-1]["kl"] > 0
    exported = adapter_of(tmp_path / "run")
    resumed = adapter_of(assert_resumes(engine, folder, tmp_path / "run", **LORA))
    assert exported.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in exported.items())
    assert_close(exported, adapter_of(single))
    assert_moved(exported, adapter_of(single))
    base, adapter = load_model(ROOT / "vlmr1/tiny/checkpoint"), str(tmp_path / "run" / "checkpoint-4")
    read = PeftModel.from_pretrained(base, adapter).state_dict()
    for name, value in exported.items():
        assert torch.equal(read[name.replace(".weight", ".default.weight")], value), name


@pytest.fixture
def eager(tmp_path: Path) -> dict[str, str]:
    """ZeRO-3 releases every parameter behind its module, as it does in a model that is large."""
    config = json.loads(Path(LAUNCHES["zero3"]["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
    names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.mark.slow
@pytest.mark.parametrize("engine, name", [*product(("zero3", "fsdp2"), ("tower", "merged", "copy")), ("fsdp2", "dora")])
def test_settings_of_lora_where_parameters_are_sharded(engine, name, folder, alone, eager, tmp_path):
    """An adapter in the tower, which a rank without an image calls too; merged for rollouts; with a module that is
    trained whole, and another model as the reference."""
    more = LORA | SETTINGS[name]
    if name == "merged":
        more |= {"eval_data_file_paths": folder / "data.jsonl", "eval_image_folders": folder}
    expected = alone(**more)
    environment = eager if engine == "zero3" else None
    found = run_forked(engine, folder, tmp_path / "run", environment=environment, **more)
    assert_same(found, metrics(expected))
    assert found[-1]["kl"] > 0
    exported, single = adapter_of(tmp_path / "run"), adapter_of(expected)
    assert_close(exported, single)
    assert_moved(exported, single)
    if name == "merged":
        for row, other in zip(evaluations(tmp_path / "run"), evaluations(expected), strict=True):
            assert row == pytest.approx(other, rel=1e-5)


@dataclass(frozen=True)
class CountingFetches:
    """In a rank: how many weights ZeRO-3 has fetched ahead, by a trace of an earlier pass, for each kind of pass."""

    folder: Path

    def __call__(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        ahead, now, fetch = Counter[str](), ["policy"], Coordinator.fetch_sub_module

        def fetch_counted(coordinator: Any, module: Any, forward: bool) -> None:
            if coordinator.is_complete_trace():
                own = module.parameters(recurse=False)
                ahead[now[0]] += sum(each.ds_status == ZeroParamStatus.INFLIGHT for each in own)
                path = self.folder / f"ahead-{os.environ['RANK']}.json"
                path.write_text(json.dumps(ahead), encoding="utf-8")
            fetch(coordinator, module, forward)

        def named(name: str) -> Callable:
            def call(*arguments: Any) -> Any:
                now[0] = name
                return policy.call(*arguments)

            return call

        Coordinator.fetch_sub_module = fetch_counted
        reference.call = named("reference")
        pack_trainer.call = trainer.call = named("policy")


@pytest.mark.slow
def test_weights_that_are_fetched_ahead(folder, alone, eager, tmp_path):
    """ZeRO-3 follows a pass by the trace of an earlier one; the reference's has no adapter in it, the policy's has."""
    path = Path(eager["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    config = json.loads(path.read_text(encoding="utf-8"))
    config["zero_optimization"] |= {"stage3_max_live_parameters": 200_000, "stage3_prefetch_bucket_size": 50_000}
    path.write_text(json.dumps(config), encoding="utf-8")
    more = LORA | {"adam_epsilon": 1e-5}
    found = run_forked("zero3", folder, tmp_path / "run", CountingFetches(tmp_path), eager, **more)
    assert_same(found, metrics(alone(**more)))
    for rank in range(2):
        ahead = json.loads((tmp_path / f"ahead-{rank}.json").read_text(encoding="utf-8"))
        assert ahead["reference"] > 0 and ahead["policy"] > 0
