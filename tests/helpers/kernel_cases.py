"""Cases of the ops: every implementation on every device, every objective, and error budgets over several draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmr1_kernels
from vlmr1_kernels import GRPOSettings, registry
from vlmr1_kernels.implementations import EXAMPLE_SHAPES
from vlmr1_kernels.testing import HEAD, Inputs, Problem, assert_within_budget, cast, eager_logprob, pooled

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ON_GPU = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
INTERPRETER_LIMIT, FAST_LIMIT = 5_000, 1_000  # logits; Triton's interpreter is slow
TINY_CHUNK = 1e-6  # MiB: one row at a time
HALVES = (torch.bfloat16, torch.float16)
PER_ROW = ("old_logp", "ref_logp", "sampling_logp")


@dataclass(frozen=True)
class Target:
    """One implementation of an op on one device."""

    op: str
    impl: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    def unsupported_reason(self, dtype: torch.dtype) -> str | None:
        request = registry.Request(torch.device(self.device), dtype, EXAMPLE_SHAPES[self.op])
        return registry.implementations(self.op)[self.impl].unsupported_reason(request)

    def run(self, dtype: torch.dtype) -> Callable[..., Any]:
        """The op in this implementation; skips the test where it does not support the dtype."""
        reason = self.unsupported_reason(dtype)
        if reason is not None:
            pytest.skip(f"{self.impl}: {reason}")
        return partial(getattr(vlmr1_kernels, self.op), impl=self.impl)


def targets(op: str, *, only: tuple[str, ...] = (), slow: bool = False) -> list[Any]:
    """Parameters: every implementation of the table on every device. `slow`: not in the interpreter."""
    found = [Target(op, impl, device) for device in DEVICES for impl in only or registry.implementations(op)]
    return [
        pytest.param(
            target,
            id=target.impl if target.device == "cpu" else f"{target.impl}-{target.device}",
            marks=[pytest.mark.gpu] if target.device == "cuda" else [],
        )
        for target in found
        if not (slow and target.interpreted)
    ]


@dataclass(frozen=True)
class Case(Problem):
    """A listed case of the linear ops."""

    chunk_mib: float | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    draws: int = 4


def grid(op: str, cases: Mapping[str, Case]) -> list[Any]:
    """Parameters (target, case, dtype): each case in its dtypes on every implementation."""
    return [
        pytest.param(*target.values, case, dtype, id=f"{name}-{_short(dtype)}-{target.id}", marks=_marks(target, case))
        for name, case in cases.items()
        for dtype in case.dtypes
        for target in targets(op, slow=case.rows * case.vocab > INTERPRETER_LIMIT)
    ]


def _marks(target: Any, case: Case) -> list[Any]:
    interpreted = target.values[0].interpreted
    return [*target.marks, *([pytest.mark.slow] if interpreted and case.rows * case.vocab > FAST_LIMIT else [])]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Results = Callable[[Inputs, Problem], list[Tensor]]


def check_budget(names: tuple[str, ...], ours: Results, eager: Results, target: Target, case: Case, dtype: Any) -> None:
    """`ours` errs against `eager` in float64 at most twice as much as `eager` in `dtype`, over all draws."""
    inputs = (cast(case.draw(seed, dtype), dtype, target.device) for seed in range(case.draws))
    values = pooled(ours(each, case) for each in inputs)
    assert_within_budget(names[: len(values)], values, *_expected(eager, case, dtype, target.device))


@lru_cache(maxsize=1)  # the implementations of a case follow each other
def _expected(eager: Results, case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    drawn = [case.draw(seed, dtype) for seed in range(case.draws)]
    plain = pooled(eager(cast(inputs, dtype, device), case) for inputs in drawn)
    return plain, pooled(eager(cast(inputs, torch.float64), case) for inputs in drawn)


_DR: dict[str, Any] = {"loss_type": "dr_grpo", "max_completion_length": 9}
_CISPO: dict[str, Any] = {"loss_type": "cispo", "epsilon_high": 1.2}

# Every loss type with every estimator of the KL, and with an entropy bonus and without.
OBJECTIVES: dict[str, GRPOSettings] = {
    "grpo": GRPOSettings(),
    "grpo, two-sided clip": GRPOSettings(delta=1.3, epsilon_low=0.1, epsilon_high=0.4),
    "grpo, k1": GRPOSettings(beta=0.3, kl="k1"),
    "grpo, k2, entropy": GRPOSettings(beta=0.3, kl="k2", entropy_coef=0.3),
    "grpo, k3, rollout correction": GRPOSettings(beta=0.3, tis_cap=1.1),
    "grpo, k3, corrected KL": GRPOSettings(beta=0.3, use_bias_correction_kl=True),
    "bnpo, k1, entropy": GRPOSettings(loss_type="bnpo", beta=0.2, kl="k1", entropy_coef=0.3),
    "bnpo, k2": GRPOSettings(loss_type="bnpo", beta=0.2, kl="k2", temperature=0.3),
    "bnpo, k3, sequence level": GRPOSettings(
        loss_type="bnpo", beta=0.2, importance_level="sequence", epsilon_high=0.05
    ),
    "dapo, k1, rollout correction": GRPOSettings(loss_type="dapo", beta=0.2, kl="k1", tis_cap=1.1),
    "dapo, k2, wide clip": GRPOSettings(loss_type="dapo", beta=0.2, kl="k2", epsilon_low=0.1, epsilon_high=0.4),
    "dapo, k3, entropy": GRPOSettings(loss_type="dapo", beta=0.2, entropy_coef=0.3, temperature=1.7),
    "dapo, k1, corrected KL": GRPOSettings(
        loss_type="dapo", beta=0.2, kl="k1", tis_cap=1.1, use_bias_correction_kl=True
    ),
    "dr_grpo, k1": GRPOSettings(**_DR, beta=0.2, kl="k1"),
    "dr_grpo, k2, entropy": GRPOSettings(**_DR, beta=0.2, kl="k2", entropy_coef=0.3),
    "dr_grpo, k3, two-sided clip": GRPOSettings(**_DR, beta=0.2, delta=1.5),
    "cispo, k1, sequence level": GRPOSettings(**_CISPO, beta=0.2, kl="k1", importance_level="sequence"),
    "cispo, k2, entropy": GRPOSettings(**_CISPO, beta=0.2, kl="k2", entropy_coef=0.3),
    "cispo, k3, rollout correction": GRPOSettings(**_CISPO, beta=0.2, tis_cap=0.9),
    "gspo, k1": GRPOSettings(loss_type="gspo", beta=0.2, kl="k1", epsilon_high=0.05),
    "gspo, k2": GRPOSettings(loss_type="gspo", beta=0.2, kl="k2", temperature=0.3),
    "gspo, k2, corrected KL": GRPOSettings(loss_type="gspo", beta=0.2, kl="k2", use_bias_correction_kl=True),
    "gspo, k3, everything": GRPOSettings(
        loss_type="gspo", beta=0.2, tis_cap=1.1, delta=1.2, entropy_coef=0.3, use_bias_correction_kl=True
    ),
}


def padded_objective(
    logp: Tensor,
    lengths: tuple[int, ...],
    advantages: Tensor,
    settings: GRPOSettings,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """The objective as padded batches [B, T] write it, independent of the package."""

    def pad(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)  # [B, T]

    loss_type, low, high = settings.loss_type, settings.epsilon_low, settings.epsilon_high
    mask = pad(torch.ones_like(logp))
    logp = pad(logp)
    old = logp.detach() if old_logp is None else pad(old_logp)
    adv = advantages[:, None]  # [B, 1]
    log_ratio = (logp - old) * mask
    if loss_type == "gspo" or settings.importance_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        loss = -torch.clamp(ratio, max=high).detach() * adv * logp
    else:
        first = (ratio if settings.delta is None else torch.clamp(ratio, max=settings.delta)) * adv
        loss = -torch.min(first, torch.clamp(ratio, 1 - low, 1 + high) * adv)
    if settings.tis_cap is not None:
        assert sampling_logp is not None
        loss = loss * torch.clamp(torch.exp(old - pad(sampling_logp)), max=settings.tis_cap)
    if settings.beta:
        assert ref_logp is not None
        d = pad(ref_logp) - logp
        kl = {"k1": -d, "k2": 0.5 * d * d, "k3": torch.exp(d) - d - 1}[settings.kl]
        loss = loss + settings.beta * kl * (ratio if settings.use_bias_correction_kl else 1)
    if settings.entropy_coef:
        assert entropy is not None
        loss = loss - settings.entropy_coef * pad(entropy)
    loss = loss * mask  # [B, T]
    if loss_type in ("grpo", "gspo"):
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / (normalizer or len(lengths))
    if loss_type == "dr_grpo":
        return loss.sum() / ((normalizer or len(lengths)) * (settings.max_completion_length or 1))
    return loss.sum() / (normalizer or mask.sum())


def head_of(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in (*HEAD, "targets") if name in inputs}


def eager_loss(inputs: Inputs, problem: Problem) -> Tensor:
    """`linear_grpo_loss` in eager torch: all logits, padded sequences."""
    settings = problem.settings
    logp, entropy = eager_logprob(**head_of(inputs), temperature=settings.temperature, softcap=problem.softcap)
    given = {name: inputs.get(name) for name in PER_ROW}
    return padded_objective(logp, problem.lengths, inputs["advantages"], settings, entropy=entropy, **given)
