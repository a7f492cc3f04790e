"""The dataclasses that the parts of the trainer hand to each other, and the base of their settings.

Shapes: P prompts, G generations a prompt, B = P*G sequences, N completion rows, L packed tokens,
L_p tokens of one prompt, C tokens of one completion, K rows of positions, D hidden, V vocabulary, R reward functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

    from vlmr1_kernels import PrefixLayout

ImageInputs = dict[str, "Tensor"]  # what the processor made of one image


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image without a file of its own. Two with the same bytes are equal."""

    key: str  # digest of the bytes
    name: str = field(compare=False)  # for messages
    data: bytes = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, data: bytes, name: str) -> ImageBytes:
        return cls(hashlib.blake2b(data, digest_size=16).hexdigest(), name, data)


ImageRef = Path | ImageBytes  # an image of a Sample; equal ones are the same image, for caches too


@dataclass(frozen=True)
class Sample:
    """One row of data. `source` is "file:line", for messages; `index` its place in the data set."""

    messages: list[dict[str, Any]]  # chat messages; image parts are {"type": "image"}
    images: tuple[ImageRef, ...]  # files, or the bytes of one
    solution: str
    source: str
    index: int
    columns: dict[str, Any] = field(default_factory=dict)  # everything else the row held
    other_solutions: tuple[str, ...] = ()  # accepted as well as `solution`
    as_given: dict[str, Any] = field(default_factory=dict)  # arguments of users' reward functions, in place of these

    def each_solution(self) -> list[Sample]:
        """Return this sample once for each accepted solution, which is then its only one."""
        if not self.other_solutions:
            return [self]
        every = (self.solution, *self.other_solutions)
        return [replace(self, solution=solution, other_solutions=()) for solution in every]


@dataclass(frozen=True)
class Prompt:
    """One tokenized Sample; each of its images is held once."""

    sample: Sample
    input_ids: Tensor  # [L_p] int64
    positions: Tensor  # [K, L_p] int64; K is 3 with M-RoPE (time, height, width; equal rows for text), else 1
    images: tuple[ImageInputs, ...] = ()  # what the processor made of each of the sample's images
    think_opening: str = ""  # the `<think>`, closed or not, with which the chat template ends the prompt

    @property
    def next_position(self) -> int:
        """Position of the first completion token: max(positions) + 1."""
        return int(self.positions.max()) + 1


PER_TOKEN = ("token_ids", "logp", "sampling_logp", "old_logp", "ref_logp", "importance_denominator")


@dataclass(eq=False)
class Completion:
    """One branch of a group, and every per-token fact that the trainer knows of it. Facts are added as passes compute
    them; those of reference and policy are views of a device tensor. `sampling_logp` is of the distribution that the
    tokens were drawn from (truncated, penalized), all others of the full distribution at the temperature."""

    token_ids: Tensor  # [C] int64, the end token included when there is one
    logp: Tensor | None  # [C] float32 of the rollout engine
    sampling_logp: Tensor | None  # [C] float32
    text: str
    finish_reason: str  # "stop" | "length"
    old_logp: Tensor | None = None  # [C] float32 of the old policy, in the ratio; None: the update's own forward
    ref_logp: Tensor | None = None  # [C] float32 of the reference model
    importance_denominator: Tensor | None = None  # [C] float32: the weight is min(exp(old_logp - this), cap)
    logged: dict[str, Any] = field(default_factory=dict)  # columns that reward functions add to its row of the log

    def on_host(self) -> Completion:
        """A copy whose tensors are in host memory and have storage of their own, for checkpoints and other ranks."""
        facts = {name: getattr(self, name) for name in PER_TOKEN}
        copies: dict[str, Any] = {name: value.cpu().clone() for name, value in facts.items() if value is not None}
        return replace(self, **copies)


