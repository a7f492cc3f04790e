"""The reference model: log-probs of packs, and how it follows the policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from vlmr1.models import load_model
from vlmr1.policy import PackedPolicy, call
from vlmr1.scale.sharded import is_partitioned
from vlmr1.types import Pack

REFERENCE = "reference.safetensors"  # of a checkpoint, where the reference moves


def frozen_copy(model: Any, *, shared: bool = True) -> Any:
    """A reference model: what is trained is copied, what is frozen is the model's own where it is `shared`. A model
    that ZeRO-3 has spread over the ranks is read again."""
    if is_partitioned(model):
        attention = model.config._attn_implementation
        read = load_model(model.name_or_path, dtype=model.dtype, attn_implementation=attention)
        return read.eval().requires_grad_(False)
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=frozen if shared else None).eval().requires_grad_(False)


class Reference:
    """Log-probs of a frozen copy; `forward` is of the copy, `policy` the model that it was made from, `wrapped` what is
    called where an engine shards the copy."""

    def __init__(self, forward: PackedPolicy, policy: Any, wrapped: Any = None):
        self.forward = forward
        self.policy = policy
        self.wrapped = forward.model if wrapped is None else wrapped

    @property
    def model(self) -> Any:
        return self.forward.model

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32"""
        return call(self.wrapped, self.model, lambda: self.forward.logprobs(pack))

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference; TR-DPO, arXiv:2404.09656."""
        policy = dict(self.policy.named_parameters())
        for name, parameter in self._own().items():
            parameter.mul_(1 - alpha).add_(policy[name].detach(), alpha=alpha)

    def save(self, checkpoint: Path) -> None:
        """Write what differs from the policy's weights of the checkpoint: all that was copied."""
        save_file({name: parameter.detach() for name, parameter in self._own().items()}, checkpoint / REFERENCE)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        saved = load_file(checkpoint / REFERENCE)
        for name, parameter in self._own().items():
            parameter.copy_(saved[name])

    def _own(self) -> dict[str, Tensor]:
        """The parameters that are not the policy's."""
        shared = {id(parameter) for parameter in self.policy.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in shared}


class SyncReference(TrainerCallback):
    """Every `ref_model_sync_steps` updates, before the checkpoint of that step: as TRL's callback of this purpose."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)
