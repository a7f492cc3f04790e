"""Helpers of tests and benchmarks: random inputs, eager oracles and error budgets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.inputs import SamplingOptions
from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.settings import GRPOSettings

Inputs = dict[str, Any]  # by the name of the argument


@dataclass(frozen=True)
class Problem:
    """Sizes and settings of random inputs of `linear_logprob` and `linear_grpo_loss`."""

    lengths: tuple[int, ...]  # rows of each sequence
    dim: int
    vocab: int
    settings: GRPOSettings = GRPOSettings()  # noqa: RUF009 - frozen
    spread: float = 1.0  # standard deviation of the logits
    bias: bool = False
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """N, rows of all sequences."""
        return sum(self.lengths)

    def draw(self, seed: int, dtype: torch.dtype) -> Inputs:
        """Return float64 inputs, representable in `dtype` (hidden, weight, bias) or float32 (the others).

        Old, reference and sampling log-probs are the policy's plus noise, so that ratios fall on both sides of every
        clip.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        head = {
            "hidden": normal(self.rows, self.dim),
            "weight": self.spread * self.dim**-0.5 * normal(self.vocab, self.dim),
        }
        if self.bias:
            head["bias"] = normal(self.vocab)
        inputs = {name: value.to(dtype).double() for name, value in head.items()}
        inputs["targets"] = torch.randint(0, self.vocab, (self.rows,), generator=generator)
        logp, _ = eager_logprob(**inputs, temperature=self.settings.temperature, softcap=self.softcap)
        inputs["seq_ids"] = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        inputs["advantages"] = normal(len(self.lengths)).float().double()
        for name in ("old_logp", "ref_logp", "sampling_logp"):
            inputs[name] = (logp + 0.5 * normal(self.rows)).float().double()
        return inputs


HEAD = ("hidden", "weight", "bias")


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
    """Return hidden, weight and bias as new leaves in `dtype`, the other tensors in the dtypes of a trainer."""
    out = {}
    for name, value in inputs.items():
        if name in HEAD:
            out[name] = value.detach().to(device, dtype).requires_grad_()
        elif value.is_floating_point():
            out[name] = value.to(device, accumulation_dtype(dtype))
        else:
            out[name] = value.to(device)
    return out


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    """Return the gradients of hidden, weight and, if given, bias."""
    return list(torch.autograd.grad(loss, [inputs[name] for name in HEAD if name in inputs]))


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Return the L2 norm of the difference over that of the oracle, in float64; NaN propagates."""
    oracle = oracle.detach().double()
    difference = (value.detach().double() - oracle).norm()
    scale = oracle.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def pooled(draws: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Concatenate the results of several draws of a problem, so that the error is taken over more numbers."""
    return [torch.cat([value.detach().flatten().cpu() for value in values]) for values in zip(*draws, strict=True)]


def assert_within_budget(
    names: Sequence[str], values: Sequence[Tensor], plain: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """Assert that the error against the float64 oracle is at most twice that of plain torch plus one rounding."""
    for name, value, other, truth in zip(names, values, plain, oracle, strict=True):
        budget = 2 * relative_error(other, truth) + torch.finfo(other.dtype).eps
        error = relative_error(value, truth)
        assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"


def eager_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return logp and entropy [N] of `linear_logprob` in eager torch: all logits at once, then cast to float32."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias  # [N, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def eager_sampling(
    logits: Tensor, draws: Tensor, suppressed_ids: Tensor | None, seen: Tensor | None, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """Return the log-probs [S, V] of the full distribution and of that which `sample_tokens` draws from, without top_k
    and top_p, in eager torch."""
    scores = logits
    if seen is not None:
        divided, multiplied = logits / options.repetition_penalty, logits * options.repetition_penalty
        scores = torch.where(seen, torch.where(logits > 0, divided, multiplied), logits)
    scores = scores / options.temperature
    if suppressed_ids is not None:
        scores[:, suppressed_ids] = -torch.inf
    if options.min_p > 0:
        probabilities = scores.softmax(-1)
        scores[probabilities < options.min_p * probabilities.amax(-1, keepdim=True)] = -torch.inf
    return (logits / options.temperature).log_softmax(-1), scores.log_softmax(-1)
