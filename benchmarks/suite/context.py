"""What sections are given: the options, the model, where to say what is going on and what was left out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.attention import DTYPES
from benchmarks.device import Ceilings
from benchmarks.model import SHAPES, Shape
from benchmarks.suite import sizes
from benchmarks.suite.bed import Bed
from benchmarks.suite.energy import Joules
from benchmarks.suite.options import WITH_MODEL, Options
from benchmarks.suite.progress import Progress
from benchmarks.suite.samples import Sample
from benchmarks.suite.sizes import PROMPTS
from vlmr1.grpo.pack_budget import free_memory


class Context:
    """One run on one shape, in a folder for weights and images."""

    def __init__(self, options: Options, shape_name: str, folder: Path, ceilings: Ceilings):
        self.options, self.shape_name, self.folder, self.ceilings = options, shape_name, folder, ceilings
        self.joules = Joules(options.device)
        self.skipped: dict[str, str] = {}
        self.progress = Progress()  # of the section that is going on
        self.start = perf_counter()
        self._bed: Bed | None = None

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    def sizes(self) -> dict[str, int]:
        """The `sizes` of the result; where no section needs a model, none is made for them."""
        if set(WITH_MODEL) & set(self.options.only):
            bed = self.bed()
            return sizes.of(self.shape, bed.prompts[0], bed.model)
        return sizes.without_model(self.folder, self.shape)

    def bed(self) -> Bed:
        """The model and what goes with it, made when first asked for."""
        if self._bed is None:
            save = bool(self.options.peers) and not any(self.folder.glob("*.safetensors"))
            options = {"device": self.options.device, "dtype": DTYPES[self.options.dtype]}
            self._bed = Bed(self.folder, self.shape, prompts=PROMPTS, save=save, **options)
            gc.collect()
            gc.freeze()  # what is there stays: the collections before each sample look at what came later
        return self._bed

    def drop_bed(self) -> None:
        """Model, reference and optimizer go; `bed` makes them again. The section's rows are made by then."""
        self._bed = None
        self.progress.forget()
        gc.unfreeze()
        free_memory()

    def skip(self, section: str, reasons: Mapping[str, str]) -> None:
        """These arms of a section were left out."""
        for name, reason in reasons.items():
            self.skipped[f"{section}/{name}"] = reason
            self.print(f"{section}/{name}: left out: {reason}")

    def told(self, section: str, arms: Mapping[str, Callable[[], Sample]]) -> dict[str, Callable[[], Sample]]:
        """The arms; after the last round of each a line says its median."""
        return {name: self._told(f"{section}/{name}", arm) for name, arm in arms.items()}

    def _told(self, name: str, arm: Callable[[], Sample]) -> Callable[[], Sample]:
        samples: list[Sample] = []

        def call() -> Sample:
            samples.append(arm())
            if len(samples) == self.options.rounds:
                self.say(name, samples)
            return samples[-1]

        return call

    def say(self, name: str, samples: Sequence[Sample]) -> None:
        """An arm's line."""
        seconds = [each.seconds for each in samples]
        if not any(map(math.isnan, seconds)):  # a peer that failed says so itself
            self.print(f"{name}: {1e3 * median(seconds):.4g} ms")

    def print(self, line: str) -> None:
        print(f"[{perf_counter() - self.start:6.1f} s] {line}", flush=True)
