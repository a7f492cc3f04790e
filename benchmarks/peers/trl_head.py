"""TRL's chunked log-probs, the fused head that its GRPO trainer puts in place of the model's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

NOTE = (
    "TRL's ChunkedLogProbFunction with entropy, as its trainer asks for, in its tiles of 4096 rows; logits "
    "rounded to the dtype of the model, projected again in backward; the objective is the eager one"
)


def log_probs() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """hidden [N, D], weight [V, D], targets [N] -> logp [N]; ImportError where TRL has none."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk  # backward imports the module too

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[0]

    return run
