"""Samples -> prompts: chat template, tokens, image tensors, positions."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from vlmr1.data.findings import NAMED, left_out_message
from vlmr1.data.images import MIN_SIDE, encode_image, open_image
from vlmr1.data.pass_rates import within_pass_rates
from vlmr1.data.samples import Samples
from vlmr1.errors import DataError, SettingError
from vlmr1.models.family import ModelFamily
from vlmr1.types import ImageInputs, ImageRef, Prompt, Sample

logger = logging.getLogger(__name__)
THINK_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


class PromptBuilder:
    """Tokenize a Sample with its model's processor; each image is read and held once."""

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        processor: Any,
        *,
        max_prompt_length: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.family = family
        self.processor = processor
        self.max_prompt_length = max_prompt_length
        self.template_kwargs = dict(template_kwargs or {})  # variables of the chat template

    def text(self, messages: Sequence[Mapping[str, Any]], *, opens: bool = True) -> str:
        """The chat template's text of messages, up to the beginning of the model's turn where one `opens`."""
        options = {"tokenize": False, "add_generation_prompt": opens, **self.template_kwargs}
        return self.processor.apply_chat_template(messages, **options)

    def __call__(self, sample: Sample) -> Prompt:
        text = self.text(sample.messages)
        images = [open_image(path, sample.source) for path in sample.images]
        start = self.processor.tokenizer.bos_token
        special = not (start and text.startswith(start))  # the template may contain the start token
        options = {"add_special_tokens": special, "return_tensors": "pt"}
        try:
            inputs = self.processor(text=[text], images=images or None, **options)
        except ValueError as error:  # for example an extreme aspect ratio
            raise DataError(f"{sample.source}: the processor refuses the row: {error}") from error
        input_ids = inputs["input_ids"][0]
        self._check(sample, input_ids)
        split = self.family.split_images(self.model, inputs, len(images))
        positions = self.family.positions(self.model, input_ids, split)
        opening = THINK_OPENING.search(text)
        return Prompt(sample, input_ids, positions, split, opening[0] if opening else "")

    def dummy_image(self) -> tuple[ImageRef, ImageInputs]:
        """A small black image, and what the processor makes of it: for passes that have none and call the tower."""
        image = encode_image(Image.new("RGB", (2 * MIN_SIDE, 2 * MIN_SIDE)), "dummy image")
        message = {"role": "user", "content": [{"type": "image"}]}
        template_kwargs = self.template_kwargs
        builder = PromptBuilder(self.model, self.family, self.processor, template_kwargs=template_kwargs)  # no limit
        prompt = builder(Sample([message], (image,), "", "dummy image", -1))
        return image, prompt.images[0]

    def _check(self, sample: Sample, input_ids: Any) -> None:
        if self.max_prompt_length is not None and len(input_ids) > self.max_prompt_length:
            limit = f"max_prompt_length is {self.max_prompt_length}"
            raise DataError(f"{sample.source}: the prompt has {len(input_ids)} tokens, {limit}")


def without_overlong(samples: Sequence[Sample], builder: PromptBuilder, limit: int) -> Sequence[Sample]:
    """Return the samples whose prompts have at most `limit` tokens; each prompt is tokenized once to measure it."""
    kept, first = [], []
    for sample in tqdm(samples, desc="measuring prompts", delay=2, disable=None, leave=False):
        length = len(builder(sample).input_ids)
        if length <= limit:
            kept.append(sample.index)
        elif len(first) < NAMED:
            first.append(f"{sample.source} ({length} tokens)")
    if not kept:
        raise SettingError(f"max_prompt_length is {limit}: every one of the {len(samples)} prompts is longer")
    if first:
        why = f"their prompts have more than {limit} tokens"
        how = f"`vlmr1 data check` with --model and --max_prompt_length {limit} lists all"
        logger.warning("%s", left_out_message(first, len(samples) - len(kept), len(samples), why, how))
    if isinstance(samples, Samples):
        return samples.select(kept)
    within = set(kept)
    return [sample for sample in samples if sample.index in within]


def without_left_out(samples: Sequence[Sample], builder: PromptBuilder, settings: Any) -> Sequence[Sample]:
    """Return the samples without those that the pass rates or `overlong_prompts` leave out."""
    samples, _ = within_pass_rates(samples, settings)
    if settings.overlong_prompts == "filter" and settings.max_prompt_length is not None:
        samples = without_overlong(samples, builder, settings.max_prompt_length)
    return samples


class PromptDataset(Dataset[Prompt]):
    """Prompts by index, tokenized on access, in the loader's workers where it has some."""

    def __init__(self, samples: Sequence[Sample], builder: PromptBuilder):
        self.samples = samples
        self.builder = builder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Prompt:
        return self.builder(self.samples[index])

    def indices(self) -> list[int]:
        """The `Sample.index` of each row."""
        if isinstance(self.samples, Samples):
            return list(self.samples.indices)
        return [sample.index for sample in self.samples]

    def of_sample(self, index: int) -> Prompt:
        """The prompt of the sample of this `Sample.index`."""
        if isinstance(self.samples, Samples):
            return self.builder(self.samples.sample(index))
        return self.builder(next(sample for sample in self.samples if sample.index == index))
