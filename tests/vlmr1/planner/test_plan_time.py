"""Predicted time: what is counted without data beside real steps, the arithmetic of the ceilings, and the command."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import interpreter
from tests.helpers.jobs import job
from tests.vlmr1.rollout.test_decoder import counted, model_of
from vlmr1.cli import main
from vlmr1.grpo.loss import Objective
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_of, load_model
from vlmr1.planner.cards import CARDS, GRAPH_US, LAUNCH_US, MEMORY_REACHES, PRODUCTS_REACH
from vlmr1.planner.cuda_ops import Streaming, attended_pairs
from vlmr1.planner.decode_work import fused_step
from vlmr1.planner.job import packs_of, prompts_of
from vlmr1.planner.passes import policy_of, update
from vlmr1.planner.plan import model_without_data
from vlmr1.planner.rollout_work import DECODE, PREFILL
from vlmr1.planner.time import DECODER, HEAD, REFERENCE, TOWER, count_work
from vlmr1.planner.work import Kernel, WorkRun, totals
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1.tiny import CHECKPOINT
from vlmr1_kernels import GRPOSettings, PrefixLayout, use
from vlmr1_kernels.reference.shared_prefix_attention import visible

JOB: dict[str, Any] = {"prompts_per_device": 2, "tokens_per_pack": 4096, "beta": 0.04}
# Only torch's own operators, which its counter knows; the attention of packed rows is none of them.
PLAIN = "linear_grpo_loss=reference,linear_logprob=reference,shared_prefix_attention=cpu,varlen_attention=batched"
OBJECTIVE = Objective(GRPOSettings(beta=0.0), 1.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CHECKPOINT)


def products(model: Any, tokenizer: Any) -> dict[str, float]:
    """FLOPs of matrix products of a real generation of two tokens, reference pass and policy pass."""
    wanted, family = job(**JOB), family_of(model)
    prompts = prompts_of(wanted, family, model)
    policy, [pack] = PackedPolicy(model, family, temperature=1.0), packs_of(wanted, prompts)
    engine = NativeEngine(model, family, tokenizer, ignore_eos=True)

    def backward() -> None:
        loss, _ = policy.loss(pack, OBJECTIVE)
        loss.backward()

    found = {}
    steps = {"rollout": lambda: engine.generate(prompts, 3, SamplingSettings(2), step=0)}
    steps |= {"reference": lambda: policy.logprobs(pack), "policy": backward}
    for name, step in steps.items():
        with use(PLAIN), FlopCounterMode(display=False) as counter:
            step()
        found[name] = sum(
            flops for op, flops in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" not in str(op)
        )
    model.zero_grad(set_to_none=True)
    return found


def test_flops_of_products_are_those_that_torch_counts_in_a_real_step(model: Any, processor: Any):
    work = count_work(job(**JOB))

    def planned(*phases: str) -> float:
        kernels = sum((work.kernels[phase] for phase in phases), Counter())
        return sum(n * kernel.flops for kernel, n in kernels.items() if kernel.kind == "product")

    real = products(model, processor.tokenizer)
    assert planned(PREFILL, DECODE) == pytest.approx(real["rollout"], rel=0.02)
    assert planned(REFERENCE) == pytest.approx(real["reference"], rel=0.02)
    assert planned(TOWER, DECODER, HEAD) == pytest.approx(real["policy"], rel=0.02)


@pytest.mark.parametrize("naive", [False, True])
def test_kernels_without_data_are_those_of_the_same_pass_on_real_tensors(naive: bool, model: Any):
    settings = dict.fromkeys(("share_prompt", "share_vision", "pack"), False) if naive else {}
    wanted = job(device="cpu", **JOB, **settings)
    dry, real = WorkRun(), WorkRun(of_tensors=True)
    without = policy_of(wanted, model_without_data(wanted, dry), dry)
    policy: Any = (NaivePolicy if naive else PackedPolicy)(model, family_of(model), temperature=1.0)
    pack, *_ = packs_of(wanted, prompts_of(wanted, policy.family, model))
    for run, each in ((dry, without), (real, policy)):
        with run:
            update(wanted, each.model, each, pack, run, several=False)
    of_dry, of_real = (totals(sum(run.kernels.values(), Counter())) for run in (dry, real))
    assert of_dry["flops"] == pytest.approx(of_real["flops"], rel=0.01) and of_real["flops"] > 1e9
    assert of_dry["bytes"] == pytest.approx(of_real["bytes"], rel=0.03)
    assert of_dry["kernels"] == pytest.approx(of_real["kernels"], rel=0.05)


@pytest.mark.parametrize("lora", ["merged", "unmerged", ""], ids=["merged", "unmerged", "queries without bias"])
def test_a_planned_decode_layer_has_the_launches_of_the_real_one(lora: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setenv(interpreter.VARIABLE, "1")
    real, planned = [], []
    for layers in (1, 2):
        model = model_of("qwen2_5_vl", layers=layers, lora=lora)
        if not lora:  # no product with the biases of keys and values
            for layer in model.model.language_model.layers:
                layer.self_attn.q_proj.bias = None
        real.append(counted(model, torch.bfloat16).total)
        policy: Any = SimpleNamespace(model=model, family=family_of(model), dtype=torch.bfloat16)
        with WorkRun("step") as run:
            fused_step(policy, 5, Streaming(60, 80))
        planned.append(sum(run.kernels.values(), Counter()).total())
    assert planned[1] - planned[0] == real[1] - real[0]


def test_attention_computes_each_pair_that_the_mask_shows_once():
    for layout in (PrefixLayout((5, 3), ((2, 4), (0, 1, 3))), PrefixLayout((4,), ((),))):
        assert sum(attended_pairs(layout)) == visible(layout).sum()


H200 = CARDS["h200"]
KERNELS = {
    "products": (Kernel("mm", 1e12, 0), False, 1e12 / (PRODUCTS_REACH * 989e12)),
    "float32 products": (Kernel("mm", 1e12, 0, half=False), False, 1e12 / (PRODUCTS_REACH * 67e12)),
    "attention": (Kernel("attention", 1e12, 0), False, 1e12 / 350e12),
    "traffic": (Kernel("mm", 1e9, 1e9), False, 1e9 / (MEMORY_REACHES * 4800e9)),
    "launch": (Kernel("add", 0, 8), False, LAUNCH_US * 1e-6),
    "launch in a graph": (Kernel("add", 0, 8), True, GRAPH_US * 1e-6),
}


@pytest.mark.parametrize(("kernel", "graph", "seconds"), KERNELS.values(), ids=KERNELS.keys())
def test_a_kernel_takes_the_longest_of_arithmetic_traffic_and_launch(kernel: Kernel, graph: bool, seconds: float):
    assert H200.seconds(kernel, graph=graph) == pytest.approx(seconds)


SMALL = ["plan", "--model", "tiny", "--image_tokens", "16", "--text_tokens", "40", "--num_generations", "3"]
SMALL += ["--prompts_per_device", "2", "--max_completion_length", "16", "--gpu", "h200"]


def test_the_command_prints_what_its_json_has(tmp_path: Path, capsys: Any):
    assert main([*SMALL, "--time", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["gpu_bytes"] == int(139.8 * 2**30)
    time = figures["time"]
    assert set(time["milliseconds"]) == {PREFILL, DECODE, REFERENCE, TOWER, DECODER, HEAD, "optimizer"}
    whole = sum(sum(kinds.values()) for kinds in time["milliseconds"].values())
    assert f"decode: 15 steps of {sum(time['milliseconds'][DECODE].values()) / 15:.2f} ms" in said
    assert "arithmetic on counted FLOPs and bytes, not measured" in said and "not predicted: " in said
    assert f"{whole:,.1f}" in said


@pytest.mark.parametrize(("changed", "words"), [(["--gpu", "24GiB"], "h200"), (["--device", "cpu"], "--device cpu")])
def test_time_needs_a_gpu_with_known_ceilings(changed: list[str], words: str, capsys: Any):
    assert main([*SMALL, *changed, "--time"]) == 2
    assert words in capsys.readouterr().err
