"""Prompts and groups whose token ids and images count upwards."""

from pathlib import Path

import torch

from vlmr1.types import Completion, Group, Prompt, Sample


def prompt(length: int, images: tuple[str, ...] = (), start: int = 100, positions: list | None = None) -> Prompt:
    paths = tuple(Path(name) for name in images)
    inputs = tuple({"pixel_values": torch.tensor([start + i])} for i in range(len(images)))
    rows = torch.arange(length).expand(3, -1) if positions is None else torch.tensor(positions)
    return Prompt(Sample([], paths, "", "", 0), start + torch.arange(length), rows, inputs)


def group(of: Prompt, *lengths: int, start: int = 1000) -> Group:
    """Completion i holds start + 100 i, start + 100 i + 1, ...; its log-probs are minus its tokens."""
    tokens = [start + 100 * i + torch.arange(length) for i, length in enumerate(lengths)]
    completions = tuple(Completion(t, -t.float(), -2 * t.float(), str(i), "stop") for i, t in enumerate(tokens))
    count = torch.arange(float(len(lengths)))
    return Group(of, completions, torch.stack([count, -count], 1), 10 * count)
