"""What the tests and benchmarks of every implementation share: eager torch, and the budget of an error."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """L2 norm of the difference over the norm of the oracle, in float64; NaN anywhere gives NaN."""
    oracle = oracle.detach().double()
    difference = (value.detach().double() - oracle).norm()
    scale = oracle.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def pooled(draws: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The results of several draws of one problem, end to end by name: the error of few numbers is luck."""
    return [torch.cat([value.flatten() for value in values]) for values in zip(*draws, strict=True)]


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
