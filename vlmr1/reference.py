"""The reference model of the KL: a frozen copy, a copy in host memory, or the policy with its adapter off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vlmr1.policy import PackedPolicy, call
from vlmr1.types import Pack


def frozen_copy(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """A reference model: what is trained is copied, what is frozen is the model's own. `memo`: copies that are made
    already, by the id of what they are of."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, memo=frozen | (memo or {})).eval().requires_grad_(False)


class Reference:
    """Log-probs of a frozen copy; `forward` is of the copy, `policy` the model that it was made from."""

    def __init__(self, forward: PackedPolicy, policy: Any):
        self.forward = forward
        self.policy = policy
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

    def _brought(self) -> AbstractContextManager[None]:
        """In this block `forward` is the reference's, and where it computes."""
        return nullcontext()

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32"""
        with self.ready():
            return self._logprobs(pack)

    def _logprobs(self, pack: Pack) -> Tensor:
        return self.forward.logprobs(pack)


class HostReference(Reference):
    """The same; what was copied is in host memory (pinned where the policy is on a GPU), and on the device for its
    passes only."""

    def __init__(self, forward: PackedPolicy, policy: Any):
        self.device = policy.device
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

    def __init__(self, forward: PackedPolicy, policy: Any, wrapped: Any):
        super().__init__(forward, policy)
        self.wrapped = wrapped

    def _brought(self) -> AbstractContextManager[None]:
        return self.wrapped.disable_adapter()

    def _logprobs(self, pack: Pack) -> Tensor:
        return call(self.wrapped, self.policy, lambda: self.forward.logprobs(pack))


def make_reference(kind: str, forward: PackedPolicy, wrapped: Any) -> Reference:
    """The reference of the policy that `forward` is of, as the setting `reference` says; `wrapped` is that policy, or
    the `peft.PeftModel` around it."""
    policy = forward.model
    if kind == "adapter" or (kind == "auto" and wrapped is not policy):
        return AdapterReference(forward, policy, wrapped)
    if kind == "offload":
        return HostReference(forward, policy)
    forward.model = frozen_copy(policy)
    return Reference(forward, policy)
