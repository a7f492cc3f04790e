"""The reference model of the KL: a frozen copy, a copy in host memory, or the policy with its adapter off; and how it
follows the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from vlmr1.models import load_model
from vlmr1.policy import PackedPolicy, call
from vlmr1.scale.sharded import Sharding, is_partitioned, release, sharded_reference, without_adapter
from vlmr1.types import Pack

REFERENCE = "reference.safetensors"  # of a checkpoint, where the reference moves


def frozen_copy(
    model: Any, memo: dict[int, Any] | None = None, *, shared: bool = True, source: Mapping[str, Any] | None = None
) -> Any:
    """A reference model: what is trained is copied, what is frozen is the model's own where it is `shared`. `memo`:
    copies that are made already, by the id of what they are of. A model that ZeRO-3 has spread over the ranks is read
    again, with the options `source`."""
    if is_partitioned(model):
        attention = model.config._attn_implementation
        read = load_model(model.name_or_path, dtype=model.dtype, attn_implementation=attention, **(source or {}))
        return read.eval().requires_grad_(False)
    frozen = {id(parameter): parameter for parameter in model.parameters() if shared and not parameter.requires_grad}
    return copy.deepcopy(model, memo=frozen | (memo or {})).eval().requires_grad_(False)


class Reference:
    """Log-probs of a frozen copy; `forward` is of the copy, `policy` the model that it was made from, `wrapped` what is
    called where an engine shards the copy."""

    def __init__(self, forward: PackedPolicy, policy: Any, wrapped: Any = None):
        self.forward = forward
        self.policy = policy
        self.wrapped = forward.model if wrapped is None else wrapped
        self._ready = False

    @property
    def model(self) -> Any:
        return self.forward.model

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Encloses `logprobs` of several packs, so that what they need is brought once."""
        if self._ready:
            yield
            return
        with self._brought():
            self._ready = True
            try:
                yield
            finally:
                self._ready = False

    @contextmanager
    def _brought(self) -> Iterator[None]:
        """In this block `forward` is the reference's, and where it computes."""
        try:
            yield
        finally:
            release(self.wrapped)

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32"""
        with self.ready():
            return call(self.wrapped, self.model, lambda: self.forward.logprobs(pack))

    # Where it follows the policy

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference; TR-DPO, arXiv:2404.09656."""
        policy = dict(self.policy.named_parameters())
        for name, parameter in self._own().items():
            parameter.mul_(1 - alpha).add_(policy[name].detach().to(parameter.device), alpha=alpha)

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


class HostReference(Reference):
    """The same; what was copied is in host memory (pinned where the policy is on a GPU), and on the device for its
    passes only."""

    def __init__(self, forward: PackedPolicy, policy: Any, device: torch.device | None = None):
        self.device = policy.device if device is None else device
        pinned = self.device.type == "cuda"
        copies = {}
        for parameter in policy.parameters():
            if parameter.requires_grad:
                kept = torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)
                copies[id(parameter)] = nn.Parameter(kept.copy_(parameter.detach()), requires_grad=False)
        forward.model = frozen_copy(policy, memo=copies)
        super().__init__(forward, policy)
        self.host = {parameter: parameter.data for parameter in copies.values()}

    @contextmanager
    def _brought(self) -> Iterator[None]:
        try:
            for parameter, kept in self.host.items():
                parameter.data = kept.to(self.device, non_blocking=True)
            yield
        finally:
            for parameter, kept in self.host.items():
                parameter.data = kept


class AdapterReference(Reference):
    """The policy with its adapter switched off: nothing is copied. `wrapped` is the policy as a `peft.PeftModel`."""

    @contextmanager
    def _brought(self) -> Iterator[None]:
        with without_adapter(self.wrapped):
            yield


def make_reference(
    kind: str,
    forward: PackedPolicy,
    wrapped: Any,
    accelerator: Any = None,
    sharding: Sharding | None = None,
    source: Mapping[str, Any] | None = None,
) -> Reference:
    """The reference of the policy that `forward` is of, as the setting `reference` says; `wrapped` is that policy, or
    the `peft.PeftModel` around it; `source` (revision, trust_remote_code) is how the policy was read."""
    policy = forward.model
    device = None if accelerator is None else accelerator.device  # engines move the policy there later
    if kind == "adapter" or (kind == "auto" and wrapped is not policy):
        return AdapterReference(forward, policy, wrapped)
    if kind == "offload":
        return HostReference(forward, policy, device)
    forward.model = frozen_copy(policy, shared=sharding is None, source=source)
    if sharding is not None:
        return Reference(forward, policy, sharded_reference(forward.model, accelerator, sharding))
    if device is not None and forward.model.device != device:
        forward.model.to(device)
    return Reference(forward, policy)


class SyncReference(TrainerCallback):
    """Every `ref_model_sync_steps` updates, before the checkpoint of that step: as TRL's callback of this purpose."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)
