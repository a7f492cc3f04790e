"""The loss arithmetic of a row, once for every loss type and both levels. `GRPOSettings` has the formulas."""

from typing import Any

import triton
import triton.language as tl

from vlmr1_kernels.settings import GRPOSettings

NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


def limits(settings: GRPOSettings) -> tuple[float | None, ...]:
    """(low, high, delta, beta, tis_cap, entropy_coef); None for a term left out."""
    cispo = settings.loss_type == "cispo"
    return (
        1 - settings.epsilon_low,
        settings.epsilon_high if cispo else 1 + settings.epsilon_high,
        float("inf") if settings.delta is None else settings.delta,
        settings.beta or None,
        settings.tis_cap,
        settings.entropy_coef or None,
    )


def switches(settings: GRPOSettings) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {"CISPO": settings.loss_type == "cispo", "KL": settings.kl}


@triton.jit
def importance(logp, row, mask, others, limits):
    """(logp - old, weight against the rollout engine's log-probs). On-policy, old is logp itself."""
    old_ptr, _, sampling_ptr = others
    _, _, _, _, cap, _ = limits
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + row, mask=mask).to(tl.float32)
    trust = tl.zeros_like(logp) + 1
    if cap is not None:
        sampling = tl.load(sampling_ptr + row, mask=mask).to(tl.float32)
        trust = tl.minimum(tl.exp(old - sampling), cap, propagate_nan=NAN)
    return logp - old, trust


@triton.jit
def token_loss(
    logp, log_ratio, trust, mean_trust, advantage, row, mask, others, limits, CISPO: tl.constexpr, KL: tl.constexpr
):
    """(loss, d loss / d logp, ratio, kl) before the row's weight and without the entropy.

    At sequence level log_ratio and mean_trust are means over the sequence: each of its rows moves all its
    losses by their mean. At token level mean_trust is the row's own.
    """
    low, high, delta, beta, _, _ = limits
    ratio = tl.exp(log_ratio)
    if CISPO:
        slope = -tl.minimum(ratio, high, propagate_nan=NAN) * advantage * trust
        loss = slope * logp
    else:
        first = tl.minimum(ratio, delta, propagate_nan=NAN) * advantage
        second = tl.clamp(ratio, low, high, propagate_nan=NAN) * advantage
        loss = -tl.minimum(first, second, propagate_nan=NAN) * trust
        # A tie of the two terms splits the gradient; a bound itself still lets it through.
        share = tl.where(first == second, 0.5, 1.0)
        moved = tl.where((first <= second) & (ratio <= delta), share, 0.0)
        moved += tl.where((second <= first) & (ratio >= low) & (ratio <= high), share, 0.0)
        slope = -moved * advantage * ratio * mean_trust
    kl = tl.zeros_like(loss)
    _, ref_ptr, _ = others
    if ref_ptr is not None:
        d = tl.load(ref_ptr + row, mask=mask).to(tl.float32) - logp
        kl, kl_slope = divergence(d, KL)
        if beta is not None:
            loss += beta * kl
            slope += beta * kl_slope
    return loss, slope, ratio, kl


@triton.jit
def divergence(d, KL: tl.constexpr):
    """(kl, d kl / d logp) of d = ref - logp."""
    if KL == "k1":
        kl = -d
        slope = tl.zeros_like(d) + 1
    elif KL == "k2":
        kl = d * d / 2
        slope = -d
    else:
        grown = tl.exp(d)
        # exp(d) - d - 1 would cancel near 0, where a policy stays close to its reference.
        series = tl.fma(d, 1 / 5040, 1 / 720)
        series = tl.fma(d, series, 1 / 120)
        series = tl.fma(d, series, 1 / 24)
        series = tl.fma(d, series, 1 / 6)
        series = tl.fma(d, series, 0.5)
        kl = tl.where(tl.abs(d) < 0.25, d * d * series, grown - d - 1)
        slope = 1 - grown
    return kl, slope
