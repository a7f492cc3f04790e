"""What a call costs besides time: GEMMs, memory, waiting for the device. Native's own GEMMs are not seen here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.helpers.kernel_cases import OBJECTIVES, PER_ROW, Case, Target, no_waiting, targets
from vlmr1_kernels import GRPOSettings
from vlmr1_kernels.testing import HEAD, Inputs, cast

IMPLEMENTATIONS = ("reference", "triton")
# Two rows a chunk, twelve chunks; an [N, V] tensor would be the largest by far.
CASE = Case((15, 9), 4, 512, bias=True, chunk_mib=2 * 512 * 4 / 2**20)
GEMM = CASE.rows * CASE.dim * CASE.vocab
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


@dataclass(frozen=True)
class Profile:
    """The aten ops of a call, inside of custom ops too: name and shapes of the tensors."""

    events: list[tuple[str, list[list[int]]]]

    @classmethod
    def of(cls, function: Callable[[], Any]) -> "Profile":
        function()  # the first call may compile
        activities = [torch.profiler.ProfilerActivity.CPU]
        options = {"record_shapes": True, "acc_events": True}
        with torch.profiler.profile(activities=activities, **options) as profile, no_waiting():
            function()
        return cls(
            [(event.name, [list(shape) for shape in event.input_shapes or []]) for event in profile.events() or []]
        )

    @property
    def gemm_flops(self) -> int:
        """Multiplications in all GEMMs."""
        first = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1}
        pairs = [shapes[first[name] : first[name] + 2] for name, shapes in self.events if name in first]
        return sum(torch.Size(left).numel() * right[-1] for left, right in pairs)

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor that any op was given."""
        return max(torch.Size(shape).numel() for _, shapes in self.events for shape in shapes)

    @property
    def syncs(self) -> list[str]:
        return [name for name, _ in self.events if name in SYNCS]


def inputs_of(case: Case, target: Target, trained: tuple[str, ...] = HEAD) -> Inputs:
    inputs = cast(case.draw(0, torch.float32), torch.float32, target.device)
    for name in set(HEAD) & inputs.keys() - set(trained):
        inputs[name].requires_grad_(False)
    return inputs


@pytest.mark.parametrize("target", targets("linear_logprob", only=IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("trained", "gemms"),
    [(HEAD, 4), (("hidden",), 3), (("weight",), 3), (("bias",), 2), ((), 1)],
    ids=["trained", "frozen head", "head only", "bias only", "evaluation"],
)
def test_linear_logprob(target: Target, trained: tuple[str, ...], gemms: int) -> None:
    run, inputs = target.run(torch.float32), inputs_of(CASE, target, trained)
    head = {name: inputs[name] for name in (*HEAD, "targets")}

    def step() -> None:
        logp, entropy = run(**head, entropy=True, chunk_mib=CASE.chunk_mib)
        if trained:
            (logp + entropy).sum().backward()

    profile = Profile.of(step)
    assert (profile.gemm_flops, profile.syncs) == (gemms * GEMM, [])
    assert profile.largest < CASE.rows * CASE.vocab


def at_sequence_level(**settings: Any) -> GRPOSettings:
    return GRPOSettings(importance_level="sequence", **settings)


LOSSES: dict[str, tuple[tuple[str, ...], GRPOSettings, int, int]] = {
    # what is trained, settings, GEMMs of the reference and of Triton
    "trained": (HEAD, OBJECTIVES["grpo"], 3, 3),
    "frozen head": (("hidden",), OBJECTIVES["grpo, k2, entropy"], 2, 2),
    "head only": (("weight",), OBJECTIVES["grpo, k3, rollout correction"], 2, 2),
    "evaluation": ((), OBJECTIVES["grpo"], 1, 1),
    "sequence level": (HEAD, OBJECTIVES["gspo, k3, everything"], 4, 4),
    "sequence level, frozen head": (("hidden",), at_sequence_level(beta=0.2, tis_cap=1.1, delta=1.5), 3, 2),
    "sequence level, frozen head, entropy": (("hidden",), at_sequence_level(entropy_coef=0.1), 3, 3),
    "sequence level, frozen head, cispo": (("hidden",), OBJECTIVES["cispo, k1, sequence level"], 3, 2),
    "sequence level, only the head": (("weight", "bias"), at_sequence_level(beta=0.1), 3, 3),
}


@pytest.mark.parametrize("target", targets("linear_grpo_loss", only=IMPLEMENTATIONS))
@pytest.mark.parametrize(("trained", "settings", "reference", "triton"), LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.slow
def test_linear_grpo_loss(target: Target, trained: Any, settings: GRPOSettings, reference: int, triton: int) -> None:
    run, inputs = target.run(torch.float32), inputs_of(CASE, target, trained)
    inputs["rewards"] = inputs.pop("advantages")
    options = {"settings": settings, "normalizer": 7.0, "chunk_mib": CASE.chunk_mib}

    def step() -> None:
        loss, _ = run(**inputs, num_generations=2, **options)
        if trained:
            loss.backward()

    profile = Profile.of(step)
    gemms = {"reference": reference, "triton": triton}[target.impl]
    assert (profile.gemm_flops, profile.syncs) == (gemms * GEMM, [])
    assert profile.largest < CASE.rows * CASE.vocab


@pytest.mark.parametrize("target", targets("linear_grpo_loss", only=IMPLEMENTATIONS))
def test_one_gemm_without_gradient_none_for_dropped_rows_and_no_second_projection_of_one_chunk(target: Target) -> None:
    run, inputs = target.run(torch.float32), inputs_of(CASE, target)
    inputs["advantages"][0] = 0
    active = torch.arange(15, 24, device=target.device)
    with torch.no_grad():
        assert Profile.of(lambda: run(**inputs)).gemm_flops == GEMM
    profile = Profile.of(lambda: run(**inputs, active_rows=active)[0].backward())
    assert (profile.gemm_flops, profile.syncs) == (3 * GEMM * 9 // 24, [])
    if target.impl == "triton":
        profile = Profile.of(lambda: run(**inputs, settings=at_sequence_level())[0].backward())
        assert (profile.gemm_flops, profile.syncs) == (3 * GEMM, [])


@pytest.mark.parametrize("target", targets("grpo_loss", only=IMPLEMENTATIONS))
@pytest.mark.parametrize("name", ["grpo, k3, rollout correction", "gspo, k3, everything"])
def test_grpo_loss(target: Target, name: str) -> None:
    run, inputs = target.run(torch.float32), inputs_of(CASE, target)
    per_row = {key: inputs[key] for key in ("seq_ids", *PER_ROW)}
    logp = inputs["hidden"].detach()[:, 0].requires_grad_()
    options = {"settings": replace(OBJECTIVES[name], entropy_coef=0.0), "normalizer": 7.0}

    def step() -> None:
        run(logp, **per_row, rewards=inputs["advantages"], num_generations=2, **options)[0].backward()

    assert Profile.of(step).syncs == []


@pytest.mark.parametrize("target", targets("group_advantages", only=IMPLEMENTATIONS))
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(target: Target, scale: str) -> None:
    if target.interpreted and scale == "batch":
        pytest.skip("torch.std reads its mean back, on the CPU only")
    run, rewards = target.run(torch.float32), torch.linspace(0, 1, 12, device=target.device)
    assert Profile.of(lambda: run(rewards, 4, scale=scale)).syncs == []
