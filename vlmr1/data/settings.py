"""Settings of data files and prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmr1.data.formats import Columns
from vlmr1.data.mixture import Mixture, Sampling
from vlmr1.data.templates import AUTO, TEMPLATES, question_text
from vlmr1.errors import faults_of
from vlmr1.types import Settings, setting


class _Shared(Settings):
    shared = ("seed", "data_seed")
    if TYPE_CHECKING:
        seed: int
        data_seed: int | None


@dataclass
class DataSettings(_Shared):
    """The rows that a run reads, and their conversion to prompts."""

    group = "Data"

    data_file_paths: list[str] = setting(
        [], "JSON lines, JSON, parquet, data set folders, hub ids or YAML lists of them"
    )
    image_folders: list[str] = setting(
        [], "directories, .zip or .tar files: one a data file, or one for all; none where rows hold images"
    )
    images_outside_folders: bool = setting(False, "allow names of images that lead out of image_folders")
    sampling_strategy: list[str] = setting(
        [], "rows of each data file, or of all: all, first:N, end:N or random:N, N a number or a share in percent"
    )
    data_weights: list[float] = setting([], "shares of the data files in an epoch, one for each; no row is repeated")
    streaming: bool = setting(False, "read rows while training, without a pass before; needs max_steps")
    shuffle_dataset: bool = setting(True, "draw the rows in a random order; false: in the order of the files")
    shuffle_buffer_size: int = setting(1000, "with streaming: rows of which the next one is drawn; 0: the files' order")
    prompt_column: str = setting("prompt", "column of the prompt, beside those of the known formats of rows")
    solution_column: str = setting("solution", "column of the solution; dots lead into nested values: a.b")
    image_column: str = setting("", "column of the images; default: image or images")
    system_prompt: str | None = setting(None, "system message of rows that have none")
    chat_template_kwargs: dict | str | None = setting(None, "further variables of the chat template, as JSON")
    question_template: str = setting(
        AUTO,
        f"{', '.join(TEMPLATES)}, or a text with {{question}} in it; auto: rec where accuracy is by IoU, odLength "
        "where it is by labelled boxes, gui for points, none where only own functions reward, else default",
    )
    check_images: bool = setting(True, "decode every image before training")
    val_split_ratio: float = setting(0.0, "share of the rows that are kept from training")
    max_prompt_length: int | None = setting(None, "limit of a prompt in tokens, image tokens included; nothing is cut")
    overlong_prompts: Literal["error", "filter"] = setting(
        "error", "a longer prompt stops the run, or its row is left out before the run begins"
    )
    min_pass_rate: float | None = setting(
        None, "train on rows with at least this pass_rate, a column that `vlmr1 data rate` writes"
    )
    max_pass_rate: float | None = setting(None, "train on rows with at most this pass_rate")

    @property
    def columns(self) -> Columns:
        return Columns(
            self.prompt_column,
            self.solution_column,
            self.image_column,
            self.system_prompt,
            self.images_outside_folders,
        )

    def check(self) -> Iterator[str]:
        yield from self.at_least(1, "max_prompt_length")
        if self.overlong_prompts == "filter" and self.max_prompt_length is None:
            yield "overlong_prompts=filter needs max_prompt_length"
        for text in self.sampling_strategy:
            yield from faults_of(lambda text=text: Sampling.of(text).limit if self.streaming else Sampling.of(text))
        for weight in self.data_weights:
            if not (math.isfinite(weight) and weight > 0):
                yield f"data_weights has {weight}: a weight must be above 0"
        yield from self.at_least(0, "shuffle_buffer_size")
        if self.streaming:
            if self.val_split_ratio:
                yield "val_split_ratio needs all rows, and streaming=true knows none before: use eval_data_file_paths"
            if self.overlong_prompts == "filter":
                yield "overlong_prompts=filter measures all rows before training: with streaming=true use error"
            if not self.shuffle_dataset:
                yield "shuffle_dataset has no effect with streaming: shuffle_buffer_size=0 keeps the files' order"
            if self.min_pass_rate is not None or self.max_pass_rate is not None:
                yield "min_pass_rate and max_pass_rate choose rows before training, and streaming=true knows none then"
        elif not self.is_default("shuffle_buffer_size"):
            yield "shuffle_buffer_size has no effect without streaming: all rows are shuffled"
        if not 0 <= self.val_split_ratio < 1:
            yield f"val_split_ratio is {self.val_split_ratio}: it must be at least 0 and below 1"
        for name in ("min_pass_rate", "max_pass_rate"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                yield f"{name} is {value:g}: it must be between 0 and 1"
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            yield f"min_pass_rate is {low:g}: it is above max_pass_rate, {high:g}"
        if self.question_template != AUTO:
            yield from faults_of(lambda: question_text(self.question_template))

    @property
    def mixture(self) -> Mixture:
        """The rows that are taken of each data file."""
        seed = self.seed if self.data_seed is None else self.data_seed
        return Mixture(self.sampling_strategy, self.data_weights, seed)
