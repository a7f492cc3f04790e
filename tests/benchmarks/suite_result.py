"""A result of the suite with every section, a few arms each, numbers chosen by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONG = "share_prompt alone (an image is encoded once a group with it: share_vision too)"


def arm(label: str, seconds: list[float], base: str = "naive", group: str = "ablation", **more: Any) -> dict[str, Any]:
    check = {"loss": 0.05, "grad_norm": 1.5}
    of = {"label": label, "group": group, "base": base, "settings": {}, "seconds": seconds, "tokens": 1024, "note": ""}
    return of | {"check": check} | more


def phases(*medians: float) -> dict[str, list[float]]:
    names = ("rollout", "reward", "reference", "forward", "backward", "update")
    return {name: [0.9 * each, each, 1.1 * each] for name, each in zip(names, medians, strict=True)}


def step_arms() -> dict[str, Any]:
    sharing = {"share_vision": True, "share_prompt": True}
    return {
        "naive": arm("naive", [4.0, 4.2, 4.4], peak_mib=2000.0, phases=phases(1.5, 0.01, 0.6, 0.8, 1.2, 0.05)),
        "share_prompt": arm(
            LONG, [2.1, 2.0, 2.0], settings=sharing, peak_mib=500.0, phases=phases(1.5, 0.01, 0.1, 0.15, 0.2, 0.02)
        ),
        "pack": arm("pack alone", [4.2, 4.4, 4.1], settings={"pack": True}, peak_mib=2100.0),
        "frozen naive": arm("naive, frozen tower", [3.0, 3.0, 3.3], base="frozen naive", peak_mib=1000.0),
        "frozen": arm("frozen tower, features once", [2.0, 2.0, 2.2], base="frozen naive", peak_mib=250.0),
        "all": arm(
            "all", [1.0, 1.0, 1.1], settings=sharing, peak_mib=400.0, phases=phases(0.5, 0.01, 0.1, 0.13, 0.2, 0.02),
            energy_joules=[50.0, 52.0, 51.0],
        ),
        "trl": arm("TRL 1.16", [6.0, 6.2, 6.6], group="peer", base="all", peak_mib=2600.0, note="same | <loss>"),
    }  # fmt: skip


def op_case(op: str, case: str, *arms: tuple[str, float, float]) -> dict[str, Any]:
    """(name, milliseconds, share of the ceiling); the first is the floor."""
    floor = arms[0][1]
    rows = {
        name: {
            "median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "ceiling_share": share,
            "time/floor": {"value": ms / floor, "low": ms / floor, "high": ms / floor},
            "extra_mib": 5.4, "extra_beyond_accumulator_mib": 3.4, "errors": {"loss": 1e-7}, "note": "",
        }
        for name, ms, share in arms
    }  # fmt: skip
    seconds = {name: [0.9e-3 * ms, 1e-3 * ms, 1.1e-3 * ms] for name, ms, _ in arms}
    work = {"flops": 10**9, "moved_bytes": 10**6, "accumulator_bytes": 0, "ceilings": {}}
    return {
        "op": op,
        "case": case,
        **work,
        "arms": rows,
        "skipped": {"triton": f"{op}: runs on cuda"},
        "seconds": seconds,
    }


def cell(generations: int, prompt: int, naive: list[float], whole: list[float], predicted: float) -> dict[str, Any]:
    by_round = [a / b for a, b in zip(naive, whole, strict=True)]
    value = sorted(naive)[len(naive) // 2] / sorted(whole)[len(whole) // 2]
    return {
        "num_generations": generations, "prompt_tokens": prompt, "image_tokens": prompt - 25, "completion_tokens": 64,
        "seconds": {"naive": naive, "all": whole}, "predicted": predicted,
        "ratio": {"value": value, "low": min(by_round), "high": max(by_round)},
    }  # fmt: skip


def timeline(seconds: float, peak: float) -> list[list[Any]]:
    shares = [
        ("rollout", 0.35),
        ("reward", 0.02),
        ("reference", 0.13),
        ("forward", 0.2),
        ("backward", 0.25),
        ("", 0.05),
    ]
    points, start = [], 0.0
    for place, (phase, share) in enumerate(shares):
        for number in range(10):
            at = start + seconds * share * number / 10
            points.append([at, peak * (0.2 + 0.16 * place * number / 9), phase])
        start += seconds * share
    return points


def memory_arm(label: str, seconds: float, peak: float) -> dict[str, Any]:
    at = {"rollout": 0.3 * peak, "reference": 0.4 * peak, "forward": 0.8 * peak, "backward": peak}
    return {"label": label, "peak_mib": peak, "phases": at, "timeline": timeline(seconds, peak)}


def result() -> dict[str, Any]:
    rollout = {
        "transformers": arm("transformers", [2.0, 2.2, 2.4], base="transformers"),
        "native": arm("native", [0.8, 0.8, 0.9], base="transformers", floor_share=0.25),
    }
    update = {
        "naive": arm("naive", [4.0, 4.4, 4.8], utilization=0.5, peak_mib=1000.0),
        "repeated": arm("packed, nothing shared", [4.0, 4.0, 4.2], utilization=0.55, peak_mib=900.0),
        "all": arm("all", [0.8, 0.8, 1.0], utilization=0.605, peak_mib=250.0),
    }
    grid = [
        cell(2, 128, [1.6, 1.7, 1.8], [1.0, 1.0, 1.2], 1.8),
        cell(8, 128, [4.0, 4.2, 4.4], [1.0, 1.0, 1.1], 4.6),
        cell(2, 512, [2.0, 2.0, 2.1], [1.0, 1.0, 1.0], 1.96),
        cell(8, 512, [7.0, 7.7, 8.0], [1.0, 1.0, 1.0], 7.03),
    ]
    head = op_case("linear_grpo_loss", "512x256x8192-float32-frozen", ("floor", 25, 1), ("native", 24, 1.04))
    attention = ("shared_prefix_attention", "2x9x3x5-4x2x16-float32")
    return {
        "machine": "AMD EPYC, 2 threads",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "commit": "abc1234",
        "command": "python -m benchmarks.suite",
        "date": "2026-11-21T19:00:29+00:00",
        "figures": {
            "suite": 1,
            "device": "cpu", "threads": 2, "quick": False, "shape": "bench", "dtype": "float32",
            "sizes": {
                "prompts": 2, "num_generations": 8, "image_tokens": 256, "prompt_tokens": 281, "completion_tokens": 64,
                "parameters": 12_345_678,
            },
            "rounds": 3, "warmup": 1,
            "ceilings": {"copy_gb_s": 11.0, "matmul_tflop_s": 0.2},
            "sections": {
                "ops": {f"{head['op']} {head['case']}": head},
                "attention": {" ".join(attention): op_case(*attention, ("floor", 1, 0.9), ("cpu", 1.25, 0.72))},
                "rollout": {"arms": rollout},
                "update": {"arms": update, "grid": grid},
                "step": {"arms": step_arms()},
                "memory": {"arms": {"naive": memory_arm("naive", 4.2, 2000.0), "all": memory_arm("all", 1.0, 400.0)}},
            },
            "skipped": {"step/trl+liger": "liger-kernel is not installed", "step/cuda_graphs": "needs a GPU"},
            "section_seconds": {"ops": 12.3, "step": 40.4},
        },
    }  # fmt: skip


def written(folder: Path, of: dict[str, Any], name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(of))
    return path
