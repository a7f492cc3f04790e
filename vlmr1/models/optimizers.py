"""The optimizers that `optim` may name, and the bytes that each holds for the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

BLOCK = 256  # numbers of an 8-bit state that share a float32 scale
SMALL = 4096  # numbers of a parameter below which its states are not rounded to 8 bits
PAGED_FROM = 100_000  # numbers of a parameter from which bitsandbytes pages its states
MAP = 256 * 4  # bytes of the table from 8 bits to float32, of which torchao holds one a state


@dataclass(frozen=True)
class Parameter:
    """One trained parameter."""

    shape: tuple[int, ...]
    itemsize: int
    embedding: bool = False

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.itemsize


@dataclass(frozen=True)
class Optimizer:
    """State of an optimizer: `moments` numbers of `bits` bits for each number that it trains. While it steps it makes
    `foreach` temporary copies of all trained parameters where torch works on lists of tensors (on a GPU), and `single`
    copies of the largest parameter elsewhere."""

    help: str
    library: Literal["torch", "torchao", "bitsandbytes", "transformers"]
    moments: int
    bits: Literal[8, 32] = 32
    paged: bool = False  # the states of large parameters are in host memory but for the step
    foreach: int = 0
    single: int = 0

    def state_bytes(self, parameter: Parameter) -> int:
        """Bytes of the states of one parameter, beside its number of steps."""
        numbers = parameter.numbers
        if self.library == "transformers":  # Adafactor: sums over rows and over columns, and a scalar
            *outer, rows, columns = (1, *parameter.shape)
            return 4 * (prod(outer) * (rows + columns) if len(parameter.shape) > 1 else numbers) + 4
        if self.library == "torch":
            return self.moments * parameter.bytes
        if self.library == "torchao":
            if numbers < SMALL or numbers % BLOCK:
                return self.moments * parameter.bytes
            return self.moments * (numbers + 4 * (numbers // BLOCK) + MAP)
        if self.bits == 32 or numbers < SMALL or parameter.embedding:
            return self.moments * 4 * numbers
        return self.moments * (numbers + self._scales(numbers))

    def paged_bytes(self, parameter: Parameter) -> int:
        """The part of these that is in host memory but for the step: all but the scales of 8-bit states."""
        if not self.paged or parameter.numbers < PAGED_FROM:
            return 0
        whole = self.bits == 32 or parameter.embedding
        return self.state_bytes(parameter) - (0 if whole else self.moments * self._scales(parameter.numbers))

    def step_bytes(self, parameters: Iterable[Parameter], *, lists: bool) -> int:
        """Bytes that a step allocates beside states and gradients; `lists`: torch works on lists of tensors."""
        sizes = [parameter.bytes for parameter in parameters]
        if lists and self.library == "torch":
            return self.foreach * sum(sizes)
        return self.single * max(sizes, default=0)

    @staticmethod
    def _scales(numbers: int) -> int:
        return 4 * -(-numbers // BLOCK)


def _torch(help: str, moments: int, *, foreach: int = 0, single: int = 0) -> Optimizer:
    return Optimizer(help, "torch", moments, foreach=foreach, single=single)


def _bnb(help: str, moments: int, bits: Literal[8, 32] = 32, *, paged: bool = False) -> Optimizer:
    return Optimizer(f"{help} (bitsandbytes)", "bitsandbytes", moments, bits, paged)


# What they do with float32 weights. Of bfloat16 weights see `precision.STOCHASTIC`.
OPTIMIZERS = {
    "adamw_torch": _torch("AdamW, two float32 moments", 2, foreach=1, single=2),
    "adamw_torch_fused": _torch("AdamW, two float32 moments, one kernel", 2),
    "adamw_torch_8bit": Optimizer(
        "AdamW, two 8-bit moments (torchao); the one that can round stochastically", "torchao", 2, 8
    ),
    "adamw_bnb_8bit": _bnb("AdamW, two 8-bit moments", 2, 8),
    "adamw_8bit": _bnb("another name of adamw_bnb_8bit", 2, 8),
    "paged_adamw_32bit": _bnb("AdamW, two float32 moments that may leave the GPU", 2, paged=True),
    "paged_adamw_8bit": _bnb("AdamW, two 8-bit moments that may leave the GPU", 2, 8, paged=True),
    "ademamix": _bnb("AdEMAMix, three float32 moments", 3),
    "ademamix_8bit": _bnb("AdEMAMix, three 8-bit moments", 3, 8),
    "paged_ademamix_32bit": _bnb("ademamix, its moments may leave the GPU", 3, paged=True),
    "paged_ademamix_8bit": _bnb("ademamix_8bit, its moments may leave the GPU", 3, 8, paged=True),
    "lion_32bit": _bnb("Lion, one float32 moment", 1),
    "lion_8bit": _bnb("Lion, one 8-bit moment", 1, 8),
    "paged_lion_32bit": _bnb("lion_32bit, its moment may leave the GPU", 1, paged=True),
    "paged_lion_8bit": _bnb("lion_8bit, its moment may leave the GPU", 1, 8, paged=True),
    "rmsprop": _torch("RMSprop, one float32 moment", 1, foreach=1, single=1),
    "rmsprop_bnb": _bnb("RMSprop, one float32 moment", 1),
    "rmsprop_bnb_32bit": _bnb("another name of rmsprop_bnb", 1),
    "rmsprop_bnb_8bit": _bnb("RMSprop, one 8-bit moment", 1, 8),
    "adafactor": Optimizer("Adafactor, factored second moment", "transformers", 0, single=2),
    "adagrad": _torch("Adagrad, one float32 sum", 1, foreach=2, single=1),
    "sgd": _torch("no moments, or one with momentum in optim_args", 0),
}


# Arguments in `optim_args` that add a moment.
MORE_MOMENTS = {"sgd": ("momentum",), "rmsprop": ("momentum", "centered")}


def optimizer_of(args: Any) -> Optimizer:
    """The optimizer that the settings `optim` and `optim_args` ask for."""
    name = str(getattr(args.optim, "value", args.optim))
    given: dict[str, str] = {}
    for each in filter(None, str(args.optim_args or "").replace(" ", "").split(",")):
        key, _, value = each.partition("=")
        given[key] = value
    more = sum(given.get(each, "0").lower() not in ("0", "0.0", "false", "no") for each in MORE_MOMENTS.get(name, ()))
    return replace(OPTIMIZERS[name], moments=OPTIMIZERS[name].moments + more)
