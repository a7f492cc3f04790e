"""Packs -> log-probs and loss: the one place where the model is called for training.

Whatever touches parameters runs inside the wrapped model's forward: `call` binds a function as the forward of the
unwrapped model and calls the wrapper, so that the hooks of DDP, FSDP2 and DeepSpeed fire as in any other forward. The
head is called in the same way, with the fused projection as its forward: engines that shard gather its weight by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmr1.distributed.sharded import Sharding, summon_full_params
from vlmr1.grpo.loss import PackLoss
from vlmr1.models.attention import PackedAttention, autocast
from vlmr1.models.family import ImageFeatures, ModelFamily
from vlmr1.models.features import FeatureCache, encode
from vlmr1.models.lora import merged
from vlmr1.types import Pack
from vlmr1_kernels import linear_logprob

T = TypeVar("T")


def call(wrapped: Any, model: Any, function: Callable[..., T], *inputs: Any) -> T:
    """Run `function` of the inputs as the forward of `wrapped` (whose innermost module is `model`)."""
    missing = object()
    before = model.__dict__.get("forward", missing)
    # PEFT's wrappers of tasks hand on named inputs of their own.
    model.forward = function if inputs else lambda *_, **__: function()
    try:
        return wrapped(*inputs)
    finally:
        if before is missing:
            del model.forward
        else:
            model.forward = before


@contextmanager
def weights_for_rollout(
    wrapped: Any, trained: Any, sharding: Sharding | None, *, merge_adapter: bool
) -> Iterator[None]:
    """In this block each rank has all weights, and the adapter of `trained` is merged where asked for."""
    with summon_full_params(wrapped, sharding), merged(trained) if merge_adapter else nullcontext():
        yield


@dataclass(eq=False, repr=False)
class PackedPolicy:
    """The shared-prefix forward of one model: a pack's log-probs, or its loss."""

    model: Any
    family: ModelFamily
    _: KW_ONLY
    temperature: float
    dtype: torch.dtype | None = None  # of autocast
    features: FeatureCache | None = None  # of a frozen tower
    accumulates_head: bool = False  # its backward may add to the head's `.grad`: no engine waits for that gradient

    def attention(self) -> AbstractContextManager[None]:
        """Encloses forward and backward: activation checkpointing calls the layers again in backward."""
        return self.family.attention(self.model)

    def image_features(self, pack: Pack) -> tuple[list[ImageFeatures], Tensor | None]:
        """Return the features at each placeholder run, and a 0 computed from images without a run (dummy images), which
        keeps them in backward."""
        encoded = encode(self.family, self.model, pack.image_refs, pack.images, self.features)
        unused = [encoded[i] for i in set(range(len(encoded))) - set(pack.image_ids)]
        nothing = [0 * rows.sum() for each in unused for rows in each.tensors()]
        return [encoded[i] for i in pack.image_ids], torch.stack(nothing).sum() if nothing else None

    def hidden_rows(self, pack: Pack) -> Tensor:
        """[N, D]: the hidden states that predict completion tokens."""
        device = self.model.device
        with autocast(device, self.dtype), self.attention():
            features, nothing = self.image_features(pack)
            hidden = self.family.hidden(
                self.model,
                pack.input_ids[None].to(device),
                pack.positions[:, None].to(device),
                features,
                shared=PackedAttention(pack.layout),
            )
            hidden = hidden if nothing is None else hidden + nothing
        # The final norm leaves them in float32 where its weights are; the head's GEMMs are in the dtype of autocast.
        return hidden[0].index_select(0, pack.rows.to(device)).to(self.dtype or hidden.dtype)

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32 log-probs of the completion tokens, without gradient."""
        with torch.no_grad():
            hidden = self.hidden_rows(pack)
            head = self.family.head(self.model)
            targets = pack.targets.to(hidden.device)

            def logprobs(hidden: Tensor) -> Tensor:
                weight = head.weight.to(hidden.dtype)
                logp = linear_logprob(hidden, weight, targets, bias=head.bias, temperature=self.temperature)
                assert isinstance(logp, Tensor)  # no entropy was asked for
                return logp

            return call(head, head, logprobs, hidden)

    def loss(self, pack: Pack, objective: PackLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """The pack's share of the step's loss, and its metrics."""
        head = self.family.head(self.model)
        fused = partial(objective.fused, head=head, pack=pack, accumulate=self.accumulates_head)
        return call(head, head, fused, self.hidden_rows(pack))
