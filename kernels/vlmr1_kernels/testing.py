"""What the tests and benchmarks of every implementation share: random calls, eager torch, the budget of an error."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.settings import GRPOSettings

Inputs = dict[str, Any]  # by the name of the argument


@dataclass(frozen=True)
class Problem:
    """A random call of `linear_logprob` and `linear_grpo_loss`."""

    lengths: tuple[int, ...]  # rows of each sequence
    dim: int
    vocab: int
    settings: GRPOSettings = GRPOSettings()  # noqa: RUF009 - frozen
    spread: float = 1.0  # standard deviation of the logits
    bias: bool = False
    softcap: float | None = None

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def draw(self, seed: int, dtype: torch.dtype) -> Inputs:
        """float64, with values that `dtype` (hidden, weight, bias) and float32 (the others) hold exactly.

        Old, reference and sampling log-probs are those of the policy and noise: ratios fall on both sides of
        every clip.
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
    """Hidden, weight and bias as fresh leaves in `dtype`, everything else as a trainer holds it."""
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
    """Of hidden, weight and, where there is one, bias."""
    return list(torch.autograd.grad(loss, [inputs[name] for name in HEAD if name in inputs]))


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """L2 norm of the difference over the norm of the oracle, in float64; NaN anywhere gives NaN."""
    oracle = oracle.detach().double()
    difference = (value.detach().double() - oracle).norm()
    scale = oracle.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def pooled(draws: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The results of several draws of one problem, end to end by name: the error of few numbers is luck."""
    return [torch.cat([value.detach().flatten().cpu() for value in values]) for values in zip(*draws, strict=True)]


def assert_within_budget(
    names: Sequence[str], values: Sequence[Tensor], plain: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """Each value errs against the float64 oracle at most twice as much as plain torch in the same dtype; one
    rounding of the dtype is always free."""
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
    """`linear_logprob` with entropy as eager code writes it: all logits at once, then widened."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias  # [N, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
