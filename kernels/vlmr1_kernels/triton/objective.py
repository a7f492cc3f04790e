"""Token losses of all loss types and importance levels; `GRPOSettings` has the formulas."""

from typing import Any

import triton
import triton.language as tl

from vlmr1_kernels.settings import GRPOSettings

NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


def loss_scalars(settings: GRPOSettings) -> tuple[float | None, ...]:
    """Return (low, high, delta, beta, tis_cap, entropy_coef); None disables a term."""
    cispo = settings.loss_type == "cispo"
    return (
        1 - settings.epsilon_low,
        settings.epsilon_high if cispo else 1 + settings.epsilon_high,
        float("inf") if settings.delta is None else settings.delta,
        settings.beta or None,
        settings.tis_cap,
        settings.entropy_coef or None,
    )


def loss_constexprs(settings: GRPOSettings) -> dict[str, Any]:
    """Return the compile-time constants of the loss kernels."""
    return {"CISPO": settings.loss_type == "cispo", "KL": settings.kl, "CORRECTED": settings.use_bias_correction_kl}


@triton.jit
def log_ratio_and_tis_weight(logp, row, mask, row_logps, loss_scalars):
    """Return (logp - old, truncated importance sampling weight); on-policy, old is logp."""
    old_ptr, _, sampling_ptr = row_logps
    _, _, _, _, cap, _ = loss_scalars
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + row, mask=mask).to(tl.float32)
    tis_weight = tl.zeros_like(logp) + 1
    if cap is not None:
        sampling = tl.load(sampling_ptr + row, mask=mask).to(tl.float32)
        tis_weight = tl.minimum(tl.exp(old - sampling), cap, propagate_nan=NAN)
    return logp - old, tis_weight


@triton.jit
def token_loss(
    logp, log_ratio, tis_weight, mean_tis_weight, mean_kl, advantage, row, mask, row_logps, loss_scalars,
    CISPO: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    """Return (loss, d loss / d logp, ratio, kl) of a row, before its weight and without the entropy bonus.

    At sequence level log_ratio, mean_tis_weight and mean_kl are means over the sequence, since each row changes the
    ratio of all its rows. At token level mean_tis_weight is tis_weight and mean_kl is None. If CORRECTED, the KL is
    multiplied by the ratio.
    """
    low, high, delta, beta, _, _ = loss_scalars
    ratio = tl.exp(log_ratio)
    if CISPO:
        slope = -tl.minimum(ratio, high, propagate_nan=NAN) * advantage * tis_weight
        loss = slope * logp
    else:
        first = tl.minimum(ratio, delta, propagate_nan=NAN) * advantage
        second = tl.clamp(ratio, low, high, propagate_nan=NAN) * advantage
        loss = -tl.minimum(first, second, propagate_nan=NAN) * tis_weight
        # As torch: min splits the gradient of a tie, and clamp passes it at a bound.
        share = tl.where(first == second, 0.5, 1.0)
        moved = tl.where((first <= second) & (ratio <= delta), share, 0.0)
        moved += tl.where((second <= first) & (ratio >= low) & (ratio <= high), share, 0.0)
        slope = -moved * advantage * ratio * mean_tis_weight
    kl = tl.zeros_like(loss)
    _, ref_ptr, _ = row_logps
    if ref_ptr is not None:
        d = tl.load(ref_ptr + row, mask=mask).to(tl.float32) - logp
        kl, kl_slope = kl_divergence(d, KL)
        if CORRECTED:
            kl_slope = ratio * (kl_slope + (kl if mean_kl is None else mean_kl))
            kl *= ratio
        if beta is not None:
            loss += beta * kl
            slope += beta * kl_slope
    return loss, slope, ratio, kl


@triton.jit
def kl_divergence(d, KL: tl.constexpr):
    """Return (kl, d kl / d logp) of d = ref - logp."""
    if KL == "k1":
        kl = -d
        slope = tl.zeros_like(d) + 1
    elif KL == "k2":
        kl = d * d / 2
        slope = -d
    else:
        grown = tl.exp(d)
        # exp(d) - d - 1 cancels near 0, so use its Taylor series there.
        series = tl.fma(d, 1 / 5040, 1 / 720)
        series = tl.fma(d, series, 1 / 120)
        series = tl.fma(d, series, 1 / 24)
        series = tl.fma(d, series, 1 / 6)
        series = tl.fma(d, series, 0.5)
        kl = tl.where(tl.abs(d) < 0.25, d * d * series, grown - d - 1)
        slope = 1 - grown
    return kl, slope
