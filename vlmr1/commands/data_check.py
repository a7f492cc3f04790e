"""`vlmr1 data check`: report every fault of data files with its line, without training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from vlmr1.commands.prompt_lengths import Measure, processor_of, prompt_measure
from vlmr1.data.box_coordinates import BoxCoordinates, Setting
from vlmr1.data.faults import RowFault
from vlmr1.data.findings import Fault, Findings, as_fault
from vlmr1.data.images import image_faults
from vlmr1.data.mixture import EVERYTHING, Mixture
from vlmr1.data.samples import Columns, Samples
from vlmr1.data.sources import open_sources, split_names
from vlmr1.errors import DataError, SettingError
from vlmr1.lifecycle.renamed import current_value
from vlmr1.models.settings import LIMITS
from vlmr1.rewards.check import check_box_of_image
from vlmr1.rewards.judge import Judge
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.question import Question
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.rewards.settings import DEFAULT_METHOD, DEFAULT_REWARDS, MODES, RewardSettings
from vlmr1.types import ImageRef, Sample

UNASKED = Judge("http://localhost", "none")  # rows of the method llm need one; a check asks it nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", help="JSON or Parquet files, directories of save_to_disk, OWNER/NAME@SPLIT")
    parser.add_argument("--data_file_paths", nargs="+", default=[], help="the same, as in training")
    parser.add_argument(
        "--images",
        "--image_folders",
        nargs="*",
        default=[],
        help="image folders: one for each data file, or one for all",
    )
    parser.add_argument("--question_template", default="auto", help="as in training")
    parser.add_argument("--reward_funcs", nargs="*", default=[], help="rewards that must be able to score each row")
    parser.add_argument("--accu_reward_method", nargs="+", default=[DEFAULT_METHOD], help="one, or one for each file")
    mode = partial(current_value, "reward_mode")
    parser.add_argument("--reward_mode", type=mode, choices=MODES, default="strict", help="as in training")
    parser.add_argument("--model", help="count the tokens of each prompt with this model's processor")
    parser.add_argument("--max_prompt_length", type=int, help="with --model: a longer prompt is a fault")
    for name in LIMITS:
        parser.add_argument(f"--{name}", type=int, help="with --model: as in training")
    parser.add_argument(
        "--box_coordinates",
        choices=get_args(Setting),
        default="auto",
        help="original: solutions need not be in pixels; with --model: whether boxes can be converted to pixels",
    )
    parser.add_argument("--sampling_strategy", nargs="*", default=[], help="check the rows that training takes")
    parser.add_argument("--data_weights", nargs="*", type=float, default=[], help="as in training")
    parser.add_argument("--data_seed", type=int, default=Mixture.seed, help="of training: its data_seed, or seed")
    parser.add_argument("--prompt_column", default=Columns.prompt)
    parser.add_argument("--solution_column", default=Columns.solution)
    parser.add_argument("--image_column", default=Columns.image)
    parser.add_argument("--system_prompt", help="as in training")
    parser.add_argument("--images_outside_folders", nargs="?", const="true", choices=("true", "false"), default="false")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print what is wrong and how long the prompts are; the exit status: 1 where there is a fault."""
    given = [name for name in ("max_prompt_length", *LIMITS) if getattr(options, name) is not None]
    given += ["box_coordinates"] * (options.box_coordinates in ("resized", "thousand"))
    if given and options.model is None:
        raise SettingError(f"--{given[0]} needs --model: it concerns the model's processor")
    files = [*options.files, *options.data_file_paths]
    if not files:
        raise SettingError("no data file is given: vlmr1 data check FILE [FILE ...] [--images FOLDER ...]")
    methods = [name for joint in options.accu_reward_method for name in joint.split(":")]
    settings = RewardSettings(mode=options.reward_mode, accu_reward_method=methods[0], judge=UNASKED)
    measure, family = None, None
    if settings.mode == "strict":
        settings = replace(settings, boxes=BoxCoordinates(pixels=options.box_coordinates != "original"))
    if options.model is not None:
        processor, family = processor_of(options.model, {name: getattr(options, name) for name in LIMITS})
        measure = prompt_measure(processor)
        if options.reward_funcs or options.box_coordinates != "auto":
            settings = settings.with_boxes(options.box_coordinates, family, processor.image_processor)
    question = Question(options.question_template, options.reward_funcs or DEFAULT_REWARDS, methods[0], family)
    findings = check_data(
        files,
        options.images,
        question=question,
        rewards=[get_reward(reward, settings) for reward in options.reward_funcs],
        checks=[] if options.reward_funcs else [partial(check_box_of_image, settings=settings)],
        measure=measure,
        max_prompt_length=options.max_prompt_length,
        columns=Columns(
            options.prompt_column,
            options.solution_column,
            options.image_column,
            options.system_prompt,
            options.images_outside_folders == "true",
        ),
        defaults=columns_of_files(len(split_names(files)), methods),
        mixture=Mixture(options.sampling_strategy, options.data_weights, options.data_seed),
    )
    print(findings.text())
    return findings.status


