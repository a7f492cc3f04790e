"""One run of the step benchmark: our arms on a shared model, peers in processes of their own, samples in turn."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import arms_of, settings_of
from benchmarks.console import Progress
from benchmarks.harness import MIB, CheckFailed, alternate, clock_of, require_equal
from benchmarks.model import SHAPES, Shape
from benchmarks.peers.client import PEERS, PeerArm, command
from benchmarks.planned import beyond_held, peak_bytes, planned_phases
from benchmarks.trainer_arm import Bed, TrainerArm
from vlmr1.errors import MemoryShort, SettingError
from vlmr1_kernels import ImplementationError, registry

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of loss and gradient norm
LOSS_FLOOR = {"float32": 1e-6, "bfloat16": 2e-3}  # an absolute difference of losses that rounding makes
GRID = {"tiny": ((2, 4), (56, 112)), "bench": ((2, 4, 8), (224, 448))}  # group sizes, sides of the image in pixels
LARGE_GRID = ((2, 8), (448, 896))
GRID_ROUNDS = 3
SAID = ("device", "threads", "dtype", "shape", "rounds", "rollout", "quick")  # of the options in the result


def new_figures(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Return the result before anything is measured."""
    sizes = {"prompts": shape.prompts, "num_generations": shape.num_generations, "image_tokens": shape.image_tokens}
    sizes |= {"completion_tokens": shape.completion_length}
    about = {name: getattr(options, name) for name in SAID}
    return {**about, "complete": False, "sizes": sizes, "arms": {}, "grid": [], "skipped": {}}


