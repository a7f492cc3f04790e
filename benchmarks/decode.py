"""Decoding at the shape of Qwen2.5-VL-3B on a GPU: milliseconds a step, against what reading the weights takes.

    python -m benchmarks.decode --out benchmarks/results/decode-cuda.json

Random weights, bfloat16, 8 prompts of 1,100 tokens (1,024 of an image) x 8 completions of 256 tokens, drawn to their
end. Arms in turn: the native engine with and without CUDA graphs, and `generate` on the repeated prompts. The floor is
the bytes of the decoder's weights over the copy bandwidth measured in the same run. Before timing, the greedy tokens of
the first two arms must be equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import model as bench_model
from benchmarks.device import ceilings, default_device
from benchmarks.harness import CheckFailed, PeakMemory, alternate, ratio, timed, write_result
from benchmarks.model import SHAPES, Shape
from benchmarks.update import DTYPES
from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import adapter_of
from vlmr1.rollout import NativeEngine, RolloutEngine, SamplingSettings, TransformersEngine


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with TemporaryDirectory() as folder:
        try:
            result = measure(options, Path(folder))
        except CheckFailed as error:
            print(f"refused: {error}", file=sys.stderr)
            return 1
    for name, value in result.items():
        print(f"{name:28}{value}")
    if options.out is not None:
        print(f"written: {write_result(options.out, result)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=1100)
    parser.add_argument("--completion_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=["graphs", "launches", "generate"], help="default: all")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = default_device()
    shape = replace(
        SHAPES[options.shape], prompt_length=options.prompt_length, completion_length=options.completion_length
    )
    model, processor = bench_model.build(folder, shape, device=device, dtype=DTYPES[options.dtype])
    model.generation_config.eos_token_id = None
    adapter = adapter_of(model)
    builder = PromptBuilder(model, adapter, processor)
    prompts = [bench_model.prompt_of(folder, builder, shape, index) for index in range(options.prompts)]
    made = engines(model, adapter, processor.tokenizer, device)
    arms = {name: engine for name, engine in made.items() if options.arms is None or name in options.arms}
    check(arms, prompts, shape)

    settings, steps = SamplingSettings(shape.completion_length), []
    decode: dict[str, list[float]] = {name: [] for name in arms}

    def run(name: str) -> None:
        arms[name].generate(prompts, shape.num_generations, settings, step=len(steps))
        decode[name].append(arms[name].stats.decode_seconds)
        steps.append(name)

    seconds = alternate({name: timed(lambda n=name: run(n)) for name in arms}, rounds=options.rounds, warmup=1)
    floor = weight_bytes(model) / (1e9 * ceilings(device, DTYPES[options.dtype]).copy_gb_s)
    result: dict[str, Any] = {
        "shape": options.shape,
        "sequences": options.prompts * shape.num_generations,
        "rollout_seconds": {name: median(times) for name, times in seconds.items()},
        "floor_ms": 1e3 * floor,
    }
    per_step = {
        name: 1e3 * median(times[1:]) / (shape.completion_length - 1) for name, times in decode.items() if any(times)
    }
    result["decode_step_ms"] = per_step
    result["decode_step, x floor"] = {name: ms / (1e3 * floor) for name, ms in per_step.items()}
    for name in arms.keys() & {"graphs", "launches"}:
        if "generate" in arms:
            result[f"rollout generate/{name}"] = ratio(seconds, "generate", name)
    result["peak_mib"] = {name: peak(lambda n=name: run(n)) for name in arms}
    result["kv_peak_mib"] = {name: engine.stats.kv_peak_mib for name, engine in arms.items()}
    return result


def engines(model: Any, adapter: Any, tokenizer: Any, device: str) -> dict[str, RolloutEngine]:
    arms: dict[str, RolloutEngine] = {"launches": NativeEngine(model, adapter, tokenizer, cuda_graphs=False)}
    if device == "cuda":
        arms["graphs"] = NativeEngine(model, adapter, tokenizer, cuda_graphs=True)
    return arms | {"generate": TransformersEngine(model, adapter, tokenizer)}


def check(arms: dict[str, RolloutEngine], prompts: Sequence[Any], shape: Shape) -> None:
    """CheckFailed unless graphs and single launches draw the same greedy tokens, at the first places at least: random
    weights have near ties, which rounding decides."""
    settings = SamplingSettings(min(16, shape.completion_length), greedy=True)
    drawn = {}
    for name in arms.keys() & {"graphs", "launches"}:
        groups = arms[name].generate(prompts[:2], 2, settings)
        drawn[name] = [completion.token_ids[:4].tolist() for group in groups for completion in group.completions]
    if len({str(tokens) for tokens in drawn.values()}) > 1:
        raise CheckFailed(f"greedy tokens differ: {drawn}")


def weight_bytes(model: Any) -> int:
    """Of what one decode step reads: decoder and head."""
    decoder = model.model.language_model
    parameters = {id(p): p for p in [*decoder.parameters(), *model.lm_head.parameters()]}
    return sum(p.numel() * p.element_size() for p in parameters.values())


def peak(function: Any) -> float:
    """MiB above what is held before."""
    before = PeakMemory()
    function()
    return before.mib()


if __name__ == "__main__":
    sys.exit(main())
