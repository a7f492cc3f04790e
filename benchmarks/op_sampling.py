"""Cases of `sample_tokens`: default settings and eight suppressed ids, against softmax, cumulative sum and search."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.op_calls import FLOOR, Call, Outputs, Problem, copy_of, ours
from vlmr1_kernels import sample_tokens

SUPPRESSED = 8


def sampling(rows: int, vocab: int, *, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(3)
    logits = (3 * torch.randn(rows, vocab, device=device, generator=generator)).to(dtype)  # [S, V]
    ids = torch.randperm(vocab, device=device, generator=generator)[:SUPPRESSED]

    def allowed() -> Tensor:
        return logits.double().index_fill(-1, ids, float("-inf")).log_softmax(-1)

    # In the middle of a token's interval: rounding changes no token.
    chosen = torch.multinomial(allowed().exp(), 1, generator=generator)
    shares = allowed().exp()
    draws = (shares.cumsum(-1) - shares / 2).gather(1, chosen)[:, 0]

    def outputs(tokens: Tensor, logp: Tensor, sampling_logp: Tensor) -> Outputs:
        return {"tokens": tokens.double(), "logp": logp, "sampling_logp": sampling_logp}

    def eager() -> Outputs:
        full, kept = logits.double().log_softmax(-1), allowed()
        tokens = torch.searchsorted(kept.exp().cumsum(-1), draws[:, None], right=True)
        return outputs(tokens[:, 0], *(each.gather(1, tokens)[:, 0] for each in (full, kept)))

    moved = rows * (vocab * dtype.itemsize + 24)  # logits; draws, and three results
    arms = {
        FLOOR: copy_of(moved, device),
        **ours(
            "sample_tokens", lambda impl: Call(lambda: outputs(*sample_tokens(logits, draws, ids, impl=impl)), 1e-5)
        ),
        "eager": lambda: Call(eager, 1e-5, "in float64"),
    }
    return Problem(0, moved, eager, arms)
