"""Peak memory of a job by cause and phase, before anything is loaded.

Weights, gradients and optimizer states are counted on the model built without data; activations, logits, KV cache and
vision tower by dry runs of the step on it (`plan_dry.py`). Nothing is fitted. Two figures are allowances: `FRAMEWORK`,
and the layers that ZeRO-3 gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from vlmr1.models import family_for
from vlmr1.planner.dry_run import HOST, DryRun
from vlmr1.planner.groups import image_bytes
from vlmr1.planner.inputs import PlanInputs, inputs_of
from vlmr1.planner.optimizer import Trained, kind_of, state_bytes, step_bytes
from vlmr1.planner.phases import Bytes, dry_phases
from vlmr1.planner.policy import ACTIVATIONS, GRADIENTS, KV, LOGITS, VISION
from vlmr1.planner.variant import variant

__all__ = ["CAUSES", "PHASES", "Plan", "PlanInputs", "Planner", "inputs_of"]

GIB = 2**30
WEIGHTS, OPTIMIZER, REFERENCE, FRAMEWORK_CAUSE = "weights", "optimizer", "reference model", "framework"
IMAGES = "images"  # as the processor made them: of this generation, and of the one before until the next is there
CAUSES = (WEIGHTS, GRADIENTS, OPTIMIZER, REFERENCE, ACTIVATIONS, LOGITS, KV, VISION, IMAGES, FRAMEWORK_CAUSE)
PHASES = ("rollout", "reference", "policy", "update")
# An allowance, not a measurement: CUDA context, kernels, workspaces of cuBLAS, and what the allocator cannot reuse.
FRAMEWORK = {"cuda": round(1.5 * GIB), "cpu": 0}


@dataclass(frozen=True)
class Plan:
    """Bytes on one device by phase and cause, and in host memory by cause."""

    inputs: PlanInputs
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
    """What was counted on one model and its dry runs; bytes."""

    numbers: int
    weights: int
    buffers: int
    trained: tuple[Trained, ...]
    gathered: int  # what ZeRO-3 has in whole at a time
    images: int
    dry: Mapping[str, Bytes]


class Planner:
    """Plans jobs; what two of them have in common is counted once."""

    def __init__(self) -> None:
        self._counted: dict[PlanInputs, _Counted] = {}

    def plan(self, inputs: PlanInputs) -> Plan:
        """SettingError where the settings exclude one another."""
        kind = kind_of(inputs.optim)
        counted = self._count(inputs)
        # One of so many devices has its share of weights, gradients and optimizer states.
        sharing = {stage: inputs.gpus if inputs.zero >= stage else 1 for stage in (1, 2, 3)}
        trained = sum(of.bytes for of in counted.trained)
        states = _share(state_bytes(inputs.optim, counted.trained), sharing[1])
        stepping = states + _share(step_bytes(inputs.optim, counted.trained, inputs.device), sharing[1])
        gradients = _share(sum(4 * each.numbers for each in counted.trained), sharing[2])  # float32 in any case
        copy = _share(trained + counted.buffers, sharing[3])
        always = {
            WEIGHTS: _share(counted.weights, sharing[3]) + (counted.gathered if sharing[3] > 1 else 0),
            OPTIMIZER: 0 if kind.paged else states,
            REFERENCE: copy if inputs.reference == "copy" else 0,
            IMAGES: counted.images if inputs.device == "cpu" else 0,
            FRAMEWORK_CAUSE: FRAMEWORK[inputs.device],
        }
        phases = {}
        for phase in PHASES:
            found = dict.fromkeys(CAUSES, 0) | counted.dry.get(phase, {}) | always
            if phase == "reference":
                if inputs.reference == "none":
                    continue
                if inputs.reference == "offload":
                    found[REFERENCE] = copy
            if phase == "policy" and sharing[2] > 1:
                found[GRADIENTS] = gradients
            if phase == "update":
                found |= {GRADIENTS: gradients, OPTIMIZER: stepping}
            phases[phase] = found
        host = {
            ACTIVATIONS: counted.dry[HOST][ACTIVATIONS],
            OPTIMIZER: states if kind.paged else 0,
            REFERENCE: copy if inputs.reference == "offload" else 0,
            IMAGES: counted.images if inputs.device == "cuda" else 0,
        }
        return Plan(inputs, phases, host, counted.numbers, sum(of.numbers for of in counted.trained))

    def _count(self, inputs: PlanInputs) -> _Counted:
        sharded = inputs.zero >= 2 and inputs.gpus > 1
        reference: Any = "copy" if inputs.reference != "none" else "none"
        key = replace(inputs, optim="", gpus=1, zero=2 * sharded, reference=reference)
        if key not in self._counted:
            dry = DryRun(ACTIVATIONS, uncounted=[GRADIENTS] if sharded else [])
            self._counted[key] = _counted(inputs, variant(inputs, dry), dry)
        return self._counted[key]


def _counted(inputs: PlanInputs, model: Any, dry: DryRun) -> _Counted:
    embedding = model.get_input_embeddings().weight
    parameters, buffers = list(model.parameters()), list(model.buffers())
    layers = attrgetter(family_for(model.config).decoder_path)(model).layers
    layer = max(_bytes(layer.parameters()) for layer in layers)
    return _Counted(
        numbers=sum(p.numel() for p in parameters),
        weights=_bytes(parameters) + _bytes(buffers),
        buffers=_bytes(buffers),
        trained=tuple(Trained(p.numel(), p.itemsize, p is embedding) for p in parameters if p.requires_grad),
        gathered=2 * layer + _bytes([embedding]),
        images=2 * inputs.prompts_per_device * inputs.steps_per_generation * image_bytes(inputs),
        dry=dry_phases(inputs, model, dry),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _share(size: int, devices: int) -> int:
    return -(-size // devices)
