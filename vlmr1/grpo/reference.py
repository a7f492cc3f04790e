"""The reference model of the KL: a frozen copy, a copy in host memory, or the policy with its adapter off; and how it
follows the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from vlmr1.distributed.sharded import Sharding, disable_adapter, is_partitioned, reshard, sharded_reference
from vlmr1.distributed.sharded_params import gather_full, lerp_, scatter_full
from vlmr1.grpo.policy import PackedPolicy, call
from vlmr1.models import load_model
from vlmr1.models.frozen import cast_by_autocast, fits, with_float32_rows
from vlmr1.types import Pack

REFERENCE = "reference.safetensors"  # of a checkpoint, where the reference moves


def frozen_copy(
    model: Any,
    memo: dict[int, Any] | None = None,
    *,
    shared: bool = True,
    source: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A reference model: what is trained is copied, what is frozen is the model's own where it is `shared`. `memo`:
    copies that exist already, by the id of the original. A model that ZeRO-3 has spread over the ranks is read
    again, with the options `source`. `dtype`: of autocast, which reads the copies as well in it."""
    if is_partitioned(model):
        attention = model.config._attn_implementation
        again = load_model(model.name_or_path, dtype=model.dtype, attn_implementation=attention, **(source or {}))
        return again.eval().requires_grad_(False)
    frozen = {id(parameter): parameter for parameter in model.parameters() if shared and not parameter.requires_grad}
    memo = frozen | (memo or {})
    for parameter, to in copied_in(model, dtype).items():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(to), requires_grad=False)
    copied = copy.deepcopy(model, memo=memo).eval().requires_grad_(False)
    if copied.get_input_embeddings().weight.dtype == dtype != model.get_input_embeddings().weight.dtype:
        with_float32_rows(copied)
    return copied


def copied_in(model: Any, dtype: torch.dtype | None) -> dict[nn.Parameter, torch.dtype]:
    """The trained float32 parameters that a copy under autocast to `dtype` can have in that dtype: its log-probs are
    those of a float32 copy, bit for bit. Of embeddings each value has to fit."""
    if dtype is None:
        return {}
    rows = model.get_input_embeddings().weight
    trained = (parameter for parameter in cast_by_autocast(model) if parameter.requires_grad)
    return {each: dtype for each in trained if each is not rows or fits(each, dtype)}


class Reference:
    """Log-probs of a frozen copy; `forward` is of the copy, `policy` the model that it was made from, `wrapped` what is
    called where an engine shards the copy as `sharding` says, and `trained` what it shards of the policy."""

    def __init__(
        self,
        forward: PackedPolicy,
        policy: Any,
        wrapped: Any = None,
        *,
        trained: Any = None,
        sharding: Sharding | None = None,
    ):
        self.forward = forward
        self.policy = policy
        self.wrapped = forward.model if wrapped is None else wrapped
        self.trained = policy if trained is None else trained
        self.sharding: Sharding | None = sharding
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
            reshard(self.wrapped)

    def logprobs(self, pack: Pack) -> Tensor:
        """[N] float32"""
        with self.ready():
            return call(self.wrapped, self.model, lambda: self.forward.logprobs(pack))

    # Where it follows the policy; every rank calls these

    def sync(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference; TR-DPO, arXiv:2404.09656."""
        reshard(self.trained)
        reshard(self.wrapped)
        policy = dict(self.policy.named_parameters())
        for name, parameter in self._moving().items():
            lerp_(parameter, policy[name], alpha, self.sharding)

    def save(self, checkpoint: Path, *, writes: bool = True) -> None:
        """Write what differs from the policy's weights of the checkpoint: all that is trained."""
        reshard(self.wrapped)
        found = {name: gather_full(p, self.sharding, keep=writes) for name, p in self._moving().items()}
        if writes:
            save_file({name: value for name, value in found.items() if value is not None}, checkpoint / REFERENCE)

    def load(self, checkpoint: Path) -> None:
        reshard(self.wrapped)
        with safe_open(checkpoint / REFERENCE, "pt") as saved:
            for name, parameter in self._moving().items():
                scatter_full(parameter, saved.get_tensor(name), self.sharding)

    def _moving(self) -> dict[str, Tensor]:
        """The parameters whose counterparts the policy trains: where nothing is sharded, all that are not its own."""
        trained = {name for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in trained}


class HostReference(Reference):
    """`Reference` whose copies are in host memory (pinned where the policy is on a GPU), and on the device for its
    passes only."""

    def __init__(
        self,
        forward: PackedPolicy,
        policy: Any,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.device = policy.device if device is None else device
        pinned = self.device.type == "cuda"
        copies, dtypes = {}, copied_in(policy, dtype)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                options: dict[str, Any] = {"dtype": dtypes.get(parameter), "pin_memory": pinned}
                kept = torch.empty_like(parameter, device="cpu", requires_grad=False, **options)
                copies[id(parameter)] = nn.Parameter(kept.copy_(parameter.detach()), requires_grad=False)
        forward.model = frozen_copy(policy, memo=copies, dtype=dtype)
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
        with disable_adapter(self.wrapped):
            yield


def make_reference(
    kind: str,
    forward: PackedPolicy,
    wrapped: Any,
    accelerator: Any = None,
    sharding: Sharding | None = None,
    source: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Reference:
    """The reference of the policy that `forward` is of, of the kind "copy", "adapter" or "offload"; `wrapped` is that
    policy, or the `peft.PeftModel` around it; `source` (revision, trust_remote_code) is how the policy was read.
    `dtype`: of autocast, for a copy that never moves.

    What is copied is what is trained. For a run that starts from an adapter that is the adapter as it was read, which
    the copy adds to the policy's own base: TRL keeps such a copy as a second adapter."""
    policy = forward.model
    device = None if accelerator is None else accelerator.device  # engines move the policy there later
    if kind == "adapter":
        return AdapterReference(forward, policy, wrapped)
    if kind == "offload":
        return HostReference(forward, policy, device, dtype)
    forward.model = frozen_copy(
        policy, shared=sharding is None, source=source, dtype=dtype if sharding is None else None
    )
    if sharding is not None:
        copied = sharded_reference(forward.model, accelerator, sharding)
        return Reference(forward, policy, copied, trained=wrapped, sharding=sharding)
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