def check_data(
    data_file_paths: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    *,
    question: str | Question = "{question}",
    rewards: Sequence[str | Reward] = (),
    checks: Sequence[Callable[[Sample], None]] = (),
    measure: Measure | None = None,
    max_prompt_length: int | None = None,
    columns: Columns | None = None,
    defaults: Sequence[Mapping[str, Any]] = (),
    mixture: Mixture = EVERYTHING,
) -> Findings:
    """Read every row, decode each distinct image once, run the checks and those of the rewards, measure the prompts.

    `defaults` are columns for the rows of each file that lack them. A fault of an image is reported for the first row
    that names it. SettingError for files, folders and rewards that do not exist; faults of rows do not."""
    checks = [*checks, *(reward.check for reward in map(get_reward, rewards) if reward.check)]
    if isinstance(question, Question):
        checks.append(question.count)
    sources = open_sources(data_file_paths, image_folders, mixture)
    filled = [source for source in sources if len(source[0])]
    of_filled = [each for each, (rows, _) in zip(defaults, sources, strict=True) if len(rows)] if defaults else []
    findings = Findings()
    if filled:
        samples = Samples(filled, question, columns or Columns(), defaults=of_filled)
        findings = _Checker(samples, checks, measure, max_prompt_length).run()
        findings.header = [] if isinstance(question, str) else samples.describe()
    empty = [rows.name for rows, _ in sources if not len(rows)]
    findings.faults += [Fault(name, "empty file", "no rows in this file") for name in empty]
    return findings


@dataclass
class _Checker:
    """A pass over the rows; images are decoded in threads while the next rows are read."""

    samples: Samples
    checks: Sequence[Callable[[Sample], None]]
    measure: Measure | None
    max_prompt_length: int | None
    findings: Findings = field(default_factory=Findings)
    found: list[tuple[int, Fault]] = field(default_factory=list)  # with the row's index
    index_of: dict[str, int] = field(default_factory=dict)  # by "file:line", of rows with images

    def run(self) -> Findings:
        self.findings.rows = len(self.samples)
        for fault in image_faults(self._images()):
            self.findings.images += 1
            if fault is not None:
                self.found.append((self.index_of[fault.source], as_fault(fault, fault.source)))
        self.findings.faults = [fault for _, fault in sorted(self.found, key=lambda each: each[0])]
        return self.findings

    def _images(self) -> Iterator[tuple[ImageRef, str]]:
        """Yield the images of all rows, and collect the other faults of the rows."""
        for index in tqdm(self.samples.indices, desc="checking rows", delay=1, disable=None):
            source = self.samples.source(index)
            errors: list[DataError] = []
            try:
                sample = self.samples.sample(index, errors.append)
            except DataError as error:
                self.found.append((index, as_fault(error, source)))
                continue
            self.findings.tally.add(sample)
            for check, each in ((check, each) for check in self.checks for each in sample.each_solution()):
                try:
                    check(each)
                except DataError as error:
                    errors.append(error)
            if sample.images:
                self.index_of[source] = index
                yield from ((image, source) for image in sample.images)
            if self.measure is not None and not errors:
                errors += self._length_faults(sample, self.measure)
            self.found += [(index, as_fault(error, source)) for error in errors]

    def _length_faults(self, sample: Sample, measure: Measure) -> list[DataError]:
        try:
            length = measure(sample)
        except DataError:  # an image, reported where it is decoded
            return []
        except ValueError as error:  # an image that the processor refuses
            return [RowFault(str(error), "prompt")]
        self.findings.lengths.append(length)
        limit = self.max_prompt_length
        if limit is None or length <= limit:
            return []
        return [RowFault(f"the prompt has {length} tokens, max_prompt_length is {limit}", "prompt length")]
