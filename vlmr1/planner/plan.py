"""Peak memory of a job by cause and phase, before anything is loaded.

Weights, gradients and optimizer states are counted on the model built without data; activations, logits, KV cache and
vision tower by dry runs of the step on it (`passes.py`). Nothing is fitted. Two figures are allowances: `FRAMEWORK`,
and the layers that ZeRO-3 gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vlmr1.grpo.reference import copied_in
from vlmr1.models import family_for
from vlmr1.models.frozen import hold_frozen
from vlmr1.models.lora import base_of
from vlmr1.models.optimizers import Parameter, optimizer_of
from vlmr1.models.precision import prepare_trained
from vlmr1.models.quantization import numbers_of, scales_of
from vlmr1.models.trainable import planned_model
from vlmr1.planner.dry_run import (
    ACTIVATIONS,
    DECODE_WEIGHTS,
    GRADIENTS,
    GRAPHS,
    HOST,
    KV,
    LOGITS,
    VISION,
    WEIGHTS,
    DryRun,
    without_data,
)
from vlmr1.planner.job import Job, image_bytes
from vlmr1.planner.passes import KEPT, Bytes, dry_passes

GIB = 2**30
OPTIMIZER, REFERENCE, FRAMEWORK_CAUSE = "optimizer", "reference model", "framework"
IMAGES = "images"  # as the processor made them: of this generation, and of the one before until the next is there
CAUSES = (WEIGHTS, GRADIENTS, OPTIMIZER, REFERENCE, ACTIVATIONS, LOGITS, KV, GRAPHS, DECODE_WEIGHTS, VISION, IMAGES)
CAUSES += (FRAMEWORK_CAUSE,)
PHASES = ("rollout", "reference", "policy", "update")
# An allowance, not a measurement: CUDA context, kernels, workspaces of cuBLAS, and what the allocator cannot reuse.
FRAMEWORK = {"cuda": round(1.5 * GIB), "cpu": 0}


@dataclass(frozen=True)
class Plan:
    """Bytes on one device by phase and cause, and in host memory by cause."""

    job: Job
    phases: Mapping[str, Bytes]
    host: Bytes
    parameters: int
    trained: int

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)


@dataclass(frozen=True)
class _Counted:
    """Bytes counted on one model and in its dry runs."""

    numbers: int
    weights: int
    buffers: int
    trained: tuple[Parameter, ...]
    narrowed: int  # bytes that a reference in the compute dtype has less than one in the dtype of the weights
    gathered: int  # parameters that ZeRO-3 has gathered at a time
    images: int
    dry: Mapping[str, Bytes]


class Planner:
    """Plans jobs, and counts once what several of them have in common."""

    def __init__(self) -> None:
        self._counted: dict[tuple[Any, ...], _Counted] = {}

    def plan(self, job: Job) -> Plan:
        """Return the plan of a job; SettingError where the model cannot be trained with its settings."""
        counted = self._count(job)
        optimizer, trained = optimizer_of(job.args), counted.trained
        # One of so many devices has its share of weights, gradients and optimizer states.
        sharing = {stage: job.gpus if job.zero >= stage else 1 for stage in (1, 2, 3)}
        paged = _share(sum(map(optimizer.paged_bytes, trained)) if job.device == "cuda" else 0, sharing[1])
        states = _share(sum(map(optimizer.state_bytes, trained)), sharing[1])
        stepping = states + _share(optimizer.step_bytes(trained, lists=job.device == "cuda"), sharing[1])
        gradients = _share(sum(4 * each.numbers for each in trained), sharing[2])  # float32 in any case
        narrowed = 0 if sharing[3] > 1 or job.args.sync_ref_model else counted.narrowed
        copy = _share(sum(each.bytes for each in trained) + counted.buffers - narrowed, sharing[3])
        always = {
            WEIGHTS: _share(counted.weights, sharing[3]) + (counted.gathered if sharing[3] > 1 else 0),
            OPTIMIZER: states - paged,
            REFERENCE: copy if job.reference == "copy" else 0,
            IMAGES: counted.images if job.device == "cpu" else 0,
            FRAMEWORK_CAUSE: FRAMEWORK[job.device],
        }
        phases = {}
        for phase in PHASES:
            if phase == "reference" and job.reference == "none":
                continue
            run = counted.dry.get(phase, {})
            kept = {} if phase == "rollout" else counted.dry[KEPT]
            found = {cause: run.get(cause, 0) + always.get(cause, 0) + kept.get(cause, 0) for cause in CAUSES}
            if phase == "reference" and job.reference == "offload":
                found[REFERENCE] = copy
            if phase == "policy" and job.shards_gradients:
                found[GRADIENTS] = gradients
            if phase == "update":
                found |= {GRADIENTS: gradients, OPTIMIZER: stepping}
            phases[phase] = found
        host = {
            ACTIVATIONS: counted.dry[HOST][ACTIVATIONS],
            KV: counted.dry[KEPT].get(HOST, 0),
            OPTIMIZER: paged,
            REFERENCE: copy if job.reference == "offload" else 0,
            IMAGES: counted.images if job.device == "cuda" else 0,
        }
        return Plan(job, phases, host, counted.numbers, sum(each.numbers for each in trained))

    def _count(self, job: Job) -> _Counted:
        key = job.run_key()
        if key not in self._counted:
            dry = DryRun(ACTIVATIONS, uncounted=[GRADIENTS] if job.shards_gradients else [])
            self._counted[key] = _counted(job, model_without_data(job, dry), dry)
        return self._counted[key]


def peak_bytes(args: Any, config: Any, **job: Any) -> int:
    """Planned peak of a run with these settings on a model of this configuration; `job` as the fields of `Job`
    (device, gpus, zero, image_tokens, text_tokens). With device "cpu" the implementations that `args.kernels` names,
    or else `auto` chooses, are counted; nothing is counted of the process beside the run."""
    return Planner().plan(Job(args, config, **job)).peak


def model_without_data(job: Job, dry: DryRun) -> Any:
    """The model that the job trains, or the `peft.PeftModel` around it, as the trainer makes it, without data."""
    args = job.args

    def make() -> Any:
        made = planned_model(deepcopy(job.config), args)  # it notes a dtype there
        if job.holds_frozen:
            hold_frozen(base_of(made), torch.bfloat16)
        return made

    trained = without_data(make, dry.fake)
    model = base_of(trained)
    model.tie_weights()
    prepare_trained(trained, args)
    scales = [scale for parameter in trained.parameters() for scale in scales_of(parameter).values()]
    dry.leave_out([*trained.parameters(), *trained.buffers(), *scales])
    if args.activation_checkpointing:
        kwargs = dict(args.activation_checkpointing_kwargs or {})
        kwargs.pop("offload", None)  # `passes.checkpoints_on_host` counts it
        every = kwargs.pop("every_n_layers", 1)
        model.activation_checkpointing_enable(kwargs or None, every_n_layers=every)
    return trained


def _counted(job: Job, wrapped: Any, dry: DryRun) -> _Counted:
    model = base_of(wrapped)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    layers = attrgetter(family_for(model.config).decoder_path)(model).layers
    layer = max(_bytes(layer.parameters()) for layer in layers)
    return _Counted(
        numbers=sum(map(numbers_of, parameters)),
        weights=_bytes(parameters) + _bytes(buffers),
        buffers=_bytes(buffers),
        narrowed=2 * sum(p.numel() for p in copied_in(model, torch.bfloat16 if job.args.bf16 else None)),
        trained=trained_parameters(model),
        gathered=2 * layer + _bytes([model.get_input_embeddings().weight]),
        images=2 * job.prompts * image_bytes(job),
        dry=dry_passes(job, wrapped, dry),
    )


def trained_parameters(model: Any) -> tuple[Parameter, ...]:
    """Return the parameters that the optimizer is given."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return tuple(Parameter(tuple(p.shape), p.itemsize, id(p) in embeddings) for p in trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, scales of 4-bit weights included."""
    return sum(part.numel() * part.itemsize for tensor in tensors for part in (tensor, *scales_of(tensor).values()))


def _share(size: int, devices: int) -> int:
    return -(-size // devices)
