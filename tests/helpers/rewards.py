"""Rows and groups of completions, made by hand."""

import torch

from vlmr1.types import Completion, Group, Prompt, Sample

CAT = '<answer>{"bbox_2d": [0, 0, 10, 10], "label": "cat"}</answer>'


def sample(line=1, solution=CAT, images=(), **columns):
    message = {"role": "user", "content": f"question {line}"}
    return Sample([message], tuple(images), solution, f"data.jsonl:{line}", line - 1, columns)


def group(row, *texts, images=()):
    prompt = Prompt(row, torch.tensor([1, 2]), torch.zeros(3, 2, dtype=torch.int64), tuple(images))
    completions = (Completion(torch.tensor([3] * len(text)), None, None, text, "stop") for text in texts)
    return Group(prompt, tuple(completions))


def answered(text):
    return f"<think>so</think><answer>{text}</answer>"


def values(groups):
    """Rewards [G][R] of each group."""
    return [group.rewards.tolist() for group in groups]


def box(*numbers, label="cat"):
    return {"bbox_2d": list(numbers), "label": label}
