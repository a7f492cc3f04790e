"""The arms of the step benchmark: settings of `vlmr1 train`, each a dict on top of its base's.

`naive` shares nothing and computes every op by its reference. A switch alone is compared with it. The ops that the
naive step never calls are compared on top of the sharing that calls them. A frozen tower, and an objective without KL
in which half of the groups have no signal, have naive steps of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmr1_kernels import registry

BETA = 0.04
REFERENCES: Mapping[str, str] = {op: "reference" for op in registry.ops()}
NAIVE: Mapping[str, Any] = dict.fromkeys(("share_vision", "share_prompt", "pack", "cuda_graphs"), False) | {
    **{"rollout_engine": "transformers", "beta": BETA, "skip_zero_advantage": False, "fused_layers": "torch"}
}
SHARING: Mapping[str, Any] = {"share_vision": True, "share_prompt": True, "pack": True, "rollout_engine": "native"}
ATTENTION = ("shared_prefix_attention", "varlen_attention")
# Ops that packed passes and the native engine call.
OF_SHARED = ("linear_logprob", "linear_grpo_loss", *ATTENTION, "shared_prefix_decode", "sample_tokens")
FUSED: Mapping[str, Any] = {"fused_layers": "auto"}  # decode steps from the weights; on a GPU fused layers too


@dataclass(frozen=True)
class Arm:
    """One step of the benchmark. `settings` and `kernels` are those in which it differs from its base."""

    label: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)  # op -> implementation
    flat: bool = False  # every second group has equal rewards
    note: str = ""


def arms_of(device: str, chosen: Mapping[str, str]) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return (arms by name, reasons of those that make no sense here).

    `chosen`: the implementation of each op that `auto` takes on this device."""
    fast = {op: name for op, name in chosen.items() if name != "reference"}
    attention = {op: fast[op] for op in ATTENTION if op in fast}
    shared = {"share_vision": True, "share_prompt": True}
    made = {
        "naive": Arm("naive: nothing shared, reference kernels", "naive"),
        "share_vision": Arm("share_vision alone", "naive", {"share_vision": True}),
        "share_prompt": Arm("share_prompt, which needs share_vision", "naive", shared),
        # The reference attention would build a dense mask over 16 repeated prompts: nobody would choose it.
        "pack": Arm("pack alone, with attention kernels", "naive", {"pack": True}, attention),
        "native": Arm("rollout_engine=native alone", "naive", {"rollout_engine": "native"}),
        "shared": Arm("everything shared, reference kernels", "naive", SHARING),
        "frozen": Arm("naive, frozen tower", "frozen", {"freeze_vision": True}),
        "frozen+share_vision": Arm("frozen tower, features once a step", "frozen", {"share_vision": True}),
        "flat": Arm("naive, beta 0, half of the groups without signal", "flat", {"beta": 0.0}, flat=True),
        "flat+skip_zero_advantage": Arm("skip_zero_advantage alone", "flat", {"skip_zero_advantage": True}, flat=True),
    }
    left_out = {"group_advantages": "called once a step, on few numbers: `make bench-ops` times it"}
    for op in ("grpo_loss", *OF_SHARED):
        base = "naive" if op == "grpo_loss" else "shared"
        name = op if base == "naive" else f"shared+{op}"
        if op in fast:
            made[name] = Arm(f"{op}={fast[op]} alone", base, {}, {op: fast[op]})
        else:
            left_out[name] = "the reference implementation is what `auto` takes here"
    written = {op: name for op, name in fast.items() if op == "rope_kv_write"}
    made["shared+fused_layers"] = Arm("fused_layers=auto: decode steps from the weights", "shared", FUSED, written)
    left_out["rope_kv_write"] = "an op of shared+fused_layers"
    graphs = {"cuda_graphs": True} if device == "cuda" else {}
    if graphs:
        decode = {op: name for op, name in fast.items() if op == "shared_prefix_decode"}
        made["cuda_graphs"] = Arm("cuda_graphs, with native decode", "native", graphs, decode)
    else:
        left_out["cuda_graphs"] = "needs a GPU"
    made["all"] = Arm("all: everything shared, fast kernels", "naive", {**SHARING, **FUSED, **graphs}, fast)
    return made, left_out


def settings_of(arms: Mapping[str, Arm], name: str) -> dict[str, Any]:
    """All settings of an arm, those of its bases included; kernels by name, so that none is left to `auto`."""
    settings, kernels = _resolved(arms, name)
    return {**settings, "kernels": ",".join(f"{op}={impl}" for op, impl in kernels.items())}


def _resolved(arms: Mapping[str, Arm], name: str) -> tuple[dict[str, Any], dict[str, str]]:
    arm = arms[name]
    settings, kernels = (NAIVE, REFERENCES) if arm.base == name else _resolved(arms, arm.base)
    return {**settings, **arm.settings}, {**kernels, **arm.kernels}
