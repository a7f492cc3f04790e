"""Every arm differs from its base in what it says and in nothing else, and runs the ops that it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.model import SHAPES
from benchmarks.suite import ablation
from benchmarks.suite.arms import TrainerArm, half_flat
from benchmarks.suite.bed import Bed
from benchmarks.suite.step import fits
from vlmr1.config import GRPOConfig
from vlmr1_kernels import registry

CPU, LEFT_OUT = ablation.arms("cpu", torch.float32, SHAPES["tiny"])
GPU, _ = ablation.arms("cuda", torch.bfloat16, SHAPES["3b"])
ALONE = {  # setting: its arm
    "share_vision": {"share_vision": True},
    "share_prompt": {"share_vision": True, "share_prompt": True},
    "pack": {"pack": True},
    "native": {"rollout_engine": "native"},
    "grpo_loss": {"kernels": "grpo_loss=native"},
    "shared+linear_logprob": {"kernels": "linear_logprob=native"},
    "shared+linear_grpo_loss": {"kernels": "linear_grpo_loss=native"},
    "shared+shared_prefix_attention": {"kernels": "shared_prefix_attention=cpu"},
    "shared+varlen_attention": {"kernels": "varlen_attention=batched"},
    "frozen+share_vision": {"share_vision": True},
    "flat+skip_zero_advantage": {"skip_zero_advantage": True},
}


def settings_of(arm: ablation.Arm) -> dict[str, Any]:
    kernels = {f"kernels/{op}": impl for op, impl in arm.kernels.items()}
    return {"share_vision": False, "skip_zero_advantage": False, "cuda_graphs": None} | arm.config | kernels


def said(settings: Any) -> dict[str, Any]:
    """The settings of a row, kernels one by one."""
    kernels = dict(each.split("=") for each in settings.get("kernels", "").split(",") if each)
    others = {name: value for name, value in settings.items() if name != "kernels"}
    return others | {f"kernels/{op}": impl for op, impl in kernels.items()}


@pytest.mark.parametrize("arms", [CPU, GPU], ids=["cpu", "gpu"])
def test_an_arm_differs_from_its_base_in_what_it_says(arms: dict[str, ablation.Arm]):
    for name, arm in arms.items():
        if arm.base != name:
            own, base = settings_of(arm), settings_of(arms[arm.base])
            assert {each: own[each] for each in own if own[each] != base[each]} == said(arm.settings), name
            assert (arm.kl, arm.flat) == (arms[arm.base].kl, arms[arm.base].flat), name


@pytest.mark.parametrize("name", ALONE)
def test_a_switch_alone(name: str):
    assert said(CPU[name].settings) == said(ALONE[name])


def test_the_list_of_arms():
    assert CPU.keys() == {"naive", "all", "shared", "frozen", "flat", *ALONE}
    assert all(CPU[arm.base].base == arm.base for arm in CPU.values())
    assert LEFT_OUT.keys() == {"group_advantages", "cuda_graphs", "shared+shared_prefix_decode"}
    assert GPU.keys() >= {"cuda_graphs", "shared+shared_prefix_decode"}


def test_what_a_gpu_uses():
    graphs = {"rollout_engine": "native", "cuda_graphs": True, "kernels": "shared_prefix_decode=triton"}
    assert GPU["cuda_graphs"].settings == graphs
    assert GPU["all"].kernels["linear_grpo_loss"] == "triton" and GPU["all"].config["cuda_graphs"]


@pytest.mark.parametrize("name", CPU)
def test_a_run_accepts_every_arm(name: str, tmp_path: Path):
    arm = CPU[name]
    beta = {} if arm.kl else {"beta": 0.0, "skip_zero_advantage": False}
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, **{**beta, **arm.config}, kernels=ablation.kernels_of(arm)
    )
    assert all(getattr(config, setting) == value for setting, value in arm.config.items())


@pytest.fixture(scope="module")
def bed(tmp_path_factory: Any) -> Bed:
    return Bed(tmp_path_factory.mktemp("bed"), SHAPES["tiny"], device="cpu", dtype=torch.float32, prompts=2)


OF_SHARED = (*ablation.OF_SHARED, "group_advantages")
DECISIVE: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {  # of a shape
    "linear_logprob": lambda shape: shape[1:],
    "group_advantages": lambda shape: shape,
    "grpo_loss": lambda shape: (),
    "linear_grpo_loss": lambda shape: shape[1:],
    "shared_prefix_attention": lambda shape: (*shape[:2], shape[3]),
    "varlen_attention": lambda shape: (*shape[:2], shape[3]),
    "shared_prefix_decode": lambda shape: shape,
}
CALLS = {
    "naive": ablation.OF_NAIVE,
    "grpo_loss": ablation.OF_NAIVE,
    "shared": OF_SHARED,
    "shared+varlen_attention": OF_SHARED,
    "all": OF_SHARED,
}


@pytest.mark.parametrize(("name", "ops"), CALLS.items(), ids=CALLS.keys())
def test_a_step_calls_the_ops_of_the_list_as_it_says(bed: Bed, monkeypatch: Any, name: str, ops: tuple[str, ...]):
    served: set[tuple[str, str]] = set()
    load = registry._load

    def noted(target: str) -> Any:
        implementation, _, op = target.split(":")[0].removeprefix("vlmr1_kernels.").partition(".")
        served.add((op, implementation))
        return load(target)

    monkeypatch.setattr(registry, "_load", noted)
    TrainerArm(bed, CPU[name]).step()
    assert served == {(op, CPU[name].kernels[op]) for op in ops}


def test_a_kernel_that_cannot_run_is_refused_and_no_other_takes_its_place(bed: Bed):
    kernels = {**CPU["shared"].kernels, "shared_prefix_decode": "triton"}
    arm = replace(CPU["shared"], name="decode", kernels=kernels)
    reason = fits(TrainerArm(bed, arm).step)
    assert reason is not None and reason.startswith(
        "shared_prefix_decode: implementation 'triton' does not support this call: runs on"
    )


def test_what_auto_is_asked_is_what_a_step_asks(bed: Bed, monkeypatch: Any):
    """Device, dtype and all of the shape but lengths and counts of rows."""
    asked: dict[str, set[tuple[Any, ...]]] = {}
    chosen = registry.select

    def noted(op: str, request: registry.Request, impl: str = "auto") -> Any:
        asked.setdefault(op, set()).add((request.device.type, request.dtype, DECISIVE[op](request.shape)))
        return chosen(op, request, impl)

    monkeypatch.setattr(registry, "select", noted)
    for name in ("naive", "shared"):
        TrainerArm(bed, CPU[name]).step()
    wanted = ablation.requests("cpu", torch.float32, SHAPES["tiny"])
    assert asked == {op: {(r.device.type, r.dtype, DECISIVE[op](r.shape))} for op, r in wanted.items()}


def test_rewards_are_on_the_host():
    request = ablation.requests("cuda", torch.bfloat16, SHAPES["3b"])["group_advantages"]
    assert request.device.type == "cpu" and GPU["all"].kernels["group_advantages"] != "triton"


def test_a_frozen_arm_does_not_freeze_the_next(bed: Bed):
    frozen = TrainerArm(bed, CPU["frozen"])
    norms = frozen.figures(bed.groups())
    naive = TrainerArm(bed, CPU["naive"])
    assert not naive.frozen and frozen.frozen
    assert naive.figures(bed.groups())["grad_norm"] > norms["grad_norm"]
    tower = bed.family.vision_parameters(bed.model)
    frozen.update(bed.groups())
    assert all(parameter.grad is None for parameter in tower)


def test_arms_have_one_model_one_reference_and_one_optimizer(bed: Bed):
    naive, frozen = TrainerArm(bed, CPU["naive"]), TrainerArm(bed, CPU["frozen"])
    assert naive.model is frozen.model is bed.model
    heads = {arm.trainer.reference.model.lm_head.weight.data_ptr() for arm in (naive, frozen)}  # type: ignore[union-attr]
    assert len(heads) == 1 and bed.model.lm_head.weight.data_ptr() not in heads
    of_policy, of_reference = bed.family.vision_parameters(bed.model), frozen.trainer.reference.model  # type: ignore[union-attr]
    assert [p.data_ptr() for p in bed.family.vision_parameters(of_reference)] == [p.data_ptr() for p in of_policy]


def test_a_step_moves_the_weights_and_reports_every_phase(bed: Bed):
    before = bed.model.lm_head.weight.detach().clone()
    arm = TrainerArm(bed, CPU["all"])
    arm.step()
    assert not torch.equal(bed.model.lm_head.weight, before)
    assert {"rollout", "reward", "reference", "forward", "backward", "update"} <= arm.phases().keys()


def test_half_of_the_groups_have_equal_rewards():
    assert half_flat(4)(["text"] * 12) == [0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0]
