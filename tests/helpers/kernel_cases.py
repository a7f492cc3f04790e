"""Cases of the ops: every implementation on every device, every objective, and error budgets over several draws."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmr1_kernels
from vlmr1_kernels import GRPOSettings, registry
from vlmr1_kernels.implementations import EXAMPLE_SHAPES
from vlmr1_kernels.testing import HEAD, Inputs, Problem, assert_within_budget, cast, eager_logprob, gradients, pooled

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DEVICE = DEVICES[-1]
on_device = [pytest.mark.gpu] if DEVICE == "cuda" else []  # of a module whose tests use DEVICE

INTERPRETER_LIMIT = 5_000  # logits; Triton's interpreter is slow
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
        pytest.param(target, id=target.impl + suffix, marks=[pytest.mark.gpu] if suffix else [])
        for target in found
        for suffix in ["" if target.device == "cpu" else f"-{target.device}"]
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
    found = []
    for name, case in cases.items():
        size = case.rows * case.vocab
        for dtype, target in product(case.dtypes, targets(op, slow=size > INTERPRETER_LIMIT)):
            title = f"{name}-{str(dtype).removeprefix('torch.')}-{target.id}"
            found.append(pytest.param(*target.values, case, dtype, id=title, marks=target.marks))
    return found


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
    logp, lengths, advantages, settings, *, old_logp=None, ref_logp=None, sampling_logp=None, entropy=None
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
        loss = loss * torch.clamp(torch.exp(old - pad(sampling_logp)), max=settings.tis_cap)
    if settings.beta:
        d = pad(ref_logp) - logp
        kl = {"k1": -d, "k2": 0.5 * d * d, "k3": torch.exp(d) - d - 1}[settings.kl]
        loss = loss + settings.beta * kl * (ratio if settings.use_bias_correction_kl else 1)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * pad(entropy)
    loss = loss * mask  # [B, T]
    if loss_type in ("grpo", "gspo"):
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(lengths)
    if loss_type == "dr_grpo":
        return loss.sum() / (len(lengths) * (settings.max_completion_length or 1))
    return loss.sum() / mask.sum()


def head_of(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in (*HEAD, "targets") if name in inputs}


def eager_loss(inputs: Inputs, problem: Problem) -> Tensor:
    """`linear_grpo_loss` in eager torch: all logits, padded sequences."""
    settings = problem.settings
    logp, entropy = eager_logprob(**head_of(inputs), temperature=settings.temperature, softcap=problem.softcap)
    given = {name: inputs.get(name) for name in PER_ROW}
    return padded_objective(logp, problem.lengths, inputs["advantages"], settings, entropy=entropy, **given)


def on_gpu(test: Callable[..., None]) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")(test))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@contextmanager
def no_waiting() -> Iterator[None]:
    """A wait for a GPU raises an error."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def options_of(case: Case) -> dict[str, Any]:
    return {"settings": case.settings, "softcap": case.softcap, "chunk_mib": case.chunk_mib}


def loss_and_gradients(run: Callable[..., Any], inputs: Inputs, case: Case) -> list[Tensor]:
    """Results of `linear_grpo_loss`; gradients are in the dtype of the inputs."""
    dtype = inputs["hidden"].dtype
    loss, metrics = run(**inputs, **options_of(case))
    values = gradients(loss, inputs)
    assert {loss.dtype, metrics["logp"].dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert {value.dtype for value in values} == {dtype}
    return [loss.detach(), *values]


def eager_loss_and_gradients(inputs: Inputs, case: Case) -> list[Tensor]:
    loss = eager_loss(inputs, case)
    return [loss.detach(), *gradients(loss, inputs)]
