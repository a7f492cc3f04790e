"""Frozen weights in the dtype that autocast computes in.

Within a pass autocast keeps its cast of a weight that requires a gradient, and casts a frozen one at every use. A
frozen weight that has the compute dtype already gives the same results, bit for bit, without the casts and with half
the bytes. Weights of norms, and what is read otherwise, stay float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

logger = logging.getLogger(__name__)
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)  # autocast casts their weights and biases
HELD = "held_for"  # attribute of a parameter that `frozen_in` has cast: the dtype that it had
COPY_OF = "copy_of"  # attribute of a head's weight that `frozen_in` has made: the embeddings that the head shares


def cast_by_autocast(model: Any) -> dict[nn.Parameter, str]:
    """The float32 parameters, with their names, that only `LAYERS` and the input embeddings read.

    Adapters are left out: peft computes with their weights outside of layers. So is the first parameter, of the patch
    embedding: the library takes it for the dtype of all."""
    embeddings, found, others = model.get_input_embeddings(), {}, {next(model.parameters())}
    for name, module in model.named_modules():
        read = module is embeddings or (type(module) in LAYERS and ".lora_" not in name)
        for own, parameter in module.named_parameters(recurse=False):
            if read and parameter.dtype == torch.float32:
                found.setdefault(parameter, f"{name}.{own}")
            else:
                others.add(parameter)
    return {parameter: name for parameter, name in found.items() if parameter not in others}


def fits(parameter: Tensor, dtype: torch.dtype) -> bool:
    """Return whether each value is one of `dtype`; of a tensor without data it is assumed, as published weights are."""
    return parameter.is_meta or is_fake(parameter) or torch.equal(parameter, parameter.to(dtype).to(parameter.dtype))


def with_float32_rows(model: Any) -> None:
    """Have the input embeddings return float32 whatever the dtype of their weight."""
    model.get_input_embeddings().register_forward_hook(_to_float32)


@contextmanager
def frozen_in(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """In this block frozen float32 weights are held in `dtype` where passes under autocast to it are bit-equal, and the
    values are too: `stored` has the float32 weights back. A frozen head has a copy of the embeddings that it shares.
    Nothing with None."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    held = {} if dtype is None else hold_frozen(model, dtype)
    shares = dtype is not None and head.weight is embeddings.weight and not head.weight.requires_grad
    if shares:
        head.weight = nn.Parameter(embeddings.weight.to(dtype), requires_grad=False)
        setattr(head.weight, COPY_OF, embeddings.weight)
    try:
        yield
    finally:
        if shares:
            head.weight = embeddings.weight
        for parameter in held:
            parameter.data = parameter.data.to(getattr(parameter, HELD))
            delattr(parameter, HELD)


def hold_frozen(model: Any, dtype: torch.dtype) -> dict[nn.Parameter, str]:
    """Cast frozen weights as in `frozen_in`, and return them. Embeddings are left alone: decode steps read them without
    the module."""
    rows = model.get_input_embeddings().weight
    frozen = {p: name for p, name in cast_by_autocast(model).items() if not p.requires_grad and p is not rows}
    held = {parameter: name for parameter, name in frozen.items() if fits(parameter, dtype)}
    rounded = [name for parameter, name in frozen.items() if parameter not in held]
    if rounded:
        what = "%d frozen float32 weights, as %s, have values that %s cannot hold: they stay float32, which is slower"
        logger.warning(what, len(rounded), rounded[0], dtype)
    for parameter in held:
        setattr(parameter, HELD, parameter.dtype)
        parameter.data = parameter.data.to(dtype)
    return held


@contextmanager
def stored(model: nn.Module) -> Iterator[None]:
    """In this block weights that `frozen_in` has cast are what they were, in host memory: to write a checkpoint. A head
    shares the embeddings again."""
    held = {each: each.data for each in model.parameters() if hasattr(each, HELD)}
    heads = [(m, m.weight) for m in model.modules() if hasattr(getattr(m, "weight", None), COPY_OF)]
    try:
        for head, weight in heads:
            head.weight = getattr(weight, COPY_OF)
        for parameter in held:
            parameter.data = parameter.data.to("cpu", getattr(parameter, HELD))
        yield
    finally:
        for head, weight in heads:
            head.weight = weight  # type: ignore[assignment]
        for parameter, value in held.items():
            parameter.data = value


def held_dtype(parameter: Tensor) -> torch.dtype | None:
    """The dtype that a parameter had before `frozen_in` cast it; None for others."""
    return getattr(parameter, HELD, None)


def _to_float32(module: nn.Module, given: Any, rows: Tensor) -> Tensor:
    return rows.float()
