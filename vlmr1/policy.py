"""Packs -> log-probs and loss: the one place where the model is called for training.

Whatever touches parameters runs inside the wrapped model's forward: `call` binds a function as the forward of the
unwrapped model and calls the wrapper, so that the hooks of DDP, FSDP2 and DeepSpeed fire as in any other forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmr1.loss import Objective
from vlmr1.models.adapter import Adapter, ImageFeatures
from vlmr1.models.attention import PackedAttention, autocast
from vlmr1.models.features import FeatureCache, encode
from vlmr1.types import Pack
from vlmr1_kernels import linear_logprob

T = TypeVar("T")


def call(wrapped: Any, model: Any, function: Callable[[], T]) -> T:
    """Run `function` as the forward of `wrapped` (whose innermost module is `model`)."""
    missing = object()
    before = model.__dict__.get("forward", missing)
    model.forward = function
    try:
        return wrapped()
    finally:
        if before is missing:
            del model.forward
        else:
            model.forward = before


class PackedPolicy:
    """The shared-prefix forward of one model: a pack's log-probs, or its loss."""

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        *,
        temperature: float,
        dtype: torch.dtype | None = None,
        features: FeatureCache | None = None,
    ):
        self.model = model
        self.adapter = adapter
        self.temperature = temperature
        self.dtype = dtype  # of autocast
        self.features = features  # of a frozen tower

    def attention(self) -> AbstractContextManager[None]:
        """Encloses forward and backward: activation checkpointing calls the layers again in backward."""
        return self.adapter.attention(self.model)

    def image_features(self, pack: Pack) -> list[ImageFeatures]:
        """What stands at each placeholder run of the pack."""
        encoded = encode(self.adapter, self.model, pack.image_refs, pack.images, self.features)
        return [encoded[i] for i in pack.image_ids]

    def hidden_rows(self, pack: Pack) -> Tensor:
        """[N, D]: the hidden states that predict completion tokens."""
        device = self.model.device
        with autocast(device, self.dtype), self.attention():
            hidden = self.adapter.hidden(
                self.model,
                pack.input_ids[None].to(device),
                pack.positions[:, None].to(device),
                self.image_features(pack),
                shared=PackedAttention(pack.layout),
            )
        # The final norm leaves them in float32 where its weights are; the head's GEMMs are in the dtype of autocast.
        return hidden[0].index_select(0, pack.rows.to(device)).to(self.dtype or hidden.dtype)

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32 log-probs of the completion tokens, without gradient."""
        with torch.no_grad():
            hidden = self.hidden_rows(pack)
            head = self.adapter.head(self.model)
            weight = head.weight.to(hidden.dtype)
            targets = pack.targets.to(hidden.device)
            logp = linear_logprob(hidden, weight, targets, bias=head.bias, temperature=self.temperature)
            assert isinstance(logp, Tensor)  # no entropy was asked for
            return logp

    def loss(self, pack: Pack, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        """The pack's share of the step's loss, and its metrics."""
        return objective.fused(self.hidden_rows(pack), self.adapter.head(self.model), pack)
