"""The op benchmarks at tiny shapes: arms agree with the oracle, the floor does the GEMMs it claims, files are whole."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_group_advantages,
    bench_grpo_loss,
    bench_linear_grpo_loss,
    bench_linear_logprob,
    bench_shared_prefix_attention,
    bench_shared_prefix_decode,
    bench_varlen_attention,
    compare,
    device,
    op,
    summary,
)
from benchmarks.harness import timed
from benchmarks.head import Case, Inputs
from vlmr1_kernels import registry

BENCHES = {
    each.op: each
    for each in (
        bench_group_advantages.BENCH,
        bench_grpo_loss.BENCH,
        bench_linear_grpo_loss.BENCH,
        bench_linear_logprob.BENCH,
        bench_shared_prefix_attention.BENCH,
        bench_shared_prefix_decode.BENCH,
        bench_varlen_attention.BENCH,
    )
}
TINY = {
    "group_advantages": ["24x8"],
    "grpo_loss": ["24x8"],
    "linear_grpo_loss": ["24x20x97-float32-trainable", "1088x16x33-bfloat16-frozen"],
    "linear_logprob": ["24x20x97-float32-no_grad", "24x20x97-bfloat16-trainable"],
    "shared_prefix_attention": ["2x9x3x5-4x2x16-float32"],
    "shared_prefix_decode": ["1x2x9x5-4x2x16-float32", "2x3x8x20-4x2x32-bfloat16"],
    "varlen_attention": ["3x8+2x5-4x2x16-float32"],
}
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}
ABSENT = {arm for arm, package in PACKAGES.items() if find_spec(package) is None}
MAY_REFUSE = {"native", "triton", "flash", "flex", "cce", "liger-logits"} | ABSENT
CASES = [pytest.param(BENCHES[name], case, id=f"{name} {case}") for name, cases in TINY.items() for case in cases]


@pytest.mark.parametrize(("bench", "case"), CASES)
def test_arms_agree(bench: op.Bench, case: str):
    problem = bench.problem(case, "cpu")
    names = [name for name in problem.arms() if name != "compile"]
    assert {"floor", "eager", *registry.implementations(bench.op)} <= set(names)
    arms, errors, skipped = compare.checked(problem, names, problem.oracle())
    assert skipped.keys() <= MAY_REFUSE
    assert {"floor", "reference", "eager"} <= arms.keys()
    assert 0 < max(errors["eager"].values()) < 0.05


@pytest.mark.slow
def test_the_compiled_arm_agrees():
    problem = bench_linear_grpo_loss.BENCH.problem("24x20x97-float32-trainable", "cpu")
    _, errors, skipped = compare.checked(problem, ["compile"], problem.oracle())
    assert not skipped
    assert max(errors["compile"].values()) < 1e-4


FLOORS = {"trainable": 3, "frozen": 2, "no_grad": 1}


@pytest.mark.parametrize(("mode", "gemms"), FLOORS.items(), ids=FLOORS.keys())
def test_the_floor_does_the_flops_that_are_counted(mode: str, gemms: int):
    case = Case.parse(f"40x16x50-float32-{mode}", "cpu")
    inputs = Inputs(case)
    with FlopCounterMode(display=False) as counter:
        results = inputs.floor()
    assert counter.get_total_flops() == case.flops == gemms * 2 * 40 * 16 * 50
    assert len(results) == gemms
    assert all(each.abs().min() > 0 for each in results.values())


def test_bytes_and_accumulator_of_a_case():
    trainable, frozen = (Case.parse(f"16x4x10-bfloat16-{mode}", "cpu") for mode in ("trainable", "frozen"))
    assert trainable.moved == 2 * (64 + 40) * 2
    assert frozen.moved == (64 + 40 + 64) * 2
    assert (trainable.accumulator, frozen.accumulator) == (160, 0)
    assert Case.parse("16x4x10-float32-trainable", "cpu").accumulator == 0


BAD_CASES = ("16x4-float32-frozen", "16x4x10-float64-frozen", "16x4x10-float32-half", "12x4x10-float32-frozen")


@pytest.mark.parametrize("text", BAD_CASES)
def test_a_bad_case_is_named(text: str):
    with pytest.raises(ValueError, match=f"case is '{text}'"):
        Case.parse(text, "cpu")


def test_no_ratio_is_near_a_clip_boundary_and_some_are_clipped():
    inputs = Inputs(Case.parse("512x16x100-float32-frozen", "cpu"))
    logp = (inputs.hidden.detach() @ inputs.weight.T).log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    log_ratio = logp - inputs.old_logp
    for bound in (0.8, 1.2):
        assert (log_ratio - torch.tensor(bound).log()).abs().min() > 0.05
    assert 0.05 < ((log_ratio > 0.2) | (log_ratio < -0.25)).float().mean() < 0.5


@pytest.fixture
def fast(monkeypatch: Any) -> None:
    monkeypatch.setattr(op, "ceilings", lambda *_: device.Ceilings(10.0, 0.1))


def test_a_run_prints_its_table_and_writes_its_file(fast: None, capsys: Any, tmp_path: Path):
    out, case = tmp_path / "linear_grpo_loss-cpu.json", "24x20x97-float32-trainable"
    words = ["--cases", case, "--arms", "floor", "reference", "eager", "triton", "--rounds", "2", "--threads", "1"]
    assert bench_linear_grpo_loss.main([*words, "--device", "cpu", "--no-memory", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"### linear_grpo_loss {case}" in printed and "| reference |" in printed
    result = json.loads(out.read_text())
    assert result.keys() == {"machine", "versions", "commit", "command", "date", "figures"}
    assert result["machine"].endswith("1 threads")
    figures = result["figures"]["cases"][case]
    assert figures["flops"] == 3 * 2 * 24 * 20 * 97
    assert figures["ceilings"] == {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
    assert {"floor", "reference", "eager"} <= figures["arms"].keys()
    assert figures["arms"]["reference"]["time/floor"]["value"] > 0
    assert all(len(each) == 2 for each in figures["seconds"].values())
    assert summary.main([str(tmp_path)]) == 0
    assert f"| linear_grpo_loss | {case} | reference" in capsys.readouterr().out


def test_a_run_on_a_gpu_measures_memory_in_this_process(fast: None, monkeypatch: Any, capsys: Any, tmp_path: Path):
    def problem(text: str, where: str) -> bench_linear_grpo_loss.Problem:
        made = bench_linear_grpo_loss.Problem(Case.parse(text, "cpu"))
        made.device = where  # its tensors stay here
        return made

    monkeypatch.setattr(compare, "clock", lambda function, where: timed(function) if where == "cuda" else None)
    monkeypatch.setattr(compare, "free_bytes", lambda where: 2**40)
    monkeypatch.setattr(compare, "extra_mib_apart", lambda *_: pytest.fail("a process of its own"))
    monkeypatch.setattr(compare, "extra_mib", lambda arm: 20.0)
    monkeypatch.setattr(op, "slug", lambda where: f"stand-in-{where}")
    case = "64x32x65536-bfloat16-trainable"
    words = ["--cases", case, "--arms", "floor", "eager", "--rounds", "2", "--device", "cuda", "--out", str(tmp_path)]
    assert op.main(dataclasses.replace(bench_linear_grpo_loss.BENCH, problem=problem), words) == 0
    assert "extra MiB: beyond one float32 [V, D] accumulator" in capsys.readouterr().out
    file = tmp_path / "linear_grpo_loss-stand-in-cuda.json"
    row = json.loads(file.read_text())["figures"]["cases"][case]["arms"]["eager"]
    assert (row["extra_mib"], row["extra_beyond_accumulator_mib"]) == (20.0, 12.0)


def test_a_wrong_implementation_is_refused_before_anything_is_timed(fast: None, monkeypatch: Any, capsys: Any):
    right = bench_linear_grpo_loss.linear_grpo_loss
    wrong = lambda *given, **options: (2 * right(*given, **options)[0], {})  # noqa: E731
    monkeypatch.setattr(bench_linear_grpo_loss, "linear_grpo_loss", wrong)
    monkeypatch.setattr(compare, "alternate", lambda *_, **__: pytest.fail("it was timed"))
    words = ["--cases", "24x20x97-float32-frozen", "--arms", "floor", "reference", "--device", "cpu"]
    assert bench_linear_grpo_loss.main(words) == 1
    assert "refused: reference: loss errs by 1.0e+00" in capsys.readouterr().err


def test_memory_of_an_arm_in_a_process_of_its_own():
    # Eager code holds the logits, 16 MiB, and one of the eight sequences' log-probs more.
    case = ["--cases", "64x32x65536-float32-no_grad", "--device", "cpu", "--threads", "1"]
    extra = compare.extra_mib_apart(["benchmarks.bench_linear_logprob", "--memory", "eager", *case])
    assert 17 < extra < 24
