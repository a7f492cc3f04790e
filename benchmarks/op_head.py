"""Cases of the ops on log-probs: with the projection to the vocabulary, and on given log-probs.

N rows of B sequences of one length L (so that no padded peer pays for padding), D hidden, V vocabulary. The targets are
drawn from the policy, as a rollout draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.op_calls import FLOOR, Call, Outputs, Problem, copy_of, ours
from benchmarks.peers import losses
from benchmarks.peers.losses import SETTINGS, LogProb, objective
from vlmr1_kernels import group_advantages, grpo_loss, linear_grpo_loss, linear_logprob

SIZE = 8  # of a group
GEMMS = {"trainable": 3, "frozen": 2, "no_grad": 1}  # by what needs a gradient
ORACLE_ELEMENTS = 2**28  # logits at once


class Head:
    """Random tensors of a case, never zero. `tolerance` is that of float32 logits, `loose` that of rounded ones."""

    def __init__(self, rows: int, dim: int, vocab: int, dtype: torch.dtype, device: str, mode: str):
        if rows % SIZE:
            raise ValueError(f"rows is {rows}: it must be a multiple of {SIZE}")
        self.sequences = 8 * SIZE if rows > 1024 and rows % 64 == 0 else SIZE
        self.length, self.mode, self.dtype = rows // self.sequences, mode, dtype
        generator = torch.Generator(device).manual_seed(3)

        options = {"device": device, "generator": generator}

        def draw(hidden: Tensor) -> tuple[Tensor, Tensor]:
            log_probs = (hidden @ self.weight.T).float().log_softmax(-1)
            ids = torch.multinomial(log_probs.exp(), 1, generator=generator)  # [n, 1]
            return ids[:, 0], log_probs.gather(1, ids)[:, 0]

        self.hidden = torch.randn(rows, dim, **options).to(dtype)  # [N, D]
        self.weight = (torch.randn(vocab, dim, **options) * (3 / dim**0.5)).to(dtype)  # [V, D], logits of deviation 3
        draws = [draw(self.hidden[part]) for part in self.parts()]
        self.targets, logp = (torch.cat(each) for each in zip(*draws, strict=True))  # [N]
        self.seq_ids = torch.arange(self.sequences, device=device).repeat_interleave(self.length)
        # The mean of the advantages is not 0: else the loss would be a small difference of large numbers.
        self.advantages = group_advantages(torch.rand(self.sequences, **options), SIZE) + 0.5  # [B]
        # No ratio near 1 +- 0.2, where the rounding of a log-prob decides whether a row has a gradient.
        chance = torch.rand(4, rows, **options)
        size = 0.1 * chance[0] + 0.4 * (chance[1] < 0.3)
        self.old = logp + torch.where(chance[2] < 0.5, size, -size)
        self.ref = logp + 0.2 * torch.randn(rows, **options)
        self.upstream = torch.randn(rows, **options) / rows  # d loss / d logp for linear_logprob
        self.hidden.requires_grad_(mode != "no_grad")
        self.weight.requires_grad_(mode == "trainable")
        both = {"d_hidden": self.hidden, "d_weight": self.weight}
        self.leaves = {name: leaf for name, leaf in both.items() if leaf.requires_grad}
        self.tolerance, self.loose = (1e-4, 1e-4) if dtype == torch.float32 else (1e-2, 5e-2)
        self.flops = GEMMS[mode] * 2 * rows * dim * vocab
        written = sum(leaf.numel() for leaf in self.leaves.values())
        self.moved = (self.hidden.numel() + self.weight.numel() + written) * dtype.itemsize

    def parts(self) -> Iterator[slice]:
        """Whole sequences at a time, few enough for wide logits."""
        rows = len(self.hidden)
        step = max(1, ORACLE_ELEMENTS // len(self.weight) // self.length) * self.length
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def padded(self, rows: Tensor) -> Tensor:
        """[N, ...] as [B, L, ...]."""
        return rows.view(self.sequences, self.length, *rows.shape[1:])

    def differentiate(self, value: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(value, list(self.leaves.values()), upstream) if self.leaves else ()
        return dict(zip(self.leaves, gradients, strict=True))

    def oracle(self, part_loss: Callable[[Tensor, slice], Tensor], *, keep_logp: bool) -> Outputs:
        """Eager code in a wider dtype, some sequences at a time; `part_loss`: log-probs of some rows -> their part."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        leaves = {name: leaf.detach().to(wide).requires_grad_() for name, leaf in self.leaves.items()}
        hidden = leaves.get("d_hidden", self.hidden.to(wide))
        weight = leaves.get("d_weight", self.weight.to(wide))
        logps, total = [], torch.zeros((), dtype=wide, device=hidden.device)
        for part in self.parts():
            logp = losses.gathered(hidden[part] @ weight.T, self.targets[part])
            loss = part_loss(logp, part)
            if leaves:
                loss.backward()
            logps.append(logp.detach())
            total += loss.detach()
        results = {"logp": torch.cat(logps)} if keep_logp else {"loss": total}
        return results | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def floor(self) -> Call:
        """The GEMMs alone, at full N, each into a fresh result."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        gradient = torch.randn(len(hidden), len(weight), device=hidden.device).to(self.dtype)
        pairs = {"logits": (hidden, weight.T), "d_hidden": (gradient, weight), "d_weight": (gradient.T, hidden)}
        needed = list(pairs.items())[: GEMMS[self.mode]]
        return Call(lambda: {name: left @ right for name, (left, right) in needed})

    def log_prob_peers(self, run: Callable[[LogProb], Outputs]) -> dict[str, Callable[[], Call]]:
        """Those who differ in their log-probs only; `run` does the measured work with them."""

        def peer(make: Callable[[], LogProb], note: str) -> Callable[[], Call]:
            def ready() -> Call:
                log_probs = make()
                return Call(lambda: run(log_probs), self.loose, note)

            return ready

        return {
            "eager": peer(lambda: losses.eager(self.length), losses.EAGER_NOTE),
            "trl": peer(losses.trl, losses.TRL_NOTE),
            "cce": peer(lambda: losses.cut_cross_entropy(self.hidden), losses.CCE_NOTE),
        }


def linear_grpo(rows: int, dim: int, vocab: int, *, dtype: torch.dtype, device: str, mode: str) -> Problem:
    head = Head(rows, dim, vocab, dtype, device, mode)
    old, ref = head.padded(head.old), head.padded(head.ref)

    def outputs(value: Tensor) -> Outputs:
        return {"loss": value.detach()} | head.differentiate(value)

    def implementation(impl: str) -> Call:
        given = {"old_logp": head.old, "ref_logp": head.ref, "settings": SETTINGS, "impl": impl}
        rows = (head.hidden, head.weight, head.targets, head.seq_ids, head.advantages)
        return Call(lambda: outputs(linear_grpo_loss(*rows, **given)[0]), head.tolerance)

    def on(log_probs: LogProb) -> Outputs:
        logp = log_probs(head.hidden, head.weight, head.targets)
        return outputs(objective(head.padded(logp), old, ref, head.advantages).mean())

    def liger() -> Call:
        loss = losses.liger(head.padded(head.targets), old, ref, head.advantages)
        return Call(lambda: outputs(loss(head.hidden, head.weight)), head.loose, losses.LIGER_NOTE)

    def part_loss(logp: Tensor, part: slice) -> Tensor:
        some = slice(part.start // head.length, part.stop // head.length)  # whole sequences
        given = (logp.view(-1, head.length), old[some], ref[some], head.advantages[some])
        return objective(*given).sum() / head.sequences

    peers = {**head.log_prob_peers(on), "liger": liger}
    arms = {FLOOR: head.floor, **ours("linear_grpo_loss", implementation), **peers}
    return Problem(head.flops, head.moved, lambda: head.oracle(part_loss, keep_logp=False), arms, frozenset(peers))


def linear_logp(rows: int, dim: int, vocab: int, *, dtype: torch.dtype, device: str, mode: str) -> Problem:
    head = Head(rows, dim, vocab, dtype, device, mode)

    def on(log_probs: Callable[..., Any], **options: str) -> Outputs:
        value = log_probs(head.hidden, head.weight, head.targets, **options)
        return {"logp": value.detach()} | head.differentiate(value, head.upstream.to(value.dtype))

    def implementation(impl: str) -> Call:
        return Call(lambda: on(linear_logprob, impl=impl), head.tolerance)

    def part_loss(logp: Tensor, part: slice) -> Tensor:
        return logp @ head.upstream[part].to(logp.dtype)

    peers = head.log_prob_peers(on)
    arms = {FLOOR: head.floor, **ours("linear_logprob", implementation), **peers}
    return Problem(head.flops, head.moved, lambda: head.oracle(part_loss, keep_logp=True), arms, frozenset(peers))


def grpo(rows: int, sequences: int, *, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(3)
    drawn = [torch.randn(rows, device=device, generator=generator) for _ in range(3)]
    logp = (-3 * drawn[0].abs()).requires_grad_()  # [N]
    old, ref = logp.detach() + 0.2 * drawn[1], logp.detach() + 0.2 * drawn[2]
    gains = torch.randn(sequences, device=device, generator=generator) + 0.5  # [B]
    seq_ids = torch.arange(sequences, device=device).repeat_interleave(rows // sequences)
    moved = 24 * rows + 4 * sequences  # three log-probs and the gradient, int64 sequence, advantages

    def outputs(value: Tensor, leaf: Tensor) -> Outputs:
        return {"loss": value.detach(), "d_logp": torch.autograd.grad(value, leaf)[0]}

    def eager(leaf: Tensor) -> Outputs:
        own, drawn, fixed = (each.to(leaf.dtype).view(sequences, -1) for each in (leaf, old, ref))  # [B, L]
        return outputs(objective(own, drawn, fixed, gains.to(leaf.dtype)).mean(), leaf)

    def implementation(impl: str) -> Call:
        given = {"old_logp": old, "ref_logp": ref, "settings": SETTINGS, "impl": impl}
        return Call(lambda: outputs(grpo_loss(logp, seq_ids, gains, **given)[0], logp), 1e-4)

    arms = {FLOOR: copy_of(moved, device), **ours("grpo_loss", implementation)}
    arms["eager"] = lambda: Call(lambda: eager(logp), 1e-4, "the objective on [B, L] in torch")
    return Problem(0, moved, lambda: eager(logp.detach().double().requires_grad_()), arms)


def advantages(rewards: int, size: int, *, dtype: torch.dtype, device: str) -> Problem:
    scores = torch.rand(rewards, device=device, generator=torch.Generator(device).manual_seed(3))

    def eager(values: Tensor) -> Outputs:
        groups = values.view(-1, size)
        mean, std = (each.repeat_interleave(size) for each in (groups.mean(1), groups.std(1)))
        return {"advantages": (values - mean) / (std + 1e-4)}

    def implementation(impl: str) -> Call:
        return Call(lambda: {"advantages": group_advantages(scores, size, impl=impl)}, 1e-5)

    arms = {FLOOR: copy_of(8 * rewards, device), **ours("group_advantages", implementation)}
    arms["eager"] = lambda: Call(lambda: eager(scores), 1e-5)
    return Problem(0, 8 * rewards, lambda: eager(scores.double()), arms)
