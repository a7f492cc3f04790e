"""bfloat16 on the CPU: ranks of an engine that compute in it, and one process with their arithmetic."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.training_args
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.forced import Tokens, repeating
from vlmr1.commands import train as run
from vlmr1.grpo import pack_trainer, policy, reference, trainer
from vlmr1.rollout import scheduler
from vlmr1.training import parallel

SUMS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single")
NAMES = {reference: "reference", pack_trainer: "policy", trainer: "policy"}


@dataclass
class Seen:
    """Dtypes in a rank."""

    added: Counter[str] = field(default_factory=Counter)  # numbers that were added up over ranks, by dtype
    returned: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in NAMES.values()})
    trained: set[str] = field(default_factory=set)  # of the weights

    def sum(self, function: Callable) -> Callable:
        """Return the collective with its operands counted."""

        def call(*arguments: Any, **named: Any) -> Any:
            for tensor in tree_leaves((arguments, named)):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.added[str(tensor.dtype)] += tensor.numel()
            return function(*arguments, **named)

        return call

    def call(self, name: str) -> Callable:
        """Return `policy.call` with the dtype of its log-probs recorded."""

        def call(*arguments: Any) -> Any:
            result = policy.call(*arguments)
            for each in (result[0], result[1]["logp"]) if isinstance(result, tuple) else (result,):
                self.returned[name].add(str(each.dtype))
            return result

        return call


@dataclass(frozen=True)
class OnCPU:
    """Prepare a rank: transformers accepts bfloat16 on the CPU, as torch and the engines do; completions are those of
    the file `tokens`; dtypes are written to the folder `seen`."""

    tokens: Path
    seen: Path

    def __call__(self) -> None:
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        scheduler.sample_tokens = repeating(dict(json.loads(self.tokens.read_text(encoding="utf-8"))))
        seen, path = Seen(), self.seen / f"seen-{os.environ['RANK']}.json"
        for name in SUMS:
            setattr(dist, name, seen.sum(getattr(dist, name)))
        for module, name in NAMES.items():
            module.call = seen.call(name)  # type: ignore[attr-defined]

        class Watched(trainer.GRPOTrainer):
            def train(self, *arguments: Any, **named: Any) -> Any:
                parameters = list(self.model.parameters())
                output = super().train(*arguments, **named)
                seen.trained = {str(each.dtype) for each in parameters if each.requires_grad}
                path.write_text(json.dumps(vars(seen), default=sorted), encoding="utf-8")
                return output

        run.GRPOTrainer = Watched  # type: ignore[misc]


def apart(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give each input a node of its own in the graph, as ZeRO-3's hooks do: the gradients of a module's branches are
    summed before those of its siblings."""
    return tuple(each.view_as(each) if isinstance(each, Tensor) and each.requires_grad else each for each in inputs)


class AsEngine:
    """Patch `vlmr1.commands.train` so that one process computes as the ranks of an engine do, to the last bit.

    Forwards read weights in bfloat16, gradients are summed over passes in float32, the optimizer updates float32
    masters. ZeRO rounds the masters when it starts. With ZeRO-3 an adapter stays float32, linear layers add their bias
    to a rounded product, and hooks determine the order in which gradients of activations are summed."""

    def __init__(self, engine: str, tokens: Tokens, patch: pytest.MonkeyPatch):
        self.engine = engine
        self.masters: dict[torch.nn.Parameter, Tensor] = {}
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}  # sums over the passes of an update
        self.weights: dict[str, Tensor] = {}  # masters of what is trained, after the last update
        arithmetic = self

        class Emulated(trainer.GRPOTrainer):
            def create_optimizer(self, *arguments: Any) -> Any:
                optimizer = super().create_optimizer(*arguments)
                optimizer.register_step_pre_hook(lambda *_: arithmetic.unround())
                optimizer.register_step_post_hook(lambda *_: arithmetic.round())
                return optimizer

            def training_step(self, *arguments: Any) -> Tensor:
                loss = super().training_step(*arguments)
                for each, gradient in arithmetic.gradients.items():
                    each.grad = None  # zeros of a tower, where the last pass had no image
                    each.grad_dtype, each.grad = torch.float32, gradient
                arithmetic.gradients.clear()
                return loss

            def train(self, *arguments: Any, **named: Any) -> Any:
                output = super().train(*arguments, **named)
                trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
                arithmetic.weights = {
                    name.replace(".default.weight", ".weight"): arithmetic.masters.get(each, each.data)
                    for name, each in trained.items()
                }
                return output

        patch.setattr(run, "GRPOTrainer", Emulated)
        patch.setattr(parallel, "round_zero2_weights", self.start)
        patch.setattr(scheduler, "sample_tokens", repeating(tokens))
        if engine == "zero3":
            from deepspeed.runtime.zero.linear import zero3_linear_wrap

            patch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)

    def start(self, model: torch.nn.Module, accelerator: Any, *, bf16: bool) -> None:
        if self.engine == "zero3":
            for module in model.modules():
                module.register_forward_pre_hook(apart)
        adapter = self.engine == "zero3" and any("lora_" in name for name, _ in model.named_parameters())
        for each in model.parameters():
            if each.requires_grad and adapter:
                each.data = each.data.bfloat16().float()
                continue
            self.masters[each] = each.data.clone() if self.engine == "fsdp2" else each.data.bfloat16().float()
            each.data = each.data.bfloat16()
            if each.requires_grad:
                each.register_post_accumulate_grad_hook(self.add)

    def add(self, parameter: torch.Tensor) -> None:
        """Take the gradient of one backward. Autograd has added the parts of a tied weight in bfloat16, as in ranks."""
        assert parameter.grad is not None
        self.gradients[parameter] = parameter.grad.float() + self.gradients.get(parameter, 0)
        parameter.grad = None

    def unround(self) -> None:
        for each, master in self.masters.items():
            if each.requires_grad:
                each.data = master

    def round(self) -> None:
        for each in self.masters:
            if each.requires_grad:
                self.masters[each] = each.data
                each.grad, each.grad_dtype = None, torch.bfloat16
                each.data = each.data.bfloat16()
