"""`vlmr1` where transformers takes the CPU for a device that computes in bfloat16: with an engine it looks for a GPU,
torch and the engines have it on both. Completions are those of the file TOKENS, where it is given; in which dtype
things are, and what ZeRO-3 fetches ahead, goes to the folder SEEN, a file a rank."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.training_args
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from tests.helpers import fsdp_on_cpu
from tests.helpers.forced import repeating
from vlmr1.cli import main
from vlmr1.commands import train as run
from vlmr1.grpo import policy, reference, trainer
from vlmr1.lifecycle.processes import exit_process
from vlmr1.rollout import scheduler

SUMS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single")
NAMES = {reference: ("reference", "reference"), trainer: ("old", "policy")}  # without and with gradient
added: Counter[str] = Counter()  # numbers that were added up over ranks, by dtype
returned: dict[str, set[str]] = {name: set() for name in ("old", "reference", "policy")}  # dtypes of log-probs
weights: dict[str, set[str]] = {}  # dtypes, by trained, frozen, reference
ahead: Counter[str] = Counter()  # weights that ZeRO-3 has fetched ahead, by a trace of an earlier pass
now: list[str] = []  # passes up to the present one


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []


def watched_sum(function: Callable) -> Callable:
    def call(*arguments: Any, **named: Any) -> Any:
        for tensor in tensors([*arguments, *named.values()]):
            if tensor.is_floating_point():
                added[str(tensor.dtype)] += tensor.numel()
        return function(*arguments, **named)

    return call


def watched_call(names: tuple[str, str]) -> Callable:
    def call(wrapped: Any, *arguments: Any) -> Any:
        name = names[wrapped.training]
        now.append(name)
        result = policy.call(wrapped, *arguments)
        for each in (result[0], result[1]["logp"]) if isinstance(result, tuple) else (result,):
            returned[name].add(str(each.dtype))
        return result

    return call


def watched_fetch(function: Callable) -> Callable:
    def fetch(coordinator: Coordinator, module: torch.nn.Module, forward: bool) -> None:
        if coordinator.is_complete_trace():
            own: list[Any] = list(module.parameters(recurse=False))
            underway = sum(each.ds_status == ZeroParamStatus.INFLIGHT for each in own)
            ahead[now[-1]] += underway
        function(coordinator, module, forward)

    return fetch


class Watched(trainer.GRPOTrainer):
    def generate(self, *arguments: Any) -> Any:
        parameters = list(self.model.parameters())
        of_reference = () if self.reference is None else self.reference.model.parameters()
        weights["trained"] = {str(each.dtype) for each in parameters if each.requires_grad}
        weights["frozen"] = {str(each.dtype) for each in parameters if not each.requires_grad}
        weights["reference"] = {str(each.dtype) for each in of_reference}
        return super().generate(*arguments)


def watched_main() -> int:
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu.allow()
    if "TOKENS" in os.environ:
        scheduler.sample_tokens = repeating(dict(json.loads(Path(os.environ["TOKENS"]).read_text(encoding="utf-8"))))
    Coordinator.fetch_sub_module = watched_fetch(Coordinator.fetch_sub_module)  # type: ignore[method-assign]
    for name in SUMS:
        setattr(dist, name, watched_sum(getattr(dist, name)))
    for module, names in NAMES.items():
        module.call = watched_call(names)  # type: ignore[attr-defined]
    run.GRPOTrainer = Watched  # type: ignore[misc]
    code = main()
    found = {"added": added, "returned": returned, "weights": weights, "ahead": ahead}
    path = Path(os.environ["SEEN"]) / f"seen-{os.environ['RANK']}.json"
    path.write_text(json.dumps(found, default=sorted), encoding="utf-8")
    return code


if __name__ == "__main__":
    exit_process(watched_main())
