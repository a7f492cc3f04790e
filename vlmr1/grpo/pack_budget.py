"""How many tokens a pack may have: the setting, or less where memory ran out."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from vlmr1.errors import MemoryShort
from vlmr1.grpo.packing import halves, tokens_of
from vlmr1.types import Pack

logger = logging.getLogger(__name__)
T = TypeVar("T")
PER_TOKEN = ("old_logp", "ref_logp", "trust_logp")  # of a Pack, [N]: what is computed after it was made


class PackTooLarge(Exception):
    """Memory ran out in a pass over this pack."""

    def __init__(self, pack: Pack, message: str):
        super().__init__(message)
        self.pack = pack


class PackBudget:
    """Tokens a pack may have, `tokens_per_pack` at first; each time that memory runs out, what half the pack needs.

    It never grows again in a run, and is part of its checkpoints: a run that is resumed packs as it did before."""

    def __init__(self, tokens_per_pack: int):
        self.tokens = tokens_per_pack
        self.limit: int | None = None  # of a row that is not packed too, once memory ran out
        self.out_of_memory = 0  # times

    def shrink(self, failed: PackTooLarge) -> None:
        """Less than the pack that failed has. MemoryShort where it is a single completion."""
        groups = failed.pack.groups
        self.out_of_memory += 1
        before = sum(map(tokens_of, groups))
        parts = halves(groups)
        if len(parts) == 1 or max(sum(map(tokens_of, part)) for part in parts) >= before:
            prompt, completion = groups[0].prompt, groups[0].completions[0]
            raise MemoryShort(
                f"out of memory: a pass over one completion of {len(completion.token_ids)} tokens with its prompt of "
                f"{len(prompt.input_ids)}, of the row {prompt.sample.source}, does not fit, and less than that no "
                f"tokens_per_pack can ask for: lower max_completion_length or max_prompt_length, or set "
                f"gradient_checkpointing. {failed}"
            )
        self.limit = max(sum(map(tokens_of, part)) for part in parts)
        self.tokens = min(self.tokens, self.limit)
        logger.warning(
            "out of memory in a pass over %d tokens: it is made again in smaller packs, and tokens_per_pack is %d "
            "from now on (%s)",
            before,
            self.tokens,
            failed,
        )

    # For checkpoints

    def save(self, path: Path) -> None:
        """Write what differs from the settings, if anything does."""
        if self.limit is not None:
            path.write_text(json.dumps({"tokens": self.tokens, "limit": self.limit, "times": self.out_of_memory}))

    def load(self, path: Path) -> None:
        """Take back what `save` wrote, if it wrote anything."""
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.tokens, self.limit, self.out_of_memory = saved["tokens"], saved["limit"], saved["times"]


def guarded(pack: Pack, run: Callable[[Pack], T]) -> T:
    """run(pack); PackTooLarge where memory runs out, which holds nothing of the pass that failed."""
    try:
        return run(pack)
    except torch.OutOfMemoryError as error:
        message = str(error).partition("\n")[0]
    raise PackTooLarge(pack, message)  # outside: its traceback does not keep the activations alive


def free_memory() -> None:
    """Give back what a failed pass left behind, so that a smaller one finds whole blocks."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def carried_over(packs: Sequence[Pack], before: Sequence[Pack]) -> list[Pack]:
    """The packs with the log-probs that other packs of the same completions have."""
    known = log_probs(before)
    return [with_log_probs(pack, known) for pack in packs]


Known = dict[int, dict[str, torch.Tensor | None]]


def log_probs(packs: Sequence[Pack]) -> Known:
    """By the id of a completion its part [C] of everything in PER_TOKEN; None where the pack has none."""
    known: Known = {}
    for pack in packs:
        completions = [completion for group in pack.groups for completion in group.completions]
        lengths = [len(completion.token_ids) for completion in completions]
        values = {name: getattr(pack, name) for name in PER_TOKEN}
        parts = {n: [None] * len(lengths) if v is None else v.split(lengths) for n, v in values.items()}
        for i, completion in enumerate(completions):
            known[id(completion)] = {name: part[i] for name, part in parts.items()}
    return known


def with_log_probs(pack: Pack, known: Known) -> Pack:
    """The pack with what is known of its completions; a value that one of them lacks is None."""
    each = [known[id(completion)] for group in pack.groups for completion in group.completions]
    return replace(pack, **{name: _joined([values[name] for values in each]) for name in PER_TOKEN})


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None
