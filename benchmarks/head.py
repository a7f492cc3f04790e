"""A case of the ops that project hidden rows to the vocabulary: inputs, oracle, floor, and what each GEMM costs.

N rows of B sequences of one length L = N / B (equal lengths, so that no padded peer pays for padding), D
hidden, V vocabulary. The targets are drawn from the policy, as a rollout draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from benchmarks.compare import Outputs
from vlmr1_kernels import GRPOSettings, group_advantages

SETTINGS = GRPOSettings(beta=0.04)  # grpo, k3, epsilon 0.2, temperature 1: VLM-R1's
NUM_GENERATIONS = 8
MODES = {"trainable": 3, "frozen": 2, "no_grad": 1}  # the head, and the GEMMs that it takes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ORACLE_ELEMENTS = 2**28  # logits at once


@dataclass(frozen=True)
class Case:
    """ "512x256x8192-float32-frozen" is N, D, V, the dtype and the mode."""

    rows: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    mode: str
    device: str

    @classmethod
    def parse(cls, text: str, device: str) -> Case:
        try:
            shape, dtype, mode = text.split("-")
            rows, hidden, vocabulary = (int(each) for each in shape.split("x"))
            if mode not in MODES or rows % NUM_GENERATIONS:
                raise ValueError(text)
            return cls(rows, hidden, vocabulary, DTYPES[dtype], mode, device)
        except (ValueError, KeyError):
            wanted = f"NxDxV-{'|'.join(DTYPES)}-{'|'.join(MODES)}, N a multiple of {NUM_GENERATIONS}"
            raise ValueError(f"case is {text!r}; it must be {wanted}") from None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.hidden}x{self.vocabulary}-{dtype}-{self.mode}"

    @property
    def sequences(self) -> int:
        return 8 * NUM_GENERATIONS if self.rows > 1024 and self.rows % 64 == 0 else NUM_GENERATIONS

    @property
    def flops(self) -> int:
        return MODES[self.mode] * 2 * self.rows * self.hidden * self.vocabulary

    @property
    def moved(self) -> int:
        """Hidden rows and head read, their gradients written; what a row needs besides is left out."""
        hidden, weight = self.rows * self.hidden, self.vocabulary * self.hidden
        written = {"trainable": hidden + weight, "frozen": hidden, "no_grad": 0}[self.mode]
        return (hidden + weight + written) * self.dtype.itemsize

    @property
    def accumulator(self) -> int:
        narrow = self.mode == "trainable" and self.dtype != torch.float32
        return 4 * self.vocabulary * self.hidden if narrow else 0

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocabulary * self.dtype.itemsize

    @property
    def tolerance(self) -> float:
        """Of a result whose logits and log-probs are float32; the operands' rounding remains."""
        return 1e-4 if self.dtype == torch.float32 else 1e-2

    @property
    def loose(self) -> float:
        """Of a result whose logits or log-probs are rounded to bfloat16: 0.03 at a log-prob of 8."""
        return 1e-4 if self.dtype == torch.float32 else 5e-2


