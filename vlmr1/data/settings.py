"""Settings of data files and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlmr1.data.formats import Columns
from vlmr1.data.templates import TEMPLATES, question_text
from vlmr1.errors import faults_of
from vlmr1.types import Settings, setting


@dataclass
class DataSettings(Settings):
    """The rows that a run reads, and their conversion to prompts."""

    group = "Data"
    shared = ("seed", "data_seed")

    data_file_paths: list[str] = setting([], "JSON lines, JSON, parquet, data set folders or hub ids")
    image_folders: list[str] = setting(
        [], "directories, .zip or .tar files: one a data file, or one for all; none where rows hold images"
    )
    images_outside_folders: bool = setting(False, "allow names of images that lead out of image_folders")
    prompt_column: str = setting("prompt", "column of the prompt, beside those of the known formats of rows")
    solution_column: str = setting("solution", "column of the solution; dots lead into nested values: a.b")
    image_column: str = setting("", "column of the images; default: image or images")
    system_prompt: str | None = setting(None, "system message of rows that have none")
    question_template: str = setting("rec", f"{', '.join(TEMPLATES)}, or a text with {{question}} in it")
    check_images: bool = setting(True, "decode every image before training")
    val_split_ratio: float = setting(0.0, "share of the rows that are kept from training")
    max_prompt_length: int | None = setting(None, "limit of a prompt in tokens, image tokens included; nothing is cut")
    overlong_prompts: Literal["error", "filter"] = setting(
        "error", "a longer prompt stops the run, or its row is left out before the run begins"
    )

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
        if not 0 <= self.val_split_ratio < 1:
            yield f"val_split_ratio is {self.val_split_ratio}: it must be at least 0 and below 1"
        yield from faults_of(lambda: question_text(self.question_template))
