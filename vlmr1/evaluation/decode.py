"""Greedy decoding of rows, batch by batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vlmr1.data.box_coordinates import BoxCoordinates, Setting
from vlmr1.data.boxes import Size
from vlmr1.data.images import upright_size
from vlmr1.data.prompts import PromptBuilder
from vlmr1.distributed.ranks import Ranks
from vlmr1.errors import UserError
from vlmr1.evaluation.records import Record, RecordFiles, RowRecord, append
from vlmr1.models import family_of
from vlmr1.rollout import ENGINES, SamplingSettings
from vlmr1.rollout.engine import RolloutEngine
from vlmr1.types import Group, Prompt, Sample

Decode = Callable[[Sequence[Sample], Sequence[int]], Iterable[RowRecord]]  # samples and their places in the data


class Decoder:
    """Decode each row greedily; the native engine returns the tokens of `generate`.

    A completion may depend on its batch in the last bits of a float, so batches must be the same for any number of
    processes."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_completion_length: int,
        box_coordinates: Setting = "auto",
        with_boxes: bool = True,
        engine: RolloutEngine | str = "native",
    ):
        family = family_of(model)
        made = engine
        if isinstance(made, str):
            made = ENGINES[made](model, family, processor.tokenizer, chat_template=processor.chat_template)
        self.engine: RolloutEngine = made
        self.builder = PromptBuilder(model, family, processor)
        self.sampling = SamplingSettings(max_completion_length, greedy=True)
        self.boxes = None
        if with_boxes:
            self.boxes = BoxCoordinates.of(box_coordinates, model.config.model_type, processor.image_processor)

    def groups(self, samples: Sequence[Sample]) -> list[Group]:
        """Decode one completion for each sample, together; return groups of one."""
        return self.engine.generate([self.builder(sample) for sample in samples], 1, self.sampling)

    def __call__(self, samples: Sequence[Sample], rows: Sequence[int]) -> list[Record]:
        """Decode these samples together and return their records; `rows` are their places in the data."""
        return [self.record(group, row) for group, row in zip(self.groups(samples), rows, strict=True)]

    def record(self, group: Group, row: int) -> Record:
        completion, sample = group.completions[0], group.prompt.sample
        size, extent = self._sizes(group.prompt)
        tokens = tuple(completion.token_ids.tolist())
        opening = group.prompt.think_opening
        return Record(row, sample.source, tokens, completion.text, completion.finish_reason, size, extent, opening)

    def _sizes(self, prompt: Prompt) -> tuple[Size | None, Size | None]:
        """Size and extent of the image; None unless the row has one image, since a box would be ambiguous."""
        images = prompt.sample.images
        if self.boxes is None or len(images) != 1:
            return None, None
        size = upright_size(images[0], prompt.sample.source)
        return size, self.boxes.extents(prompt)[0]


def decode_missing(
    decoder: Decode, samples: Sequence[Sample], files: RecordFiles, done: Mapping[int, RowRecord], ranks: Ranks
) -> int:
    """Decode this rank's share of the missing batches and append their records; return the number of rows decoded."""
    for row, record in done.items():
        if record.source != samples[row].source:
            raise UserError(f"{files.path}: row {row} is {record.source}, the data has {samples[row].source} there")
    mine = files.missing(done)[ranks.rank :: ranks.world_size]
    rows = sum(map(len, mine))
    hidden = None if ranks.is_first else True  # None: unless stderr is a terminal
    shown = tqdm(total=rows, desc="decoding", unit="row", file=sys.stderr, disable=hidden, position=0, leave=False)
    with shown as bar:
        for batch in mine:
            ranks.raise_failure()
            append(files.part(ranks.rank, ranks.world_size), decoder([samples[row] for row in batch], batch))
            bar.update(len(batch))
    return rows
