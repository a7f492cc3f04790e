"""Layers with operators bound, beside the stock layers: definitions in plain torch show the binding."""

import sys
from collections import Counter
from copy import deepcopy
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.families import checkpoints, one_family
from tests.helpers.fused import DEFINITIONS, counted, rms_norm, run, wide
from tests.helpers.jobs import job
from tests.helpers.lora_steps import LORA
from tests.helpers.lora_steps import trainer_of as lora_trainer
from tests.helpers.rollouts import tokens
from tests.helpers.steps import trainer_of
from vlmr1.errors import SettingError
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.packing import make_pack
from vlmr1.models import family_of
from vlmr1.models.fused_layers import fused_layers, is_rms_norm, liger_operators, operators_for
from vlmr1.planner.plan import Planner
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1_kernels.testing import assert_within_budget, relative_error

Results = tuple[Tensor, dict[str, Tensor]]
checkpoint = checkpoints()
GROUPS = [("Locate the digit 7.", (56,), (9, 8, 7, 6)), ("What is seven?", (), (9, 8, 7, 6))]
# Calls of a pass: those of each decoder layer, then those of a tower layer
LAYERS: dict[str, tuple[str, str]] = {
    "qwen2_vl": ("rms_norm add_rms_norm swiglu rope", "rope"),
    "qwen2_5_vl": ("rms_norm add_rms_norm swiglu rope", "rms_norm rms_norm swiglu rope"),
    "qwen3_vl": ("rms_norm rms_norm rms_norm add_rms_norm swiglu rope", "rope"),
    "glm4v": ("rms_norm rms_norm rms_norm rms_norm swiglu_packed", "rms_norm rms_norm swiglu rope"),
    "internvl": ("rms_norm add_rms_norm swiglu rope", ""),
    "idefics3": ("rms_norm add_rms_norm swiglu rope", ""),
}
LAYERS["smolvlm"] = LAYERS["idefics3"]
FINAL = {"qwen2_5_vl": 2, "glm4v": 3}  # norms outside of layers; else that of the decoder


def expected_calls(model: Any) -> Counter[str]:
    kind, config = model.config.model_type, model.config
    tower = getattr(config.vision_config, "depth", None) or config.vision_config.num_hidden_layers
    decoder, vision = (Counter(names.split()) for names in LAYERS[kind])
    calls = Counter({name: n * config.text_config.num_hidden_layers for name, n in decoder.items()})
    calls.update({name: n * tower for name, n in vision.items()})
    return calls + Counter({"rms_norm": FINAL.get(kind, 1)})


