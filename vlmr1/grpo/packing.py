"""Groups -> packed rows with positions and branch layout, under a token budget.

A pack is one row: the prompts first, each once, then the branches. A completion of C tokens is a branch of C-1:
its first token is predicted by the prompt's last row, and nothing is predicted from its last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmr1.models.features import all_images, unique_images
from vlmr1.types import Completion, Group, Pack
from vlmr1_kernels import PrefixLayout

if TYPE_CHECKING:
    from vlmr1.types import ImageInputs, ImageRef


def plan_packs(
    groups: Sequence[Group], *, tokens_per_pack: int, share_prompt: bool, pack: bool, limit: int | None = None
) -> list[list[Group]]:
    """Assign groups to rows: first fit, in order; `pack=False`: one group a row.

    A group that exceeds the budget is split by branches, its prompt repeated; with `share_prompt=False` every
    branch is a group of its own. `limit` applies only if both are false; None means no limit."""
    rows: list[list[Group]] = []
    free: list[int] = []
    for group in groups:
        parts = _split(group, tokens_per_pack) if share_prompt else _split(group, 0)
        if not pack:
            rows += [[part] for part in parts] if share_prompt else _within(parts, limit)
            continue
        for part in parts:
            size = tokens_of(part)
            at = next((i for i, room in enumerate(free) if size <= room), None)
            if at is None:
                rows.append([])
                free.append(tokens_per_pack)
                at = len(rows) - 1
            rows[at].append(part)
            free[at] -= size
    return rows


def repeated_prompt_tokens(plan: Sequence[Sequence[Group]]) -> int:
    """Prompt tokens of a plan that are computed more than once: of groups that were split."""
    prompts = [group.prompt for row in plan for group in row]
    distinct = {id(prompt): prompt for prompt in prompts}
    return sum(len(p.input_ids) for p in prompts) - sum(len(p.input_ids) for p in distinct.values())


def select(groups: Sequence[Group], keep: Callable[[Completion, float], bool]) -> list[Group]:
    """The completions that `keep` is true for, given their advantages (0 before they are known), and their groups."""
    left = []
    for group in groups:
        advantages = [0.0] * len(group.completions) if group.advantages is None else group.advantages.tolist()
        pairs = zip(group.completions, advantages, strict=True)
        which = [i for i, (completion, advantage) in enumerate(pairs) if keep(completion, advantage)]
        if len(which) == len(group.completions):
            left.append(group)
        elif which:
            left.append(_branches(group, which))
    return left


def with_signal(groups: Sequence[Group], *, skip_zero_advantage: bool, mask_truncated: bool) -> list[Group]:
    """Return the completions that contribute to the loss: `skip_zero_advantage` drops those of advantage 0,
    `mask_truncated` those that reached the length limit."""
    return select(
        groups,
        lambda completion, advantage: (
            not (skip_zero_advantage and advantage == 0)
            and not (mask_truncated and completion.finish_reason == "length")
        ),
    )


def first_completion(groups: Sequence[Group]) -> Group:
    """The first group with its first completion only: the content of dummy packs."""
    return _branches(groups[0], [0])


def dummy_pack(groups: Sequence[Group]) -> Pack:
    """Zero-weight pack of one completion: its pass adds gradients of 0."""
    return replace(make_pack([first_completion(groups)]), weight=0.0)


def make_pack(groups: Sequence[Group], *, share_vision: bool = True) -> Pack:
    """One packed row of these groups."""
    completions = [c for group in groups for c in group.completions]
    prompts = [group.prompt for group in groups]
    branches = [c.token_ids[:-1] for c in completions]
    first = torch.tensor([group.prompt.next_position for group in groups for _ in group.completions])
    position_dims = len(prompts[0].positions)
    starts = zip(first, branches, strict=True)
    branch_positions = [(start + torch.arange(len(b))).expand(position_dims, -1) for start, b in starts]
    images, refs, image_ids = unique_images(prompts) if share_vision else all_images(prompts)
    layout = PrefixLayout(
        tuple(len(p.input_ids) for p in prompts),
        tuple(tuple(len(c.token_ids) - 1 for c in group.completions) for group in groups),
    )
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    return Pack(
        input_ids=torch.cat([p.input_ids for p in prompts] + branches),
        positions=torch.cat([p.positions for p in prompts] + branch_positions, dim=1),
        layout=layout,
        images=images,
        image_refs=refs,
        image_ids=image_ids,
        rows=_predicting_rows(layout),
        targets=torch.cat([c.token_ids for c in completions]),
        seq_ids=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        advantages=_concatenate([group.advantages for group in groups]),
        old_logp=_concatenate([c.old_logp for c in completions]),
        ref_logp=_concatenate([c.ref_logp for c in completions]),
        rollout_logp=_concatenate([c.logp for c in completions]),
        importance_denominator=_concatenate([c.importance_denominator for c in completions]),
        groups=tuple(groups),
    )


def _predicting_rows(layout: PrefixLayout) -> Tensor:
    """[N]: for each completion the last row of its prompt, then the rows of its branch."""
    rows: list[Tensor] = []
    prompt_end, branch = 0, sum(layout.prompt_lengths)
    for prompt_length, branch_lengths in zip(layout.prompt_lengths, layout.branch_lengths, strict=True):
        prompt_end += prompt_length
        for length in branch_lengths:
            rows += [torch.tensor([prompt_end - 1]), torch.arange(branch, branch + length)]
            branch += length
    return torch.cat(rows)


def with_dummy_image(pack: Pack, ref: ImageRef, image: ImageInputs) -> Pack:
    """The pack with this image to encode where it has none, so that every rank calls the tower in every pass."""
    return pack if pack.images else replace(pack, images=(image,), image_refs=(ref,))


def tokens_of(group: Group) -> int:
    """Return the tokens of a group in a pack: its prompt and its branches."""
    return len(group.prompt.input_ids) + sum(len(c.token_ids) - 1 for c in group.completions)


def halves(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in two parts as equal in tokens as their order allows, a single one by branches; a single branch is one
    part."""
    if len(groups) == 1:
        count = len(groups[0].completions)
        if count == 1:
            return [list(groups)]
        return [[_branches(groups[0], list(range(count // 2)))], [_branches(groups[0], list(range(count // 2, count)))]]
    sizes = [tokens_of(group) for group in groups]
    at = min(range(1, len(groups)), key=lambda i: max(sum(sizes[:i]), sum(sizes[i:])))
    return [list(groups[:at]), list(groups[at:])]


def _within(parts: list[Group], limit: int | None) -> list[list[Group]]:
    """Runs of groups within the limit, at least one each."""
    rows: list[list[Group]] = [[]]
    for part in parts:
        if limit is not None and rows[-1] and sum(map(tokens_of, rows[-1])) + tokens_of(part) > limit:
            rows.append([])
        rows[-1].append(part)
    return rows


def _split(group: Group, budget: int) -> list[Group]:
    """Runs of branches that fit the budget with their prompt; at least one branch each."""
    runs: list[list[int]] = [[]]
    room = budget - len(group.prompt.input_ids)
    for i, completion in enumerate(group.completions):
        size = len(completion.token_ids) - 1
        if runs[-1] and size > room:
            runs.append([])
            room = budget - len(group.prompt.input_ids)
        runs[-1].append(i)
        room -= size
    return [group] if len(runs) == 1 else [_branches(group, run) for run in runs]


def _branches(group: Group, which: list[int]) -> Group:
    return replace(
        group,
        completions=tuple(group.completions[i] for i in which),
        rewards=None if group.rewards is None else group.rewards[which],
        advantages=None if group.advantages is None else group.advantages[which],
        kl=None if group.kl is None else group.kl[which],
    )


def _concatenate(parts: Sequence[Tensor | None]) -> Tensor | None:
    """None where one is missing; what came from a checkpoint or another rank may be in host memory."""
    known = [part for part in parts if part is not None]
    return torch.cat([part.to(known[0].device) for part in known]) if len(known) == len(parts) else None
