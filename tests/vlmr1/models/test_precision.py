"""Weights move as far as in float32: displacements after 100 updates at a learning rate of 1e-6 on the same gradients,
projected on those of float32 weights, by the optimizers that the trainer makes. And the bytes that the table of
optimizers gives, beside those of the states that each library allocates."""

import functools
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer, TrainingArguments

from tests.helpers.jobs import Allocated
from tests.helpers.maker import Maker
from tests.helpers.trainers import trainer_of
from tests.helpers.updates import backward
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model
from vlmr1.models.optimizers import OPTIMIZERS, Parameter, optimizer_of
from vlmr1.models.precision import prepare_trained
from vlmr1.models.settings import ParameterSettings
from vlmr1.tiny import CHECKPOINT
from vlmr1_kernels.testing import relative_error

STEPS = 100


class Weights(nn.Module):
    """A matrix of usual weights, and ones, as norms have: a bfloat16 update of 1e-6 is 1/4000 of their spacing."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        usual = (0.03 * torch.randn(96, 128, generator=generator)).to(torch.bfloat16)
        self.usual = nn.Parameter(usual.to(dtype))
        self.ones = nn.Parameter(torch.ones(2048, 128, dtype=dtype))


def gradients(step: int, model: Weights) -> list[Tensor]:
    """A part that stays and a greater one that changes."""
    stays, changes = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + step)
    return [
        0.01 * torch.randn(p.shape, generator=stays) + 0.02 * torch.randn(p.shape, generator=changes)
        for p in model.parameters()
    ]


def displacement(dtype: torch.dtype, config: GRPOConfig, *, rounded: bool = False) -> list[Tensor]:
    """For the parameters, by the optimizer that the trainer makes; `rounded`: gradients in the weights' dtype too."""
    model = Weights(dtype)
    trainer = GRPOTrainer.__new__(GRPOTrainer)  # what `create_optimizer` reads of a trainer
    trainer.args, trainer.optimizer, trainer.optimizer_cls_and_kwargs = config, None, None
    optimizer = trainer.create_optimizer(model)
    torch.manual_seed(0)
    before = [parameter.detach().float().clone() for parameter in model.parameters()]
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(step, model), strict=True):
            if not rounded:
                parameter.grad_dtype = torch.float32
            parameter.grad = gradient.to(dtype) if rounded else gradient
        optimizer.step()
    return [p.detach().float() - start for p, start in zip(model.parameters(), before, strict=True)]


def projected(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((a * b).sum() / (b * b).sum()) for a, b in zip(one, other, strict=True)]


def config_of(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-6, **settings)


BFLOAT16 = {"model_dtype": "bfloat16", "optim": "adamw_torch_8bit", "stochastic_rounding": True}
OFFERED = {
    "adamw_torch": (torch.float32, {"optim": "adamw_torch"}, "adamw_torch"),
    "adamw_torch_fused": (torch.float32, {"optim": "adamw_torch_fused"}, "adamw_torch"),
    "adamw_torch_8bit": (torch.float32, {"optim": "adamw_torch_8bit"}, "adamw_torch"),
    "adamw_bnb_8bit": (torch.float32, {"optim": "adamw_bnb_8bit"}, "adamw_torch"),
    "adamw_8bit": (torch.float32, {"optim": "adamw_8bit"}, "adamw_torch"),
    "ademamix_8bit": (torch.float32, {"optim": "ademamix_8bit"}, "ademamix"),
    "lion_8bit": (torch.float32, {"optim": "lion_8bit"}, "lion_32bit"),
    "rmsprop_bnb": (torch.float32, {"optim": "rmsprop_bnb"}, "rmsprop"),
    "rmsprop_bnb_8bit": (torch.float32, {"optim": "rmsprop_bnb_8bit"}, "rmsprop"),
    "bfloat16 weights, stochastic rounding": (torch.bfloat16, BFLOAT16, "adamw_torch"),
}


@pytest.mark.parametrize("dtype, settings, exact", OFFERED.values(), ids=OFFERED.keys())
@pytest.mark.slow
def test_what_is_offered_moves_the_weights(dtype, settings, exact, tmp_path):
    expected = displacement(torch.float32, config_of(tmp_path, optim=exact))
    shares = projected(displacement(dtype, config_of(tmp_path, **settings)), expected)
    assert all(0.9 < share < 1.1 for share in shares), shares


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_what_is_refused_does_not(optim, tmp_path):
    """bfloat16 weights that are rounded to the nearest: of usual ones 1 to 2% of the way, of ones nothing."""
    expected = displacement(torch.float32, config_of(tmp_path, optim="adamw_torch"))
    shares = projected(displacement(torch.bfloat16, config_of(tmp_path, optim=optim), rounded=True), expected)
    assert all(share < 0.05 for share in shares), shares
    with pytest.raises(SettingError, match=f"model_dtype=bfloat16 with optim={optim}: .*rounded away"):
        config_of(tmp_path, optim=optim, model_dtype="bfloat16")


def test_a_model_in_bfloat16_is_refused_too(processor, tmp_path):
    """However it came to the trainer."""
    model = load_model(CHECKPOINT, dtype=torch.bfloat16)
    with pytest.raises(SettingError, match=r"is trained in bfloat16: .*use_peft=true"):
        trainer_of(model, processor, tmp_path)


def bfloat16_trainer(processor: Any, tmp_path: Path, **settings: Any) -> GRPOTrainer:
    return trainer_of(load_model(CHECKPOINT, dtype=torch.bfloat16), processor, tmp_path, **BFLOAT16, **settings)


def test_gradients_accumulate_in_float32(make: Maker, processor: Any, tmp_path: Path) -> None:
    """Over packs: the float64 sum of the gradients of each, to the rounding of float32; bfloat16 sums are 1e-3 off."""
    groups = [make.group(make.prompt("Locate the digit 7.", (84,)), (5, 9, 3)) for _ in range(6)]
    trainer = bfloat16_trainer(processor, tmp_path, tokens_per_pack=64)
    trainer.add_logprobs(trainer.model, groups)
    packs = trainer.runner.packs(groups)
    assert len(packs) > 5

    def gradients_over(packs: Any) -> dict[str, Tensor]:
        trainer.model.zero_grad(set_to_none=True)
        trainer.runner.packs = lambda groups: packs
        found = backward(trainer, groups)[2]
        return {name: gradient for name, gradient in found.items() if "layers.0.mlp" in name}

    apart = [gradients_over([pack]) for pack in packs]
    together = gradients_over(packs)
    assert {gradient.dtype for each in (together, *apart) for gradient in each.values()} == {torch.float32}
    for name, gradient in together.items():
        exact = torch.stack([each[name].double() for each in apart]).sum(0)
        rounded = functools.reduce(torch.add, [each[name].bfloat16() for each in apart])
        assert relative_error(gradient, exact) < 1e-6 and relative_error(rounded, exact) > 1e-3, name


def test_a_trained_tower_without_images_has_zeros_in_float32(make, processor, tmp_path):
    trainer = bfloat16_trainer(processor, tmp_path)
    trainer.family.fill_vision_gradients(trainer.policy.model)
    found = {p.grad.dtype for p in trainer.family.vision_parameters(trainer.policy.model) if p.grad is not None}
    assert found == {torch.float32}


def test_nothing_to_train(tmp_path):
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(SettingError, match="nothing is trained"):
        prepare_trained(model, ParameterSettings.of(config_of(tmp_path)))


# Bytes of optimizers


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