def bound(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def relative(ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert ours.keys() == other.keys()
    difference = torch.stack([(ours[name] - value).double().norm() for name, value in other.items()]).norm()
    return float(difference / torch.stack([value.double().norm() for value in other.values()]).norm())


# The binding


@pytest.fixture
def pack(make: Any) -> Any:
    return make_pack(make.groups(*GROUPS))


def assert_stock(ours: Results, stock: Results) -> None:
    assert torch.equal(ours[0], stock[0]) and stock[0].std() > 0.1
    assert ours[1].keys() == stock[1].keys()
    assert relative(ours[1], stock[1]) < 1e-5


@pytest.fixture(params=[False, True], ids=["kept", "checkpointed"])
def model_in_training(model: Any, request: pytest.FixtureRequest) -> Any:
    if request.param:
        model.train()
        model.activation_checkpointing_enable()
    return model


def test_definitions_give_the_stock_pass(pack, model_in_training):
    """In float32 log-probs are equal to the bit. Checkpointing calls the layers again in backward."""
    model, family = model_in_training, family_of(model_in_training)
    stock = run(model, family, pack)
    family.operators, calls = counted(DEFINITIONS)
    assert_stock(run(model, family, pack), stock)
    expected = expected_calls(model)
    assert calls > expected if model.training else calls == expected
    assert not bound(model)


def test_the_naive_forward(make, model):
    """Padded rows, and the model's own attention."""
    family = family_of(model)
    pack = make_pack(make.groups(("Locate the digit 7.", (56,), (9,)), ("What is seven?", (), (6,))))
    policy = NaivePolicy(model, family, temperature=1.0)

    def passed() -> Results:
        model.zero_grad()
        with policy.attention():
            logp, _ = policy._forward(pack)
            (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
        return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = passed()
    family.operators, calls = counted(DEFINITIONS)
    assert_stock(passed(), stock)
    assert calls == expected_calls(model)
    calls.clear()
    assert torch.equal(policy.logprobs(pack), stock[0]) and calls == expected_calls(model)
    assert not bound(model)


HALF = {"autocast": torch.float32, "half-precision weights": torch.bfloat16}


@pytest.mark.parametrize("weights", HALF.values(), ids=HALF)
def test_error_under_autocast_is_within_budget(weights, pack, model):
    """At most twice that of the stock layers, in log-probs and in the gradient of each parameter. Stock layers add the
    gradients of a norm's output in float32, these in bfloat16; Qwen3-VL's queries and keys are rounded before they are
    rotated."""
    family = family_of(model)
    family.operators = DEFINITIONS
    exact = flat(run(deepcopy(model).double(), family, pack))
    model.to(weights)
    family.operators, calls = counted(DEFINITIONS)
    ours = flat(run(model, family, pack, torch.bfloat16))
    norms = sum(type(module) is nn.LayerNorm for module in model.modules())
    assert calls == expected_calls(model) + Counter(layer_norm=norms if weights == torch.bfloat16 else 0)
    family.operators = None
    stock = flat(run(model, family, pack, torch.bfloat16))
    names = ("logp", "all gradients", *exact)
    for each in (ours, stock, exact):
        each["all gradients"] = torch.cat([value.double().flatten() for name, value in each.items() if name != "logp"])
    assert relative_error(stock["logp"], exact["logp"]) > 1e-4
    assert_within_budget(names, *([each[name] for name in names] for each in (ours, stock, exact)))


def flat(results: Results) -> dict[str, Tensor]:
    return {"logp": results[0], **results[1]}


def wrong_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return DEFINITIONS.rope(q, k, cos, -sin)


FAULTS: dict[str, dict[str, Any]] = {
    "eps": {"rms_norm": lambda x, weight, eps, in_place: DEFINITIONS.rms_norm(x, weight, 2 * eps)},
    "eps behind the residual": {"add_rms_norm": lambda *args: DEFINITIONS.add_rms_norm(*args[:3], 2 * args[3])},
    "offset": {"rms_norm": lambda x, weight, *args: DEFINITIONS.rms_norm(x, weight + 1, *args)},
    "no residual": {"add_rms_norm": lambda r, x, *args: (DEFINITIONS.rms_norm(r + x, *args), x)},
    "exchanged": {"swiglu": lambda gate, up: DEFINITIONS.swiglu(up, gate)},
    "direction": {"rope": wrong_rope},
    "keys not rotated": {"rope": lambda q, k, *args: (DEFINITIONS.rope(q, k, *args)[0], k)},
}


@one_family()
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_an_operator_is_found(fault, pack, model):
    family = family_of(model)
    stock = run(model, family, pack)
    family.operators = DEFINITIONS._replace(**fault)
    ours = run(model, family, pack)
    with pytest.raises(AssertionError):
        assert_stock(ours, stock)
    assert relative(ours[1], stock[1]) > 1e-5


@one_family()
def test_prefill(make, model, processor):
    """The engine computes prompts with the operators, and samples the same tokens."""
    prompts, family = [make.prompt("Where?", (56,)), make.prompt("What?")], family_of(model)

    def generated() -> list[list[int]]:
        engine = NativeEngine(model, family, processor.tokenizer)
        return tokens(engine.generate(prompts, 2, SamplingSettings(4, greedy=True)))

    stock = generated()
    family.operators, calls = counted(DEFINITIONS)
    assert generated() == stock and calls == expected_calls(model)


@one_family()
def test_hooks_run_as_before(pack, model):
    """Engines that shard weights gather them in hooks of the modules that have them."""
    family, calls = family_of(model), Counter[str]()
    for name, module in model.named_modules():
        if next(module.parameters(), None) is None:
            continue
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        module.register_full_backward_hook(lambda *_, name=name: calls.update([f"{name} backward"]))
    run(model, family, pack)
    stock = Counter(calls)
    calls.clear()
    family.operators = DEFINITIONS
    run(model, family, pack)
    assert stock == calls and len(stock) > 100


@one_family()
def test_an_adapter(pack, model, processor, tmp_path):
    """The base layers of adapted projections read a norm's output in the dtype of autocast too."""
    base = lora_trainer(model, processor, tmp_path, **LORA).policy.model
    family = family_of(base)
    stock = run(base, family, pack)
    family.operators, calls = counted(DEFINITIONS)
    assert_stock(run(base, family, pack), stock)
    assert calls == expected_calls(base)


@one_family()
def test_nothing_stays_bound(model):
    """Neither in classes and modules of the library, nor after an error; an enclosing block goes on."""
    module = sys.modules[type(model).__module__]

    def library() -> dict[str, Any]:
        return {name: vars(value).get("forward") for name, value in vars(module).items() if isinstance(value, type)}

    before, functions = library(), dict(vars(module))
    own = model.model.visual.merger.ln_q
    own.forward = lambda x: x  # another's
    with fused_layers(model, DEFINITIONS):
        names = bound(model)
        with pytest.raises(ZeroDivisionError), fused_layers(model, DEFINITIONS):
            assert bound(model) == names
            raise ZeroDivisionError
        assert bound(model) == names and len(names) > 10
        assert library() == before and vars(module) == functions
    assert bound(model) == ["model.visual.merger.ln_q"]


@one_family()
@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_stock_layers_on_a_cpu(setting, model, processor, tmp_path):
    """No instance has a forward of its own in a pass of the trainer."""
    trainer = trainer_of(model, processor, tmp_path, fused_layers=setting)
    assert trainer.family.operators is None
    with trainer.policy.attention():
        assert not bound(trainer.policy.model)


class OffsetRMSNorm(nn.Module):
    """Gemma's: the weight has an offset."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight, self.eps)


class WideRMSNorm(OffsetRMSNorm):
    """The product with the weight is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(wide(x), wide(self.weight), self.eps).to(x.dtype)


class LearnedRMSNorm(OffsetRMSNorm):
    """Needs more than a weight."""

    learned: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.learned)


class SameRMSNorm(OffsetRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@pytest.mark.parametrize(
    ("kind", "fits"), [*((kind, False) for kind in (OffsetRMSNorm, WideRMSNorm, LearnedRMSNorm)), (SameRMSNorm, True)]
)
def test_norms_that_compute_something_else_are_not_bound(kind, fits):
    norm = kind()
    assert is_rms_norm(norm) == fits
    with fused_layers(nn.Sequential(norm), DEFINITIONS):
        assert ("forward" in vars(norm)) == fits


def test_a_release_of_liger_without_an_operator(monkeypatch, caplog):
    """As 0.8.0: `auto` has stock layers, and says so."""
    liger, ops = ModuleType("liger_kernel"), SimpleNamespace(LigerRMSNormFunction=torch.autograd.Function)
    liger.ops, liger.__spec__ = ops, ModuleSpec("liger_kernel", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", liger)
    monkeypatch.setattr("vlmr1.models.fused_layers.liger_operators", liger_operators.__wrapped__)
    with pytest.raises(SettingError, match=r"fused_layers=liger: liger-kernel [\w. ]+ cannot be used .*LigerFused"):
        operators_for("liger", "cuda")
    assert operators_for("auto", "cuda") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "liger-kernel" in caplog.text


# A plan


def test_a_plan_counts_fused_layers():
    """For a GPU, where `auto` means Liger's kernels."""
    planner, settings = Planner(), {"bf16": True, "beta": 0.0, "prompts_per_device": 1}

    def activations(setting: str) -> int:
        return planner.plan(job(fused_layers=setting, **settings)).phases["policy"]["activations"]

    assert activations("auto") < 0.75 * activations("torch")