class Inputs:
    """The tensors of a case, random and never zero; [B, L] views for those who need them."""

    def __init__(self, case: Case, seed: int = 3):
        self.case = case
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=case.device, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=case.device, generator=generator)

        self.hidden = normal(case.rows, case.hidden).to(case.dtype)  # [N, D]
        weight = normal(case.vocabulary, case.hidden).mul_(3 / case.hidden**0.5)
        self.weight = weight.to(case.dtype)  # [V, D], logits of deviation 3
        draws = [self._draw(self.hidden[part], generator) for part in self._parts()]
        self.targets = torch.cat([ids for ids, _ in draws])  # [N]
        logp = torch.cat([each for _, each in draws])  # [N]
        self.seq_ids = torch.arange(case.sequences, device=case.device).repeat_interleave(self.length)
        # The mean of the advantages is not 0: else the loss would be a small difference of large numbers.
        self.advantages = group_advantages(uniform(case.sequences), NUM_GENERATIONS) + 0.5  # [B]
        # No ratio near 1 +- 0.2, where the rounding of a log-prob decides whether a row has a gradient.
        clipped, sign = uniform(case.rows) < 0.3, (uniform(case.rows) < 0.5).float() * 2 - 1
        size = torch.where(clipped, 0.4 + 0.1 * uniform(case.rows), 0.1 * uniform(case.rows))
        self.old_logp, self.ref_logp = logp - sign * size, logp + 0.2 * normal(case.rows)  # [N]
        self.upstream = normal(case.rows) / case.rows  # [N] d loss / d logp for linear_logprob
        self.hidden.requires_grad_(case.mode != "no_grad")
        self.weight.requires_grad_(case.mode == "trainable")

    @property
    def length(self) -> int:
        return self.case.rows // self.case.sequences

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What needs a gradient, by the name of its result."""
        both = {"d_hidden": self.hidden, "d_weight": self.weight}
        return {name: leaf for name, leaf in both.items() if leaf.requires_grad}

    def padded(self, rows: Tensor) -> Tensor:
        """[N, ...] as [B, L, ...]."""
        return rows.view(self.case.sequences, self.length, *rows.shape[1:])

    def differentiate(self, value: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(value, list(self.leaves.values()), upstream) if self.leaves else ()
        return dict(zip(self.leaves, gradients, strict=True))

    def _parts(self) -> Iterator[slice]:
        """Whole sequences at a time, few enough for wide logits."""
        step = max(1, _ORACLE_ELEMENTS // self.case.vocabulary // self.length) * self.length
        rows = self.case.rows
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def _draw(self, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        log_probs = (hidden @ self.weight.T).float().log_softmax(-1)
        ids = torch.multinomial(log_probs.exp(), 1, generator=generator)  # [n, 1]
        return ids[:, 0], log_probs.gather(1, ids)[:, 0]

    def oracle(self, part_loss: Callable[[Tensor, slice], Tensor], *, keep_logp: bool) -> Outputs:
        """Eager code in a wider dtype, some sequences at a time. `part_loss` maps the log-probs of some rows
        to their part of the loss; the log-probs themselves are a result if `keep_logp`, else the loss is."""
        wide = torch.float64 if self.case.dtype == torch.float32 else torch.float32
        leaves = {name: leaf.detach().to(wide).requires_grad_() for name, leaf in self.leaves.items()}
        hidden = leaves.get("d_hidden", self.hidden.to(wide))
        weight = leaves.get("d_weight", self.weight.to(wide))
        logps, total = [], torch.zeros((), dtype=wide, device=self.case.device)
        for part in self._parts():
            logits = hidden[part] @ weight.T
            logp = logits.log_softmax(-1).gather(1, self.targets[part, None])[:, 0]
            loss = part_loss(logp, part)
            if leaves:
                loss.backward()
            logps.append(logp.detach())
            total += loss.detach()
        results = {"logp": torch.cat(logps)} if keep_logp else {"loss": total}
        return results | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    @cached_property
    def logits_gradient(self) -> Tensor:
        """[N, V], what the floor multiplies."""
        return torch.randn(self.case.rows, self.case.vocabulary, device=self.case.device).to(self.case.dtype)

    def floor(self) -> dict[str, Tensor]:
        """The GEMMs alone, at full N, each into a fresh result."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        results = {"logits": torch.mm(hidden, weight.T)}
        if self.case.mode != "no_grad":
            results["d_hidden"] = torch.mm(self.logits_gradient, weight)
        if self.case.mode == "trainable":
            results["d_weight"] = torch.mm(self.logits_gradient.T, hidden)
        return results


class HeadProblem:
    """What the cases of the two ops share; see `compare.Problem`."""

    def __init__(self, case: Case):
        self.case, self.device, self.dtype = case, case.device, case.dtype
        self.flops, self.moved, self.accumulator = case.flops, case.moved, case.accumulator

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs(self.case)

    def tiny(self) -> Self:
        return type(self)(replace(self.case, rows=2 * NUM_GENERATIONS, hidden=32, vocabulary=256))