@dataclass(frozen=True)
class Group:
    """One Prompt and its G Completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: Tensor | None = None  # [G, R] float32
    advantages: Tensor | None = None  # [G] float32
    kl: Tensor | None = None  # [G] float32, summed over the completion, where it is in the reward


@dataclass(frozen=True)
class Pack:
    """View of several Groups as one row: prompts first, then branches. It can be made again at any time, and holds
    nothing that its groups do not, except the weight 0 of a dummy pass and the dummy image of a pass without images."""

    input_ids: Tensor  # [L] int64
    positions: Tensor  # [K, L] int64
    layout: PrefixLayout  # which tokens are whose prefix
    images: tuple[ImageInputs, ...]  # the images to encode, each once
    image_refs: tuple[ImageRef, ...]  # where each is from
    image_ids: tuple[int, ...]  # which of them stands at each placeholder run, in order
    rows: Tensor  # [N] int64: the rows whose hidden states predict completion tokens
    targets: Tensor  # [N] int64
    seq_ids: Tensor  # [N] int64, 0..B-1, sorted
    advantages: Tensor | None  # [B] float32; None before they are known
    old_logp: Tensor | None = None  # [N] float32; this and the next three as in Completion, None where one lacks it
    ref_logp: Tensor | None = None  # [N] float32
    rollout_logp: Tensor | None = None  # [N] float32: `logp` of the completions
    importance_denominator: Tensor | None = None  # [N] float32
    weight: float = 1.0  # of its loss; 0: a dummy pack
    groups: tuple[Group, ...] = ()  # what it is a view of

    @property
    def completions(self) -> list[Completion]:
        """The B completions, in order."""
        return [completion for group in self.groups for completion in group.completions]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """[N] -> B views [C], one a completion."""
        return values.split([len(completion.token_ids) for completion in self.completions])


@dataclass(frozen=True)
class StepMetrics:
    """Everything one update reports: means over the step, seconds and peak memory by phase."""

    values: dict[str, float]
    seconds: dict[str, float]  # by phase: rollout, reward, reference, old, forward, backward, update
    memory: dict[str, float] = field(default_factory=dict)  # MiB by phase, where it is measured


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the dataclasses of settings. Each package declares the settings that it reads.

    `GRPOConfig` inherits all of them: one flat command line. A package receives `SomeSettings.of(config)`."""

    group: ClassVar[str]  # heading in `vlmr1 train --help`
    shared: ClassVar[tuple[str, ...]] = ()  # settings declared elsewhere that the package reads too

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read-only copy of these settings from an object that has all of them."""
        made = object.__new__(cls)
        for name in (*(each.name for each in fields(cls)), *cls.shared):  # type: ignore[arg-type]
            made.__dict__[name] = copy(getattr(config, name))
        made.__dict__["_read_only"] = True
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if "_read_only" in self.__dict__:
            raise FrozenInstanceError(f"cannot set {name}: {type(self).__name__} is read-only")
        super().__setattr__(name, value)

    @classmethod
    def wrong_types(cls, config: Any) -> Iterator[str]:
        """Yield the settings of this class whose value in `config` is not of the declared type."""
        hints = get_type_hints(cls)
        for name in vars(cls).get("__annotations__", {}):
            value, wanted = getattr(config, name), hints[name]
            if get_origin(wanted) is not ClassVar and not _fits(value, wanted):
                yield f"{name} is {value!r}: it must be {_shown(wanted)}"

    def check(self) -> Iterator[str]:
        """Yield the faults of these settings; fills in values that follow from others."""
        return iter(())

    def check_device(self, device: str) -> Iterator[str]:
        """Yield the settings that this machine and type of device cannot honour."""
        return iter(())

    def at_least(self, least: int, *names: str) -> Iterator[str]:
        """Faults of settings that are below `least`; None is allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}: it must {f'be at least {least}' if least else 'not be negative'}"

    def above_zero(self, *names: str) -> Iterator[str]:
        """Faults of settings that are not above 0; None is allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{name} is {value}: it must be above 0"

    def is_default(self, name: str) -> bool:
        """Return whether a setting has its default value, or is an empty list."""
        return getattr(self, name) in (type(self).__dataclass_fields__[name].default, [])  # type: ignore[attr-defined]


def _shown(wanted: Any) -> str:
    """The words for an annotation."""
    choices = [each for each in get_args(wanted) if each is not type(None)]
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if len(choices) == 1 and len(get_args(wanted)) == 2:  # optional
        return f"{_shown(choices[0])}, or None"
    return str(getattr(wanted, "__name__", wanted)).replace("typing.", "")


def _fits(value: Any, wanted: Any) -> bool:
    """Return whether a value is of an annotation. A path is a text and an int a float; a bool is neither."""
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return value in choices
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(each, choices[0]) for each in value)
    if choices:
        return any(_fits(value, each) for each in choices)
    kinds: dict[Any, tuple[type, ...]] = {float: (float, int), str: (str, Path), None: (NoneType,)}
    return isinstance(value, kinds.get(wanted, (wanted,))) and (wanted is bool or not isinstance(value, bool))