class Session:
    """Arms on one shape. `figures` is filled in the layout of the result file."""

    def __init__(
        self, options: argparse.Namespace, shape: Shape, folder: Path, progress: Progress, figures: dict[str, Any]
    ):
        self.options, self.shape, self.folder, self.progress = options, shape, folder, progress
        self.figures, self.rows = figures, figures["arms"]
        self.clock = clock_of(options.device)
        self.arms: dict[str, TrainerArm | PeerArm] = {}
        self.samples: dict[str, list[float]] = {}
        self.phases: dict[str, list[dict[str, float]]] = {}

    def measure(self) -> None:
        """Fill the result: our arms and the peers, and the grid where it is asked for."""
        peers, on_cpu = self.options.peers, self.options.device == "cpu"
        self._build()
        if on_cpu:
            self._launch(peers)
        self._sample()
        if self.options.memory:
            for name, arm in self.arms.items():
                if isinstance(arm, TrainerArm):
                    self.progress.say(f"memory by phase: {name}")
                    self.rows[name]["memory_by_phase"] = arm.memory_by_phase()
        for name in () if on_cpu else peers:  # two trainers at a time may not fit
            self.close()
            self._launch([name])
            self._sample()
        self.close()
        if self.options.grid:
            self._measure_grid()

    def _build(self) -> None:
        """Make the model, plan every arm that is asked for and its bases, make the trainers of those that fit."""
        options, device = self.options, self.options.device
        chosen = {each.op: each.chosen for each in registry.explain_all(device, getattr(torch, options.dtype))}
        table, reasons = arms_of(device, chosen)
        if options.arms is None:
            self.figures["skipped"] |= reasons
        wanted = set(options.arms or table) - (reasons.keys() if options.rollout else set())
        if unknown := wanted - table.keys():
            said = "; ".join(reasons.get(name, f"known are {', '.join(table)}") for name in unknown)
            raise SettingError(f"--arms: {', '.join(unknown)}: {said}")
        while bases := {table[name].base for name in wanted} - wanted:
            wanted |= bases
        self.progress.say(f"model of shape {options.shape}")
        bed = Bed(self.folder, self.shape, device, options.dtype)
        tokens = len(bed.groups[0].prompt.input_ids)
        parameters = sum(parameter.numel() for parameter in bed.model.parameters())
        self.figures["sizes"] |= {"prompt_tokens": tokens, "parameters": parameters}
        for name, arm in ((name, arm) for name, arm in table.items() if name in wanted):
            settings = settings_of(table, name)
            self.progress.say(f"planning {name}")
            phases = planned_phases(settings, self.shape, tokens, device)
            self.rows[name] = asdict(arm) | {"group": "arm", "tokens": self.shape.completion_tokens}
            self.rows[name] |= {
                "planned_gib": peak_bytes(phases) / 2**30,
                "planned_mib": {phase: size / MIB for phase, size in beyond_held(phases).items()},
            }
            if (gib := self.rows[name]["planned_gib"]) > options.limit:
                self._skip(name, f"planned at {gib:.1f} GiB, the limit is {options.limit:g} GiB")
                continue
            make = {"flat": arm.flat, "rollout": options.rollout}
            if made := self._fits(name, lambda n=name, s=settings, m=make: TrainerArm(n, bed, s, **m)):
                self.arms[name] = made

    def _launch(self, names: list[str]) -> None:
        """Start peers' processes; they answer later."""
        options = self.options
        for name in names:
            given = {"shape": options.shape, "threads": options.threads, "dtype": options.dtype}
            words = command(name, folder=self.folder / name, **given)
            self.arms[name] = PeerArm(words, self.folder / f"{name}.log", limit=options.peer_limit)
            note = PEERS[name].note + ("" if options.device == "cpu" else "; timed after ours")
            about = {"label": PEERS[name].label, "base": "naive" if "naive" in self.rows else name, "group": "peer"}
            self.rows[name] = {**about, "settings": {}, "note": note, "tokens": self.shape.completion_tokens}

    def _skip(self, name: str, reason: str) -> None:
        """Leave an arm out, with the reason."""
        self.figures["skipped"][name] = reason
        self.progress.say(f"{name} is left out: {reason}")
        if isinstance(arm := self.arms.pop(name, None), PeerArm):
            arm.kill()
        self.rows.pop(name, None)

    def _without_base(self) -> None:
        for name in [name for name in self.arms if self.rows[name]["base"] not in self.rows]:
            self._skip(name, f"its base {self.rows[name]['base']} was left out")

    def _fits(self, name: str, call: Callable[[], Any]) -> Any:
        """Return what the call returns; None where memory, a named kernel or a peer fails, and the arm is left out."""
        try:
            return call()
        except (ImplementationError, ChildProcessError) as error:
            reason = str(error)
        except (torch.OutOfMemoryError, MemoryShort) as error:
            reason = f"out of memory: {str(error).splitlines()[0]}"
        self._skip(name, reason)
        gc.collect()
        return None

    def _sample(self) -> None:
        """Check the arms, make a first step of each, of which the peak memory is kept, then take samples in turn."""
        dtype, rounds = self.options.dtype, self.options.rounds
        for name, arm in list(self.arms.items()):
            self.progress.say(f"checking {name}")
            if (found := self._fits(name, arm.figures)) is not None:
                self.rows[name]["check"] = found
        self._without_base()
        for name, arm in list(self.arms.items()):
            base = self.rows[name]["base"]
            checks = {each: self.rows[each]["check"] for each in (base, name)}
            try:
                require_equal(checks, TOLERANCE[dtype], loss=LOSS_FLOOR[dtype])
            except CheckFailed as error:
                if isinstance(arm, TrainerArm):
                    raise
                self._skip(name, str(error))
        warm: dict[str, float] = {}
        for name, arm in list(self.arms.items()):
            self.progress.say(f"first step and peak memory: {name}")
            if (found := self._fits(name, lambda arm=arm: arm.first(self.clock))) is not None:
                warm[name], self.rows[name]["peak_mib"] = found
        self._without_base()
        gc.collect()
        gc.freeze()  # what is there stays: the collections before each sample look at what came later
        own = {name: [] for name in self.arms}
        self.samples |= own

        def before(name: str, number: int) -> None:
            left = {name: warm[name] for name in own if name in self.arms}
            self.progress.round(name, number, rounds, own, left)

        try:
            alternate({n: lambda n=n: self._seconds(n) for n in own}, rounds=rounds, samples=own, before=before)
        finally:
            gc.unfreeze()
            self.keep_whole_rounds()

    def _seconds(self, name: str) -> float:
        """Seconds of one sample; NaN of an arm that failed in an earlier round: the others go on."""
        gc.collect()
        arm = self.arms.get(name)
        seconds = None if arm is None else self._fits(name, lambda: arm.seconds(self.clock))
        if arm is None or seconds is None:
            return math.nan
        self.phases.setdefault(name, []).append(arm.phases())
        if isinstance(arm, TrainerArm) and (cut := arm.logs.get("out_of_memory")):
            self.rows[name]["note"] = f"memory ran out {cut:g} times: packs were made smaller"
        return seconds

    def keep_whole_rounds(self) -> None:
        """Put samples and phases into the rows: of whole rounds only, so that sample i is of round i."""
        taken = {name: samples for name, samples in self.samples.items() if name in self.rows and samples}
        whole = min(map(len, taken.values()), default=0)
        for name in list(self.rows):
            if name not in taken or self.rows[name]["base"] not in taken:
                self.rows.pop(name)
                continue
            each = self.phases.get(name, [])[:whole]
            known = dict.fromkeys(phase for of in each for phase in of)
            phases = {phase: [of.get(phase, 0.0) for of in each] for phase in known}
            self.rows[name] |= {"seconds": taken[name][:whole], "phases": phases}

    def _measure_grid(self) -> None:
        """Measure naive and all on other group and image sizes, each cell a session of its own."""
        changed = {"arms": ["naive", "all"], "peers": [], "grid": False, "memory": False}
        options = argparse.Namespace(**{**vars(self.options), **changed})
        options.rounds = min(GRID_ROUNDS, options.rounds)
        for size, side in product(*GRID.get(options.shape, LARGE_GRID)):
            shape = replace(SHAPES[options.shape], num_generations=size, image_px=side)
            figures = new_figures(options, shape)
            Session(options, shape, self.folder, self.progress, figures).measure()
            seconds = {name: row["seconds"] for name, row in figures["arms"].items()}
            cell = {"num_generations": size, "prompt_tokens": figures["sizes"]["prompt_tokens"], "seconds": seconds}
            self.figures["grid"] += [cell] if "all" in seconds else []
            self.figures["skipped"] |= {f"grid {size} x {side}: {k}": v for k, v in figures["skipped"].items()}

    def close(self) -> None:
        """End the processes of peers, and let go of model, optimizer and trainers."""
        for arm in self.arms.values():
            if isinstance(arm, PeerArm):
                arm.kill()
        self.arms.clear()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()
