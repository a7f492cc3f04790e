"""The trainer's policies in a dry run, and the causes of what vision tower, head and checkpoints allocate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlmr1.grpo.loss import Objective, head_weight
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import attending_by, autocast
from vlmr1.models.family import ModelFamily
from vlmr1.planner.cuda_ops import NAME, FlashPacked, head_logprobs, head_loss
from vlmr1.planner.dry_run import HOST, LOGITS, VISION, DryRun
from vlmr1.planner.fused_ops import STAND_INS
from vlmr1.types import Pack
from vlmr1_kernels import registry
from vlmr1_kernels.native import library


class DryPacked(PackedPolicy):
    """A packed policy whose head's allocations are counted as logits."""

    def __init__(self, dry: DryRun, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.dry = dry

    def loss(self, pack: Pack, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, head = self.hidden_rows(pack), self.family.head(self.model)
        with self.dry.of(LOGITS):
            self.dry.transient(LOGITS, native_workspace(hidden, head_weight(head, hidden.dtype)))
            return objective.fused(hidden, head, pack)


class DryOnCuda(DryPacked):
    """A packed policy with the allocations of the CUDA implementations."""

    @contextmanager
    def attention(self) -> Iterator[None]:
        tower = attrgetter(self.family.vision_paths[0])(self.model)
        with self.family.attention(self.model), attending_by(NAME, tower):
            yield

    def hidden_rows(self, pack: Pack) -> Tensor:
        ids, positions = pack.input_ids[None], pack.positions[:, None]
        shared: Any = FlashPacked(pack.layout)
        with autocast(self.model.device, self.dtype), self.attention():
            features, _ = self.image_features(pack)
            hidden = self.family.hidden(self.model, ids, positions, features, shared=shared)
        return hidden[0].index_select(0, pack.rows).to(self.dtype or hidden.dtype)

    def logprobs(self, pack: Pack) -> Tensor:
        with torch.no_grad():
            hidden = self.hidden_rows(pack)
            with self.dry.of(LOGITS):
                return head_logprobs(hidden, self.family.head(self.model).weight.to(hidden.dtype))

    def loss(self, pack: Pack, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hidden_rows(pack)
        with self.dry.of(LOGITS):
            return head_loss(hidden, head_weight(self.family.head(self.model), hidden.dtype)), {}


def count_fused_layers(family: ModelFamily, setting: str) -> None:
    """Count what Liger's operators allocate, unless `fused_layers` says stock layers."""
    family.operators = None if setting == "torch" else STAND_INS


def native_workspace(hidden: Tensor, weight: Tensor) -> int:
    """Bytes that the native `linear_grpo_loss` allocates beside its results; 0 where another implementation is chosen.
    They are the part of a chunk's logits that does not fit in the weight's gradient, and in half precision the float32
    sums over chunks."""
    rows, (vocabulary, width) = len(hidden), weight.shape
    call = registry.Request(hidden.device, hidden.dtype, (rows, width, vocabulary))
    if registry.select("linear_grpo_loss", call).name != "native":
        return 0
    trained = weight.requires_grad
    chunk, each = min(rows, library.chunk_rows(hidden, weight, None)[0]), library.logit_bytes(hidden.dtype)
    several = rows > chunk
    borrowed = width * weight.dtype.itemsize // each if trained and not several else 0
    sums = vocabulary * width * 4 if trained and several and weight.dtype.itemsize < 4 else 0
    return max(0, chunk - borrowed) * vocabulary * each + sums


@contextmanager
def vision_counted(family: ModelFamily, model: Any, dry: DryRun) -> Iterator[None]:
    """Count what tower and projector allocate in this block, backward included, as vision tower."""

    def before(*_: Any) -> None:
        causes.append(dry.cause)
        dry.cause = VISION

    def after(module: Any, inputs: Any, output: Any) -> None:
        dry.cause = causes.pop()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(at_backward)

    def at_backward(gradient: Tensor) -> None:
        dry.cause = VISION

    causes: list[str] = []
    with ExitStack() as stack:
        for path in family.vision_paths:
            module = attrgetter(path)(model)
            for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
                stack.callback(handle.remove)
        yield


@contextmanager
def checkpoints_on_host(dry: DryRun, rows: int, width: int) -> Iterator[None]:
    """Count tensors [.., rows, width] that forward saves in this block as host memory. With checkpointing these are the
    inputs of the decoder's layers, and what the final norm saves."""

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] != (rows, width) or not tensor.is_floating_point():
            return tensor
        with dry.of(HOST):
            return tensor.detach().clone()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.clone() if dry.cause_of(tensor) == HOST else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
