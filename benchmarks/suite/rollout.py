"""The section `rollout`: `generate` on repeated prompts, the native engine, and the native engine with CUDA graphs.

The floor of a decode step is the bytes of decoder and head over the bandwidth of a large copy in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.harness import CheckFailed
from benchmarks.suite.bed import Bed
from benchmarks.suite.context import Context
from benchmarks.suite.samples import Sample, in_turn, peak_mib, row, sample
from benchmarks.suite.step import fits
from vlmr1.rollout import NativeEngine, RolloutEngine, SamplingSettings, TransformersEngine

LABELS = {
    "transformers": "`generate` on repeated prompts, with log-probs",
    "native": "native engine: a prompt's KV once",
    "native+graphs": "native engine, decode steps as CUDA graphs",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "transformers": {},
    "native": {"rollout_engine": "native", "cuda_graphs": False},
    "native+graphs": {"rollout_engine": "native", "cuda_graphs": True},
}
GREEDY = 4  # first tokens that must be equal: random weights have near ties later, which rounding decides


def rollout(context: Context) -> dict[str, Any]:
    """Engines in turn, on the same prompts."""
    bed, options = context.bed(), context.options
    made = engines(bed)
    if options.device == "cpu":
        context.skip("rollout", {"native+graphs": "needs a GPU"})
    arms = {name: Rollout(bed, engine) for name, engine in made.items()}
    for name in list(arms):
        if (reason := fits(arms[name].run)) is not None:
            context.skip("rollout", {name: reason})
            del arms[name]
    if "transformers" not in arms:
        context.skip("rollout", {name: "its base transformers was left out" for name in arms})
        return {"arms": {}}
    check(bed, {name: made[name] for name in arms})
    calls = {name: lambda arm=arm: sample(arm.run, context.joules, arm.phases) for name, arm in arms.items()}
    floor = weight_bytes(bed.model) / (1e9 * context.ceilings.copy_gb_s)

    def of_rounds(name: str, of: Sequence[Sample]) -> dict[str, Any]:
        more: dict[str, Any] = {"label": LABELS[name], "base": "transformers", "settings": SETTINGS[name]}
        return row(of, **more, tokens=bed.tokens, floor_share=arms[name].floor_share(floor, of))

    kept = context.progress.rounds(of_rounds)
    samples = in_turn(context.told("rollout", calls), rounds=options.rounds, kept=kept)
    for name, arm in arms.items():
        peak = peak_mib(samples[name], arm.run)
        context.progress.arms[name] = of_rounds(name, samples[name]) | {"peak_mib": peak}
    return context.progress.section


class Rollout:
    """One engine on the bed's prompts; every call draws anew."""

    def __init__(self, bed: Bed, engine: RolloutEngine):
        self.bed, self.engine, self.calls = bed, engine, 0

    def run(self) -> None:
        shape = self.bed.shape
        settings = SamplingSettings(shape.completion_length)
        groups = self.engine.generate(self.bed.prompts, shape.num_generations, settings, step=self.calls)
        self.calls += 1
        lengths = {len(completion.token_ids) for group in groups for completion in group.completions}
        if lengths != {shape.completion_length}:
            raise CheckFailed(f"completions of {sorted(lengths)} tokens were drawn")

    def phases(self) -> Mapping[str, float]:
        """Of the last call."""
        return {"decode": self.engine.stats.decode_seconds}

    def floor_share(self, floor: float, samples: Sequence[Sample]) -> float | None:
        """Least over measured seconds of a decode step; None for an engine that does not say what decoding took."""
        seconds = median(each.phases["decode"] for each in samples) / (self.bed.shape.completion_length - 1)
        return floor / seconds if seconds else None


def engines(bed: Bed) -> dict[str, RolloutEngine]:
    dtype = bed.dtype if bed.dtype == torch.bfloat16 else None  # of autocast, as in training
    given = (bed.model, bed.family, bed.processor.tokenizer)
    made: dict[str, RolloutEngine] = {"transformers": TransformersEngine(*given, dtype=dtype)}
    made["native"] = NativeEngine(*given, dtype=dtype, cuda_graphs=False)
    if bed.device == "cuda":
        made["native+graphs"] = NativeEngine(*given, dtype=dtype, cuda_graphs=True)
    return made


def check(bed: Bed, made: Mapping[str, RolloutEngine]) -> None:
    """CheckFailed unless the first greedy tokens are those of `generate`; in bfloat16, where the two round differently,
    unless those with graphs are those without."""
    settings = SamplingSettings(GREEDY, greedy=True)
    drawn = {}
    for name, engine in made.items():
        if bed.dtype != torch.bfloat16 or name != "transformers":
            groups = engine.generate(bed.prompts, 2, settings)
            drawn[name] = [completion.token_ids.tolist() for group in groups for completion in group.completions]
    if len({str(tokens) for tokens in drawn.values()}) > 1:
        raise CheckFailed(f"greedy tokens differ: {drawn}")


def weight_bytes(model: Any) -> int:
    """Of what one decode step reads: decoder and head; of embeddings that are not the head's, only some rows."""
    decoder = model.model.language_model
    embeddings = {id(p) for p in decoder.embed_tokens.parameters()}
    parameters = {id(p): p for p in decoder.parameters() if id(p) not in embeddings}
    parameters |= {id(p): p for p in model.lm_head.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
