"""The naive forward: G separate padded sequences, the image encoded for each, every column projected.

This is what `share_vision=false share_prompt=false pack=false` trains with, and the oracle of the packed forward: it
uses the model's own attention over a padded batch, full logits, and plain log-softmax.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmr1.grpo.loss import PackLoss
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import autocast
from vlmr1.models.family import ModelFamily
from vlmr1.models.fused_layers import fused_layers
from vlmr1.types import Pack


class NaivePolicy(PackedPolicy):
    """`PackedPolicy` whose branches are sequences with a prompt of their own."""

    def attention(self) -> AbstractContextManager[None]:
        return fused_layers(self.model, self.family.operators)

    def logprobs(self, pack: Pack) -> Tensor:
        with torch.no_grad():
            return self._forward(pack)[0]

    def loss(self, pack: Pack, objective: PackLoss) -> tuple[Tensor, dict[str, Tensor]]:
        logp, entropy = self._forward(pack, with_bonus=objective.has_entropy_bonus)
        return objective.from_logprobs(logp, pack, entropy)

    def _forward(self, pack: Pack, *, with_bonus: bool = False) -> tuple[Tensor, Tensor]:
        """[N] log-probs of the completion tokens, and the entropies [N] of what they were drawn from: with gradient
        where there is a bonus for them."""
        device = self.model.device
        input_ids, positions, mask, lengths = (x.to(device) for x in padded(pack))
        columns = int(lengths.max())
        with autocast(device, self.dtype), self.attention():
            features, nothing = self.image_features(pack)
            hidden = self.family.hidden(self.model, input_ids, positions, features, attention_mask=mask)
            hidden = hidden if nothing is None else hidden + nothing
            hidden = hidden[:, -columns - 1 : -1]  # the columns that predict the completion's
            logits = self.family.head(self.model)(hidden)  # [B, columns, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        targets = input_ids[:, -columns:]
        logp = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        real = torch.arange(columns, device=device) < lengths[:, None]
        return logp[real], _entropy(logits if with_bonus else logits.detach())[real]


def policy_for(model: Any, family: ModelFamily, args: Any, **options: Any) -> PackedPolicy:
    """The packed forward of a model, or with neither share_prompt nor pack the naive one."""
    kind = PackedPolicy if args.share_prompt or args.pack else NaivePolicy
    return kind(model, family, temperature=args.temperature, **options)


def _entropy(logits: Tensor) -> Tensor:
    """[B, C, V] -> [B, C]: -sum p log p, a sequence at a time."""
    logp = (rows.log_softmax(-1) for rows in logits.split(1))
    return torch.cat([-(rows.exp() * rows).sum(-1) for rows in logp])


def padded(pack: Pack) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, L] ids, [K, B, L] positions and [B, L] mask of a pack whose prompts have one branch each, prompts padded
    on the left and completions on the right, and the completion lengths [B]."""
    prompts = pack.layout.prompt_lengths
    lengths = torch.bincount(pack.seq_ids, minlength=len(prompts))  # [B]
    prompt_width, columns = max(prompts), int(lengths.max())
    ids, positions, mask = [], [], []
    starts = torch.tensor((0, *prompts)).cumsum(0).tolist()
    for i, (length, target) in enumerate(zip(prompts, pack.targets.split(lengths.tolist()), strict=True)):
        own = slice(starts[i], starts[i] + length)
        left, right = prompt_width - length, columns - len(target)
        before = pack.positions[:, own]  # [K, L_p]
        after = (before.max() + 1 + torch.arange(len(target))).expand(len(before), -1)
        ids.append(pad(torch.cat([pack.input_ids[own], target]), (left, right)))
        positions.append(pad(torch.cat([before, after], 1), (left, right), value=1))
        mask.append(pad(torch.ones(length + len(target), dtype=torch.long), (left, right)))
    return torch.stack(ids), torch.stack(positions, 1), torch.stack(mask), lengths
