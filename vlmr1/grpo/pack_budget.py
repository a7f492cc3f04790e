"""Budget of tokens in a pack: the setting, or less where memory ran out."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from vlmr1.errors import MemoryShort
from vlmr1.grpo.packing import halves, tokens_of
from vlmr1.types import Pack

logger = logging.getLogger(__name__)
T = TypeVar("T")
BUDGET = "pack_budget.json"  # of a checkpoint: how much smaller packs have become, where memory ran out


class PackTooLarge(Exception):
    """Memory ran out in a pass over this pack."""

    def __init__(self, pack: Pack, message: str):
        super().__init__(message)
        self.pack = pack


class PackBudget:
    """Tokens a pack may have: `tokens_per_pack` at first. Each time memory runs out, it drops to the larger half of the
    pack that failed.

    It never grows again in a run, and is part of its checkpoints: a run that is resumed packs as it did before."""

    def __init__(self, tokens_per_pack: int):
        self.tokens = tokens_per_pack
        self.limit: int | None = None  # for rows that are not packed too; None until memory first runs out
        self.out_of_memory = 0  # times

    def shrink(self, failed: PackTooLarge) -> None:
        """Lower the budget below the pack that failed. MemoryShort where it is a single completion."""
        groups = failed.pack.groups
        self.out_of_memory += 1
        before = sum(map(tokens_of, groups))
        parts = halves(groups)
        if len(parts) == 1 or max(sum(map(tokens_of, part)) for part in parts) >= before:
            prompt, completion = groups[0].prompt, groups[0].completions[0]
            raise MemoryShort(
                f"out of memory: even one completion of {len(completion.token_ids)} tokens with its prompt of "
                f"{len(prompt.input_ids)}, of the row {prompt.sample.source}, exceeds the available memory, and "
                f"tokens_per_pack cannot help; lower max_completion_length or max_prompt_length, or set "
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

    def save(self, checkpoint: Path, *, writes: bool = True) -> None:
        """Write what differs from the settings, if anything does."""
        if writes and self.limit is not None:
            state = {"tokens": self.tokens, "limit": self.limit, "times": self.out_of_memory}
            (checkpoint / BUDGET).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Take back what `save` wrote, if it wrote anything."""
        if (checkpoint / BUDGET).exists():
            saved = json.loads((checkpoint / BUDGET).read_text(encoding="utf-8"))
            self.tokens, self.limit, self.out_of_memory = saved["tokens"], saved["limit"], saved["times"]


def catch_oom(pack: Pack, run: Callable[[Pack], T]) -> T:
    """Call run(pack). If memory runs out, raise PackTooLarge, which keeps no tensor of the failed pass alive."""
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
