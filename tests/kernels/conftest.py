from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def padded_objective(
    logp: Tensor,
    lengths: list[int],
    advantages: Tensor,
    *,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    sampling: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: str = "grpo",
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    sequence: bool = False,
    tis_cap: float | None = None,
    entropy_coef: float = 0.0,
    max_length: int = 1,
    normalizer: float | None = None,
) -> Tensor:
    """The objective as padded batches [B, T] write it, independent of the package."""

    def pad(values: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)  # [B, T]

    mask = pad(torch.ones_like(logp))
    logp = pad(logp)
    old = logp.detach() if old is None else pad(old)
    adv = advantages[:, None]  # [B, 1]
    log_ratio = (logp - old) * mask
    if sequence or loss_type == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        loss = -torch.clamp(ratio, max=high).detach() * adv * logp
    else:
        first = (ratio if delta is None else torch.clamp(ratio, max=delta)) * adv
        loss = -torch.min(first, torch.clamp(ratio, 1 - low, 1 + high) * adv)
    if tis_cap is not None:
        assert sampling is not None
        loss = loss * torch.clamp(torch.exp(old - pad(sampling)), max=tis_cap)
    if beta:
        assert ref is not None
        d = pad(ref) - logp
        loss = loss + beta * {"k1": -d, "k2": 0.5 * d * d, "k3": torch.exp(d) - d - 1}[kl]
    if entropy_coef:
        assert entropy is not None
        loss = loss - entropy_coef * pad(entropy)
    loss = loss * mask  # [B, T]
    if loss_type in ("grpo", "gspo"):
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / (normalizer or len(lengths))
    if loss_type == "dr_grpo":
        return loss.sum() / ((normalizer or len(lengths)) * max_length)
    return loss.sum() / (normalizer or mask.sum())


@pytest.fixture(name="padded_objective", scope="session")
def _padded_objective() -> Callable[..., Tensor]:
    return padded_objective


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)
