"""The bytes that the table of optimizers gives, beside those of the states that each library allocates."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer, TrainingArguments

from tests.helpers.jobs import Allocated
from vlmr1.models.optimizers import OPTIMIZERS, Parameter, optimizer_of


class Model(nn.Module):
    """Parameters on both sides of every rule: an embedding, whole blocks, a part of a block, small ones."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.blocks = nn.Linear(96, 64)
        self.part = nn.Linear(67, 63)
        self.small = nn.Linear(64, 10)


def parameters_of(model: nn.Module) -> list[Parameter]:
    return [Parameter(tuple(p.shape), p.itemsize, "embedding" in name) for name, p in model.named_parameters()]


def plain(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a tensor, possibly a wrapper of others, is made of."""
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def arguments(tmp_path: Any, **settings: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def stepped(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `transformers.Trainer` makes of these arguments, after one step."""
    made: Any = Trainer(model=model, args=args).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bytes_of_the_states(name, dtype, tmp_path):
    model = Model().to(dtype)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, and makes the states before it
        states = stepped(model, arguments(tmp_path, optim=name)).state
    for (part, parameter), described in zip(model.named_parameters(), parameters_of(model), strict=True):
        # Beside them torch and torchao keep a number of steps, and bitsandbytes two maps for all parameters together.
        kept = {key: value for key, value in states[parameter].items() if key not in ("step", "qmap1", "qmap2")}
        found = sum(t.nbytes for t in chain.from_iterable(map(plain, kept.values())))
        assert OPTIMIZERS[name].state_bytes(described) == found, part


MORE = {"sgd": "momentum=0.9", "rmsprop": "momentum=0.9,centered=true"}


@pytest.mark.parametrize(("name", "optim_args"), MORE.items())
def test_moments_that_optim_args_add(name, optim_args, tmp_path):
    args = arguments(tmp_path, optim=name, optim_args=optim_args)
    model = Model()
    states = stepped(model, args).state
    found = sum(t.nbytes for p in model.parameters() for key, t in states[p].items() if key != "step")
    assert sum(map(optimizer_of(args).state_bytes, parameters_of(model))) == found
    assert optimizer_of(arguments(tmp_path, optim=name, optim_args="momentum=0")) == OPTIMIZERS[name]


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "one by one"])
@pytest.mark.parametrize("name", [name for name, of in OPTIMIZERS.items() if of.library in ("torch", "transformers")])
def test_bytes_that_a_step_allocates(name, lists, tmp_path):
    """One parameter is large, so that what is left of others beside it is small."""
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 1024, bias=False), nn.Linear(16, 32, bias=False))
    optimizer: Any = stepped(model, arguments(tmp_path, optim=name))
    if not optimizer.param_groups[0].get("fused"):
        optimizer.param_groups[0]["foreach"] = lists
    run = Allocated("step")
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    run.leave_out([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *states])
    with run:
        optimizer.step()
    planned = OPTIMIZERS[name].step_bytes(parameters_of(model), lists=lists)
    assert planned == pytest.approx(run.peak, rel=0.05, abs=64)


def test_paged_states_are_those_of_large_parameters():
    large, small = Parameter((1000, 1024), 4), Parameter((10, 1024), 4)
    assert OPTIMIZERS["paged_adamw_32bit"].paged_bytes(large) == 8 * 1000 * 1024
    assert OPTIMIZERS["paged_adamw_8bit"].paged_bytes(large) == 2 * 1000 * 1024  # the scales stay
    assert OPTIMIZERS["paged_adamw_8bit"].state_bytes(large) == 2 * 1000 * (1024 + 4 * 4)
    assert all(OPTIMIZERS[name].paged_bytes(small) == 0 for name in OPTIMIZERS)
    assert {name for name, of in OPTIMIZERS.items() if of.paged_bytes(large)} == {n for n in OPTIMIZERS if "paged" in n}
