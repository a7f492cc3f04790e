"""The arms of a step: naive, each switch alone on top of it, and everything.

naive: images, prompts and rows of a group each for itself, completions by `generate`, the reference implementation of
every op. A switch alone is compared with naive. Three kinds have a base of their own: the ops that the naive step never
calls (its passes project the vocabulary and attend as the model does) are compared on top of the sharing that calls
them, a frozen tower and an objective without KL with a naive step that has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.model import Shape
from benchmarks.suite.sizes import PROMPTS
from vlmr1_kernels import registry
from vlmr1_kernels.implementations import Request

REFERENCES: Mapping[str, str] = {op: "reference" for op in registry.ops()}
NAIVE: Mapping[str, Any] = {
    "share_vision": False,
    "share_prompt": False,
    "pack": False,
    "rollout_engine": "transformers",
    "cuda_graphs": False,
}
SHARING: Mapping[str, Any] = dict.fromkeys(("share_vision", "share_prompt", "pack"), True) | {
    "rollout_engine": "native",
    "cuda_graphs": False,
}
# Which ops a step calls: those of the naive one, and those that packed passes and the native engine call besides.
OF_NAIVE = ("grpo_loss", "group_advantages")
OF_SHARED = (
    "linear_logprob",
    "linear_grpo_loss",
    "shared_prefix_attention",
    "varlen_attention",
    "shared_prefix_decode",
)
DENSE = "a packed row's attention is the reference's, dense over the row"


@dataclass(frozen=True)
class Arm:
    """One setting of the trainer. `settings` are those in which it differs from its base, as people write them."""

    name: str
    label: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # of GRPOConfig, but for kernels
    kernels: Mapping[str, str] = field(default_factory=dict)  # op -> implementation
    kl: bool = True  # beta above 0, and a reference model
    flat: bool = False  # every second group has equal rewards
    note: str = ""


def arms(device: str, dtype: torch.dtype, shape: Shape) -> tuple[dict[str, Arm], dict[str, str]]:
    """(arms by name, why others are left out)"""
    naive = Arm("naive", "naive: nothing shared, reference kernels", "naive", {}, NAIVE, REFERENCES)
    made = {"naive": naive}
    skipped: dict[str, str] = {}

    def add(name: str, label: str, base: Arm, note: str = "", **settings: Any) -> None:
        made[name] = _on(base, name, label, settings, note)

    add("share_vision", "share_vision alone", naive, share_vision=True)
    needs = f"share_prompt needs share_vision: a prompt computed once has its image once; {DENSE}"
    add("share_prompt", "share_prompt, with share_vision", naive, needs, share_vision=True, share_prompt=True)
    add("pack", "pack alone", naive, f"prompts are repeated in the rows; {DENSE}", pack=True)
    add("native", "rollout_engine=native alone", naive, rollout_engine="native")
    chosen = {op: registry.explain(op, request).chosen for op, request in requests(device, dtype, shape).items()}
    for op in OF_NAIVE:
        _kernel(naive, op, chosen[op], made, skipped)
    if device == "cuda":
        graphs = {"rollout_engine": "native", "shared_prefix_decode": chosen["shared_prefix_decode"]}
        note = "graphs need the native engine and its decode kernel"
        add("cuda_graphs", "cuda_graphs, with native decode", naive, note, cuda_graphs=True, **graphs)
    else:
        skipped["cuda_graphs"] = "needs a GPU"
    shared = Arm("shared", "everything shared, reference kernels", "shared", {}, SHARING, REFERENCES)
    made["shared"] = shared
    for op in OF_SHARED:
        _kernel(shared, op, chosen[op], made, skipped)
    frozen = Arm("frozen", "naive, frozen tower", "frozen", {}, {**NAIVE, "freeze_vision": True}, REFERENCES)
    made["frozen"] = frozen
    note = "one encoding serves reference and policy; `generate` encodes for itself"
    add("frozen+share_vision", "frozen tower, features once a step", frozen, note, share_vision=True)
    flat = Arm("flat", "naive, beta 0, half of the groups flat", "flat", {}, NAIVE, REFERENCES, kl=False, flat=True)
    made["flat"] = flat
    add("flat+skip_zero_advantage", "skip_zero_advantage alone", flat, skip_zero_advantage=True)
    kernels = {op: name for op, name in chosen.items() if name != "reference"}
    sharing = {name: value for name, value in SHARING.items() if name != "cuda_graphs"}
    everything = {**sharing, **kernels, **({"cuda_graphs": True} if device == "cuda" else {})}
    add("all", "all: everything shared, fast kernels", naive, **everything)
    return made, skipped


def _on(base: Arm, name: str, label: str, settings: Mapping[str, Any], note: str = "") -> Arm:
    """`base` with these settings, which may name ops."""
    kernels = {op: value for op, value in settings.items() if op in REFERENCES}
    config = {setting: value for setting, value in settings.items() if setting not in kernels}
    said = config | ({"kernels": ",".join(f"{op}={impl}" for op, impl in kernels.items())} if kernels else {})
    changed = {**base.config, **config}, {**base.kernels, **kernels}
    return Arm(name, label, base.name, said, *changed, kl=base.kl, flat=base.flat, note=note)


def _kernel(base: Arm, op: str, chosen: str, made: dict[str, Arm], skipped: dict[str, str]) -> None:
    """The arm of one op's kernel alone, or why there is none."""
    name = op if base.name == "naive" else f"{base.name}+{op}"
    if op == "group_advantages":
        skipped[name] = "called once a step, on as many numbers as there are completions: see the ops section"
    elif chosen == "reference":
        skipped[name] = "the reference implementation is what `auto` takes here"
    else:
        made[name] = _on(base, name, f"{op}={chosen} alone", {op: chosen})


def requests(device: str, dtype: torch.dtype, shape: Shape) -> dict[str, Request]:
    """What `auto` is asked in a step of this shape, by op. Rewards are on the host; log-probs are in float32."""
    on, host = torch.device(device), torch.device("cpu")
    text, vision = shape.text, shape.vision
    sequences = PROMPTS * shape.num_generations
    rows = sequences * shape.completion_length
    image = PROMPTS * (shape.image_px // 28) ** 2  # tokens; patches are four times as many
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    head_dim, tower_dim = text["hidden_size"] // heads, vision["hidden_size"] // vision["num_heads"]
    head = Request(on, dtype, (rows, text["hidden_size"], text["vocab_size"]))
    return {
        "linear_logprob": head,
        "group_advantages": Request(host, torch.float32, (sequences, shape.num_generations)),
        "grpo_loss": Request(on, torch.float32, (rows, sequences)),
        "linear_grpo_loss": head,
        "shared_prefix_attention": Request(on, dtype, (heads, kv_heads, image + rows, head_dim)),
        "varlen_attention": Request(on, dtype, (vision["num_heads"], vision["num_heads"], 4 * image, tower_dim)),
        "shared_prefix_decode": Request(on, dtype, (sequences, PROMPTS, heads, kv_heads, head_dim)),
    }


def kernels_of(arm: Arm) -> str:
    """For the setting `kernels`: by name, so that what runs is what the arm says."""
    return ",".join(f"{op}={impl}" for op, impl in arm.kernels.items())
