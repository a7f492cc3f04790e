"""Predicted milliseconds of a step by phase: arithmetic on counted FLOPs and bytes, not a measurement.

The trainer's own passes run without data, and their kernels are counted (`work.py`). A kernel takes the largest of its
FLOPs, its bytes and its launch over the ceilings of a GPU (`cards.py`); one kernel runs after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from vlmr1.models.attention import attending_by
from vlmr1.models.optimizers import optimizer_of
from vlmr1.planner.cards import Card
from vlmr1.planner.cuda_ops import NAME
from vlmr1.planner.dry_run import LOGITS, VISION, kernel
from vlmr1.planner.job import Job, packs_of, prompts_of
from vlmr1.planner.passes import merged_for_rollout, policy_of, update
from vlmr1.planner.plan import model_without_data, trained_parameters
from vlmr1.planner.policy import vision_counted
from vlmr1.planner.rollout_work import DECODE, PREFILL, generate, native
from vlmr1.planner.work import UNCOUNTED, Kernels, WorkRun, totals

REFERENCE, OLD, OPTIMIZER = "reference", "old log-probs", "optimizer"
POLICY, TOWER, DECODER, HEAD = "policy", "policy: vision tower", "policy: decoder", "policy: head and loss"
PARTS = {VISION: TOWER, LOGITS: HEAD}  # of the policy pass, by cause; the rest is the decoder's
KINDS = ("product", "attention", "other")


@dataclass(frozen=True)
class Work:
    """Kernels of one generation and its updates by phase; of DECODE those of one step, at the mean length."""

    job: Job
    kernels: Mapping[str, Kernels]

    @property
    def steps(self) -> int:
        """Decode steps of a generation."""
        return self.job.args.max_completion_length - 1

    def milliseconds(self, card: Card) -> dict[str, dict[str, float]]:
        """Milliseconds by phase and kind of kernel."""
        args, found = self.job.args, {}
        for phase, kernels in self.kernels.items():
            graph = phase == DECODE and args.rollout_engine == "native" and args.cuda_graphs is not False
            times: dict[str, float] = dict.fromkeys(KINDS, 0.0)
            for each, count in kernels.items():
                times[each.kind] += 1e3 * count * card.seconds(each, graph=graph)
            steps = self.steps if phase == DECODE else 1
            found[phase] = {kind: steps * time for kind, time in times.items()}
        return found

    def totals(self, phase: str) -> dict[str, float]:
        """FLOPs, bytes and kernels of a phase; of DECODE those of one step."""
        return totals(self.kernels[phase])


def count_work(job: Job) -> Work:
    """Count the kernels of one generation and its updates, with every completion at its longest."""
    args, run = job.args, WorkRun()
    trained = model_without_data(job, run)
    policy = policy_of(job, trained, run)
    model, family = policy.model, policy.family
    prompts = prompts_of(job, family, model)
    updates = args.updates_per_generation * args.num_iterations
    packs = packs_of(job, prompts)
    shapes = [(pack.layout, len(pack.images)) for pack in packs]
    tower = attrgetter(family.vision_paths[0])(model)  # naive passes too have one call for all images of a layer
    with vision_counted(family, model, run), attending_by(NAME, tower), run:
        with run.during(PREFILL), merged_for_rollout(job, trained, run):
            (native if args.rollout_engine == "native" else generate)(job, policy, prompts, run)
        for shape, pack in dict(zip(shapes, packs, strict=True)).items():
            run.repeats = shapes.count(shape)
            model.eval()
            for phase, wanted in ((REFERENCE, job.reference != "none"), (OLD, args.has_old_pass)):
                if wanted:
                    with run.during(phase):
                        policy.logprobs(pack)
            run.repeats *= args.num_iterations
            with run.during(POLICY):
                update(job, model, policy, pack, run, several=True)
        run.repeats = updates
        with run.during(OPTIMIZER):
            _optimize(job, model)
    kernels: dict[str, Kernels] = {}
    for (phase, cause), counted in run.kernels.items():
        if phase == UNCOUNTED:
            continue
        name = PARTS.get(cause, DECODER) if phase == POLICY else phase
        kernels[name] = kernels.get(name, Counter()) + counted
    if job.reference in ("copy", "offload") and not (job.shards_weights or args.sync_ref_model):
        kernels[REFERENCE] = _without_casts(kernels[REFERENCE], model)  # it is held in the compute dtype
    return Work(job, kernels)


def _without_casts(kernels: Kernels, model: Any) -> Kernels:
    """The kernels but for casts of tensors as large as a weight."""
    weights = {each.numel() for each in model.parameters() if each.dim() > 1}
    return Counter({k: n for k, n in kernels.items() if k.name != "_to_copy" or k.numels[0] not in weights})


def _optimize(job: Job, model: Any) -> None:
    """Note clipping, and one pass over gradients, weights and states; some optimizers make several."""
    optimizer, parameters = optimizer_of(job.args), trained_parameters(model)
    share = 1 / job.gpus if job.zero else 1
    gradients = 4 * share * sum(each.numbers for each in parameters)
    if job.args.max_grad_norm:
        kernel("norm", 0, gradients)
        kernel("mul_", 0, 2 * gradients)
    rest = sum(each.bytes + optimizer.state_bytes(each) for each in parameters)
    kernel("step", 0, gradients + 2 * share * rest)
