"""The native implementation against the reference in float64, over shapes, layouts and settings nobody listed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.kernel_cases import PER_ROW, Target, padded_objective, threads
from vlmr1_kernels import GRPOSettings, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob
from vlmr1_kernels.settings import IMPORTANCE_LEVELS, KL_ESTIMATORS, LOSS_TYPES
from vlmr1_kernels.testing import HEAD, Inputs, Problem, gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Target("linear_grpo_loss", "native", "cpu").unsupported_reason(torch.float32) is not None,
        reason="native is not available",
    ),
]
quick = settings(deadline=None, derandomize=True, max_examples=500)

# Of a probability: a fast exp ends before the denormal numbers, kept logits of half precision at about -32.
LEAST = {torch.float32: 1e-30, torch.bfloat16: 2e-14, torch.float16: 2e-14}
FLOAT32 = torch.finfo(torch.float32).eps
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def objectives(draw: st.DrawFn) -> GRPOSettings:
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    cispo = loss_type == "cispo"
    return GRPOSettings(
        loss_type=loss_type,
        epsilon_low=draw(st.sampled_from([0.0, 0.1, 0.2])),
        epsilon_high=draw(st.sampled_from([1.0, 1.3, 5.0] if cispo else [0.0, 0.2, 0.4])),
        delta=None if cispo else draw(st.sampled_from([None, 1.1, 1.5])),
        beta=draw(st.sampled_from([0.0, 0.3])),
        kl=draw(st.sampled_from(KL_ESTIMATORS)),
        use_bias_correction_kl=draw(st.booleans()),
        importance_level=draw(st.sampled_from(IMPORTANCE_LEVELS)),
        tis_cap=draw(st.sampled_from([None, 0.9, 1.5])),
        entropy_coef=draw(st.sampled_from([0.0, 0.2, -0.1])),
        temperature=draw(st.sampled_from([0.3, 1.0, 1.7])),
        max_completion_length=9 if loss_type == "dr_grpo" else None,
    )


@dataclass(frozen=True)
class Call:
    problem: Problem
    dtype: torch.dtype
    chunk_mib: float | None
    seed: int
    layout: frozenset[str]
    threads: int

    @cached_property
    def inputs(self) -> Inputs:
        """float64."""
        inputs = self.problem.draw(self.seed, self.dtype)
        if "int32" in self.layout:
            inputs |= {name: inputs[name].int() for name in ("targets", "seq_ids")}
        if "transposed" in self.layout:
            inputs |= {name: inputs[name].T.contiguous().T for name in ("hidden", "weight")}
        if "every second row" in self.layout:
            inputs = {name: value.repeat_interleave(2, dim=0)[::2] for name, value in inputs.items()}
        return inputs

    def leaves(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves in `dtype`, with the strides that they have."""
        leaves = {name: self.inputs[name].to(dtype).requires_grad_() for name in HEAD if name in self.inputs}
        return self.inputs | leaves


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Sizes around the tiles of a GEMM, chunks that do not divide the rows, empty sequences, any layout."""
    edge = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 63, 65])
    lengths = st.lists(st.sampled_from([0, 1, 2, 5, 16, 33]), min_size=1, max_size=4).filter(any)
    problem = Problem(
        lengths=tuple(draw(lengths)),
        dim=draw(edge),
        vocab=draw(edge | st.sampled_from([129, 257, 1001])),
        settings=draw(objectives()),
        spread=draw(st.sampled_from([0.5, 5.0])),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 4.0])),
    )
    rows = draw(st.sampled_from([None, 1, 3, 10_000]))
    chunk_mib = None if rows is None else rows * problem.vocab * 4 / 2**20
    layout = draw(st.frozensets(st.sampled_from(["int32", "transposed", "every second row"])))
    return Call(problem, draw(DTYPES), chunk_mib, draw(st.integers(0, 99)), layout, draw(st.sampled_from([1, 3])))


class Roundings:
    """What roundings may change, element by element: the sums of a result without their cancellation."""

    def __init__(self, call: Call) -> None:
        self.temperature, self.inputs = call.problem.settings.temperature, call.inputs
        hidden, weight = call.inputs["hidden"], call.inputs["weight"]
        bias = call.inputs.get("bias", weight.new_zeros(len(weight)))
        logits, softcap = hidden @ weight.T + bias, call.problem.softcap
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        self.log_p = torch.log_softmax(logits / self.temperature, 1)  # [N, V]
        self.entropy = -(self.log_p.exp() * self.log_p).sum(1)  # [N]
        largest = (hidden.abs() @ weight.abs().T + bias.abs()).amax(1)  # [N]
        self.logp = 8 * FLOAT32 * (1 + largest / self.temperature)  # of a log-prob; of a probability, relative

    def gradients(self, d_logp: Tensor, d_entropy: Tensor, dtype, unsure: Tensor | float = 0) -> list[Tensor]:
        """For hidden, weight and bias, from the gradients of log-probs, known up to `unsure`, and entropies."""
        p, targets = self.log_p.exp(), self.inputs["targets"].long()[:, None]
        one_and_p = p.scatter_add(1, targets, p.new_ones(targets.shape))
        by_logp, by_entropy = d_logp.abs()[:, None], d_entropy.abs()[:, None]
        by_entropy = by_entropy * (1 + self.log_p.abs() + self.entropy[:, None])
        error = (by_logp * one_and_p + by_entropy * p) * (2 * torch.finfo(dtype).eps + self.logp[:, None])  # [N, V]
        error += (by_logp + by_entropy) * LEAST[dtype] + torch.as_tensor(unsure)[..., None] * one_and_p
        error /= self.temperature
        hidden, weight = self.inputs["hidden"].abs(), self.inputs["weight"].abs()
        least = torch.finfo(dtype).tiny
        return [sums + least for sums in (error @ weight, error.T @ hidden, error.sum(0))]


def assert_near(name: str, value: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    excess = (value.detach().double() - exact.detach()).abs() - allowed
    assert (excess <= 0).all(), f"{name} is {excess.max():.2e} further off than allowed"


@settings(quick)
@given(call=calls(), on_policy=st.booleans())
def test_linear_grpo_loss(call: Call, on_policy: bool) -> None:
    if on_policy:
        call.inputs.pop("old_logp")
    problem, exact, narrow = call.problem, call.leaves(torch.float64), call.leaves(call.dtype)
    options: dict[str, Any] = {"settings": problem.settings, "softcap": problem.softcap}
    expected, wanted = linear_grpo_loss(**exact, **options, impl="reference")
    with threads(call.threads):
        loss, metrics = linear_grpo_loss(**narrow, **options, impl="native", chunk_mib=call.chunk_mib)

    roundings = Roundings(call)
    per_row = {name: call.inputs[name] for name in PER_ROW if name in call.inputs}

    def coefficients(at: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = at.clone().requires_grad_(), roundings.entropy.clone().requires_grad_()
        scores = (problem.lengths, call.inputs["advantages"], problem.settings)
        value = padded_objective(logp, *scores, entropy=entropy, **per_row)
        return torch.autograd.grad(value, (logp, entropy), materialize_grads=True, allow_unused=True)

    # A KL near 0 or a clip near its edge: the coefficient can change by more than its own rounding.
    d_logp, d_entropy = coefficients(wanted["logp"])
    nearby = [coefficients(wanted["logp"] + shift)[0] for shift in (roundings.logp, -roundings.logp)]
    unsure = torch.stack([(other - d_logp).abs() for other in nearby]).amax(0)
    allowed = roundings.gradients(d_logp, d_entropy, call.dtype, unsure)

    assert_near("logp", metrics["logp"], wanted["logp"], roundings.logp)
    assert_near("loss", loss, expected, 100 * roundings.logp.max())
    for name, ours, truth, error in zip(
        HEAD, gradients(loss, narrow), gradients(expected, exact), allowed, strict=False
    ):
        assert ours.dtype == call.dtype
        assert_near(name, ours, truth, error)


@settings(quick)
@given(call=calls(), with_entropy=st.booleans())
def test_linear_logprob(call: Call, with_entropy: bool) -> None:
    exact, narrow = call.leaves(torch.float64), call.leaves(call.dtype)
    roundings = Roundings(call)
    mix = torch.linspace(-1, 2, call.problem.rows, dtype=torch.float64)
    of_entropy = mix.flip(0) if with_entropy else torch.zeros_like(mix)

    def outputs(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        head = {name: inputs[name] for name in (*HEAD, "targets") if name in inputs}
        options |= {"temperature": call.problem.settings.temperature, "softcap": call.problem.softcap}
        values: Any = linear_logprob(**head, **options, entropy=with_entropy)
        logp, entropy = values if with_entropy else (values, values.new_zeros(len(values)))
        loss = (mix.to(logp.dtype) * logp).sum() + (of_entropy.to(logp.dtype) * entropy).sum()
        return logp, entropy, gradients(loss, inputs)

    with threads(call.threads):
        logp, entropy, values = outputs(narrow, impl="native", chunk_mib=call.chunk_mib)
    expected, wanted, truths = outputs(exact, impl="reference")
    assert_near("logp", logp, expected, roundings.logp)
    assert_near("entropy", entropy, wanted, roundings.logp * (1 + roundings.entropy))
    allowed = roundings.gradients(mix, of_entropy, call.dtype)
    for name, ours, truth, error in zip(HEAD, values, truths, allowed, strict=False):
        assert_near(name, ours, truth, error)


@settings(quick)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 100]), min_size=1, max_size=4).filter(any),
    objective=objectives(),
    missing=st.sets(st.sampled_from(["old_logp"])),
    rewarded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_grpo_loss(sizes: list[int], objective: GRPOSettings, missing: set[str], rewarded: bool, seed: int) -> None:
    lengths = [size for size in sizes for _ in range(2)]  # two generations a prompt
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator)

    logp = -normal(sum(lengths)).abs()
    inputs: dict[str, Any] = {name: logp + 0.5 * normal(len(logp)) for name in PER_ROW if name not in missing}
    inputs["seq_ids"] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = normal(len(lengths))
    inputs |= {"rewards": scores, "num_generations": 2} if rewarded else {"advantages": scores}
    inputs["settings"] = GRPOSettings(**{**objective.__dict__, "entropy_coef": 0.0})

    def results(dtype: torch.dtype, impl: str) -> list[Tensor]:
        given: dict[str, Any] = {
            name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in inputs.items()
        }
        leaf = logp.to(dtype).requires_grad_()
        loss, metrics = grpo_loss(leaf, **given, impl=impl)
        return [loss, *torch.autograd.grad(loss, leaf), *metrics.values()]

    torch.testing.assert_close(
        results(torch.float32, "native"), results(torch.float64, "reference"), check_dtype=False, rtol=1e-5, atol=1e-5
    )


@settings(quick)
@given(
    prompts=st.integers(0, 5),
    generations=st.sampled_from([1, 2, 3, 8, 17]),
    scale=st.sampled_from(["group", "batch", "none"]),
    dtype=DTYPES,
    values=st.sampled_from([1, 2, 1000]),
    stride=st.integers(1, 3),
)
def test_group_advantages(prompts: int, generations: int, scale: str, dtype, values: int, stride: int) -> None:
    """`values` is the number of different rewards: one gives groups of equal rewards."""
    generator = torch.Generator().manual_seed(prompts)
    rewards = (torch.randint(values, (prompts * generations,), generator=generator) / values).to(dtype)
    value = group_advantages(rewards.repeat_interleave(stride)[::stride], generations, scale=scale, impl="native")
    exact = group_advantages(rewards.double(), generations, scale=scale, impl="reference")
    torch.testing.assert_close(value, exact.to(dtype))
    assert torch.equal(value == 0, exact.to(dtype) == 0)
