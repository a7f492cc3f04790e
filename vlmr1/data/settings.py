"""Settings of data files and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlmr1.data.templates import TEMPLATES, question_text
from vlmr1.errors import faults_of
from vlmr1.types import Settings, setting


@dataclass
class DataSettings(Settings):
    """The rows that a run reads, and their conversion to prompts."""

    group = "Data"
    shared = ("seed", "data_seed")

    data_file_paths: list[str] = setting([], "JSON lines, JSON, parquet, data set folders or hub ids")
    image_folders: list[str] = setting([], "one for each data file, one for all, or none where rows hold their images")
    prompt_column: str = setting("prompt", "column of the prompt in rows in TRL's format")
    solution_column: str = setting("solution", "column of the solution in rows in TRL's format")
    question_template: str = setting("rec", f"{', '.join(TEMPLATES)}, or a text with {{question}} in it")
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

    def check(self) -> Iterator[str]:
        yield from self.at_least(1, "max_prompt_length")
        if self.overlong_prompts == "filter" and self.max_prompt_length is None:
            yield "overlong_prompts=filter needs max_prompt_length"
        if not 0 <= self.val_split_ratio < 1:
            yield f"val_split_ratio is {self.val_split_ratio}: it must be at least 0 and below 1"
        for name in ("min_pass_rate", "max_pass_rate"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                yield f"{name} is {value:g}: it must be between 0 and 1"
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            yield f"min_pass_rate is {low:g}: it is above max_pass_rate, {high:g}"
        yield from faults_of(lambda: question_text(self.question_template))
