"""The native engine: images encoded once, prompts prefilled once in one packed row, their KV read by all branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmr1.models.attention import PackedAttention
from vlmr1.models.features import encode
from vlmr1.packing import unique_images
from vlmr1.rollout.engine import RolloutEngine, stop_ids
from vlmr1.rollout.sampling import SamplingSettings, choose, uniform
from vlmr1.types import Prompt
from vlmr1_kernels import PrefixLayout, shared_prefix_decode


class DecodeAttention:
    """One prefix KV a group, one suffix KV a branch; `step` counts the tokens already in the suffixes."""

    def __init__(self, prefill: PackedAttention, branches: int, capacity: int):
        lengths = prefill.layout.prompt_lengths
        self.prefix_lengths = torch.tensor(lengths, device=prefill.kept[0][0].device)
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffix: dict[int, tuple[Tensor, Tensor]] = {}
        self.step = 0
        for layer, (k, v) in prefill.kept.items():
            self.prefix[layer] = (_padded(k, lengths), _padded(v, lengths))  # [P, Hkv, Lmax, Dh]
            shape = (branches, k.shape[1], capacity, k.shape[3])
            self.suffix[layer] = (k.new_zeros(shape), v.new_zeros(shape))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        suffix_k, suffix_v = self.suffix[layer]
        suffix_k[:, :, self.step] = k[:, :, 0]
        suffix_v[:, :, self.step] = v[:, :, 0]
        used = self.step + 1
        out = shared_prefix_decode(
            q[:, :, 0],
            *self.prefix[layer],
            self.prefix_lengths,
            suffix_k[:, :, :used],
            suffix_v[:, :, :used],
            used,
            scale=scale,
        )
        return out[:, :, None]


def _padded(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """[1, Hkv, L, Dh] -> [P, Hkv, Lmax, Dh]."""
    rows = packed[0].transpose(0, 1).split(list(lengths))
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2).contiguous()


class NativeEngine(RolloutEngine):
    """Decodes all branches of all prompts together, one token a step, until the last has ended."""

    def draw(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = self.model.device
        branches = len(prompts) * num_generations
        prefill, hidden = self._prefill(prompts)
        decode = DecodeAttention(prefill, branches, settings.max_completion_length)
        prefill.kept.clear()
        head = self.adapter.head(self.model)
        banned = torch.tensor(self.adapter.placeholder_ids(self.model, self.tokenizer), device=device)
        stops = torch.tensor(stop_ids(self.model), device=device)
        first = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(num_generations)
        prompt_key = np.repeat([p.sample.index for p in prompts], num_generations)
        branch_key = np.tile(np.arange(num_generations), len(prompts))
        logits = head(hidden).repeat_interleave(num_generations, 0)  # [B, V]
        ended = torch.zeros(branches, dtype=torch.bool, device=device)
        columns = []
        for position in range(settings.max_completion_length):
            draws = uniform(settings.seed, step, prompt_key, branch_key, position)
            columns.append(choose(logits, banned, settings, draws))
            tokens = columns[-1][0]
            ended |= torch.isin(tokens, stops)
            if position + 1 == settings.max_completion_length or bool(ended.all()):
                break
            decode.step = position
            positions = (first + position).expand(len(prompts[0].positions), -1)[..., None]  # [K, B, 1]
            hidden = self.adapter.hidden(self.model, tokens[:, None], positions, [], shared=decode)
            logits = head(hidden[:, 0])
        tokens, logp, sampling_logp = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
        return tokens, logp, sampling_logp

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[PackedAttention, Tensor]:
        """All prompts in one row; returns their keys and values and the last hidden state of each [P, D]."""
        device = self.model.device
        lengths = tuple(len(p.input_ids) for p in prompts)
        prefill = PackedAttention(PrefixLayout(lengths, ((),) * len(prompts)), keep=True)
        images, paths, image_ids = unique_images(prompts)
        with self.adapter.attention(self.model):
            features = encode(self.adapter, self.model, paths, images, self.features)
        hidden = self.adapter.hidden(
            self.model,
            torch.cat([p.input_ids for p in prompts])[None].to(device),
            torch.cat([p.positions for p in prompts], dim=1)[:, None].to(device),
            [features[i] for i in image_ids],
            shared=prefill,
        )
        return prefill, hidden[0, torch.tensor(lengths).cumsum(0) - 1]
