"""Prompts and groups made by hand."""

from pathlib import Path
from typing import Any

import torch

from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import family_of
from vlmr1.types import Completion, Group, Prompt, Sample


class Maker:
    """Makes prompts and groups with random completions; everything follows from the seed."""

    def __init__(self, model: Any, processor: Any, image_files: dict[Any, Path], seed: int = 0):
        self.model, self.family = model, family_of(model)
        self.builder = PromptBuilder(model, self.family, processor)
        self.image_files = image_files
        self.random = torch.Generator().manual_seed(seed)
        self.made = 0

    def prompt(self, text: str, sizes: tuple[Any, ...] = ()) -> Prompt:
        content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}]
        images = tuple(self.image_files[size] for size in sizes)
        self.made += 1
        message = {"role": "user", "content": content}
        return self.builder(Sample([message], images, "", f"made:{self.made}", self.made))

    def group(self, prompt: Prompt, lengths: tuple[int, ...], advantages: tuple[float, ...] | None = None) -> Group:
        """Completions of these lengths; the one of the greatest length never ends."""
        vocabulary, stop = self.model.config.text_config.vocab_size, self.model.generation_config.eos_token_id[0]
        completions = []
        for length in lengths:
            ids = torch.randint(20, vocabulary, (length,), generator=self.random)
            ends = length < max(lengths)
            if ends:
                ids[-1] = stop
            logp = -5 + 0.1 * torch.randn(length, generator=self.random)
            completions.append(Completion(ids, logp, logp, "", "stop" if ends else "length"))
        given = torch.randn(len(lengths), generator=self.random) if advantages is None else torch.tensor(advantages)
        return Group(prompt, tuple(completions), torch.zeros(len(lengths), 1), given)

    def groups(self, *specs: tuple[Any, ...]) -> list[Group]:
        """Groups of: prompt, its images, lengths of completions, and advantages where they are given."""
        return [self.group(self.prompt(*spec[:2]), *spec[2:]) for spec in specs]
