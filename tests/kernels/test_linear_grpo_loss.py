import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmr1_kernels import GRPOSettings, grpo_loss, linear_grpo_loss, linear_logprob
from vlmr1_kernels.testing import assert_within_budget, eager_logprob, pooled

TINY_CHUNK = 1e-6  # MiB: one row at a time
LENGTHS = [4, 1, 6, 3]
Arguments = dict[str, Any]


def problem(lengths: list[int] = LENGTHS, dim: int = 12, vocab: int = 23, bias: bool = False) -> Arguments:
    count = sum(lengths)
    near = torch.full((count,), -math.log(vocab) - 0.5, dtype=torch.float64)  # of logits with variance 1
    inputs: Arguments = {
        "hidden": torch.randn(count, dim, dtype=torch.float64),
        "weight": dim**-0.5 * torch.randn(vocab, dim, dtype=torch.float64),
        "targets": torch.randint(0, vocab, (count,)),
        "seq_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "advantages": torch.randn(len(lengths), dtype=torch.float64),
    }
    for name in ("old_logp", "ref_logp", "sampling_logp"):
        inputs[name] = near + 0.5 * torch.randn(count, dtype=torch.float64)
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
    return inputs


CASES: dict[str, Arguments] = {
    "grpo": {},
    "bnpo, two-sided clip": {"loss_type": "bnpo", "delta": 1.3, "epsilon_high": 0.28},
    "dapo, k2, entropy": {"loss_type": "dapo", "beta": 0.2, "kl": "k2", "entropy_coef": 0.3},
    "dr_grpo, k1, cold": {
        "loss_type": "dr_grpo",
        "max_completion_length": 9,
        "beta": 0.2,
        "kl": "k1",
        "temperature": 0.3,
    },
    "cispo, entropy, hot": {
        "loss_type": "cispo",
        "epsilon_high": 1.2,
        "entropy_coef": 0.3,
        "temperature": 1.7,
    },
    "gspo": {"loss_type": "gspo"},
    "gspo with everything": {
        "loss_type": "gspo",
        "tis_cap": 1.1,
        "beta": 0.2,
        "delta": 1.2,
        "entropy_coef": 0.3,
        "temperature": 0.7,
    },
    "dapo at sequence level, k3": {"loss_type": "dapo", "importance_level": "sequence", "beta": 0.2},
    "truncated importance sampling": {"tis_cap": 0.9, "beta": 0.1},
}
ORACLE_NAMES = {"epsilon_low": "low", "epsilon_high": "high", "max_completion_length": "max_length"}


def oracle(inputs: Arguments, settings: Arguments, objective: Callable[..., Tensor], lengths: list[int]) -> Tensor:
    """All logits, padded sequences."""
    names = {ORACLE_NAMES.get(name, name): value for name, value in settings.items()}
    temperature = names.pop("temperature", 1.0)
    if "importance_level" in names:
        names["sequence"] = names.pop("importance_level") == "sequence"
    head = {name: inputs[name] for name in ("hidden", "weight", "targets", "bias", "softcap") if name in inputs}
    logp, entropy = eager_logprob(temperature=temperature, **head)
    given = {name: inputs[f"{name}_logp"] for name in ("old", "ref", "sampling")}
    return objective(logp, lengths, inputs["advantages"], entropy=entropy, **given, **names)


def cast(inputs: Arguments, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Arguments:
    """Fresh leaves in `dtype`, rounded to `rounded` before; log-probs and advantages stay in float64."""
    out = dict(inputs)
    for name in ("hidden", "weight", "bias"):
        if inputs.get(name) is not None:
            out[name] = inputs[name].to(rounded or dtype).to(dtype).detach().requires_grad_()
    return out


def leaves(inputs: Arguments) -> list[Tensor]:
    return [inputs[name] for name in ("hidden", "weight", "bias") if inputs.get(name) is not None]


def results(loss: Tensor, inputs: Arguments) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, leaves(inputs))]


@pytest.mark.parametrize("chunk_mib", [None, TINY_CHUNK], ids=["one chunk", "row by row"])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.0}], ids=["plain", "bias and softcap"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_equals_the_padded_formula(
    settings: Arguments, head: Arguments, chunk_mib: float | None, padded_objective: Callable[..., Tensor]
) -> None:
    inputs = cast(problem(bias="bias" in head), torch.float64)
    inputs["softcap"] = head.get("softcap")
    loss, _ = linear_grpo_loss(**inputs, settings=GRPOSettings(**settings), chunk_mib=chunk_mib)
    expected = oracle(inputs, settings, padded_objective, LENGTHS)
    for value, truth in zip(results(loss, inputs), results(expected, inputs), strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lengths", "dim", "vocab"),
    [([1], 64, 32), ([3, 4], 200, 1001), ([61, 1, 66], 65, 8193), ([2, 1], 16, 151_936)],
    ids=["one token", "odd", "long", "wide head"],
)
def test_error_is_within_budget(
    lengths: list[int], dim: int, vocab: int, dtype: torch.dtype, padded_objective: Callable[..., Tensor]
) -> None:
    settings: Arguments = {"beta": 0.1, "entropy_coef": 0.01, "temperature": 0.9}
    problems = [problem(lengths, dim, vocab) for _ in range(6)]

    def run(inputs: Arguments, loss_of: Callable[[Arguments], Tensor], wide: torch.dtype) -> list[Tensor]:
        narrow = cast(inputs, wide if wide == torch.float64 else dtype, dtype)
        for name in ("advantages", "old_logp", "ref_logp", "sampling_logp"):
            narrow[name] = inputs[name].float().to(wide)
        return results(loss_of(narrow), narrow)

    def ours(arguments: Arguments) -> Tensor:
        loss, metrics = linear_grpo_loss(**arguments, settings=GRPOSettings(**settings))
        assert (loss.dtype, metrics["logp"].dtype) == (torch.float32, torch.float32)
        return loss

    def eager(arguments: Arguments) -> Tensor:
        return oracle(arguments, settings, padded_objective, lengths)

    assert_within_budget(
        ("loss", "d_hidden", "d_weight"),
        pooled(run(inputs, ours, torch.float32) for inputs in problems),
        pooled(run(inputs, eager, torch.float32) for inputs in problems),
        pooled(run(inputs, eager, torch.float64) for inputs in problems),
    )


@pytest.mark.parametrize("name", ["grpo", "gspo with everything", "cispo, entropy, hot"])
def test_gradcheck(name: str) -> None:
    inputs = cast(problem([2, 1, 3], 3, 5, bias=True), torch.float64)
    fixed = {key: value for key, value in inputs.items() if key not in ("hidden", "weight", "bias")}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden, weight, bias=bias, settings=GRPOSettings(**CASES[name]), chunk_mib=TINY_CHUNK, **fixed
        )[0]

    if name.startswith("cispo"):  # its loss is not what its gradient descends: the ratio is held constant
        fixed["old_logp"] = None
    assert torch.autograd.gradcheck(function, leaves(inputs))


@pytest.mark.parametrize("with_gradient", [True, False], ids=["training", "no grad"])
def test_metrics_are_those_of_grpo_loss(with_gradient: bool) -> None:
    inputs = cast(problem(), torch.float64)
    with torch.set_grad_enabled(with_gradient):
        loss, metrics = linear_grpo_loss(**inputs, chunk_mib=TINY_CHUNK)
    head = {name: inputs.pop(name) for name in ("hidden", "weight", "targets")}
    logp, entropy = linear_logprob(**head, entropy=True)
    expected_loss, expected = grpo_loss(logp, **inputs)
    expected["entropy"] = entropy.mean()
    assert metrics.keys() == expected.keys()
    assert 0 < metrics["clip_low"] + metrics["clip_high"] < 1
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach())
    torch.testing.assert_close(loss, expected_loss, check_dtype=True)
    assert loss.requires_grad is with_gradient


@pytest.mark.parametrize("form", ["bool", "indices"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_active_rows_are_exact(loss_type: str, form: str) -> None:
    settings = GRPOSettings(loss_type=loss_type)
    inputs = cast(problem(), torch.float64)
    inputs["advantages"] = torch.tensor([0.7, 0.0, 0.0, -1.1], dtype=torch.float64)
    active = inputs["advantages"][inputs["seq_ids"]] != 0
    rows = active if form == "bool" else active.nonzero()[:, 0]
    expected, _ = linear_grpo_loss(**inputs, settings=settings)
    inputs["old_logp"] = inputs["old_logp"].where(active, torch.nan)
    loss, metrics = linear_grpo_loss(**inputs, settings=settings, active_rows=rows, chunk_mib=TINY_CHUNK, check=True)
    values = results(loss, inputs)
    for value, truth in zip(values, results(expected, inputs), strict=True):
        torch.testing.assert_close(value, truth)
    assert values[1][~active].abs().max() == 0
    assert (metrics["tokens"].item(), metrics["dropped_rows"].item()) == (14, 7)
    assert torch.equal(metrics["logp"].isnan(), ~active)


@pytest.mark.parametrize("count", [0, 3], ids=["no rows", "no active rows"])
@pytest.mark.parametrize("settings", [GRPOSettings(), GRPOSettings(loss_type="gspo")], ids=["grpo", "gspo"])
def test_nothing_to_do_gives_zeros(count: int, settings: GRPOSettings) -> None:
    inputs = cast(problem([count, 0]), torch.float32)
    inputs["advantages"] = torch.zeros(2)
    active = torch.zeros(count, dtype=torch.bool) if count else None
    loss, metrics = linear_grpo_loss(**inputs, settings=settings, active_rows=active, check=True)
    loss, d_hidden, d_weight = results(loss, inputs)
    assert (loss.item(), d_hidden.abs().sum().item(), d_weight.abs().sum().item()) == (0, 0, 0)
    assert (d_hidden.shape, metrics["tokens"].item()) == ((count, 12), count)


class _Watch(TorchDispatchMode):
    """Counts GEMMs, and the largest tensor that any op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.gemms += 1
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize(
    ("trained", "settings", "gemms"),
    [
        (("hidden", "weight"), {}, 3),
        (("hidden",), {}, 2),
        (("weight",), {}, 2),
        ((), {}, 1),
        (("hidden", "weight"), {"loss_type": "gspo"}, 4),
    ],
    ids=["trained", "frozen head", "head only", "evaluation", "sequence level"],
)
def test_gemms_and_memory(trained: tuple[str, ...], settings: Arguments, gemms: int) -> None:
    inputs = problem([40, 24], 8, 1024)
    for name in trained:
        inputs[name].requires_grad_()
    chunk_mib = 16 * 1024 * 8 / 2**20  # 16 rows of float64: four chunks
    with _Watch() as watch:
        loss, _ = linear_grpo_loss(**inputs, settings=GRPOSettings(**settings), chunk_mib=chunk_mib)
        if trained:
            loss.backward()
    assert watch.gemms == 4 * gemms
    assert watch.largest <= 16 * 1024


def test_backward_scales_and_can_be_repeated() -> None:
    inputs = cast(problem(), torch.float32)
    loss, _ = linear_grpo_loss(**inputs)
    once = torch.autograd.grad(loss, leaves(inputs), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves(inputs))
    for value, expected in zip(thrice, once, strict=True):
        torch.testing.assert_close(value, 3 * expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": GRPOSettings(beta=0.1)}, "active_rows drops rows of advantage 0, but with beta"),
        ({"settings": GRPOSettings(entropy_coef=0.1)}, "but with entropy_coef they have a loss too"),
        ({"active_rows": torch.ones(3, dtype=torch.bool)}, r"active_rows must be bool \[14\]"),
        ({"active_rows": torch.ones(3)}, "active_rows must be bool or integer"),
        ({"active_rows": torch.tensor([3, 1])}, "active_rows is not in increasing order"),
        ({"active_rows": torch.tensor([14])}, "active_rows must be in 0..13"),
        ({"active_rows": torch.tensor([0, 1])}, "active_rows drops a row whose advantage is not 0"),
        ({"targets": torch.full((14,), 23)}, r"targets must be in 0..22 \(the vocabulary\)"),
        ({"seq_ids": torch.full((14,), -1)}, "seq_ids must be in 0..3"),
        ({"ref_logp": torch.full((14,), torch.nan)}, "ref_logp holds NaN"),
        ({"advantages": torch.full((4,), torch.nan)}, "advantages holds NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: Arguments, message: str) -> None:
    inputs = {**problem(), "active_rows": torch.arange(14), "check": True}
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**{**inputs, **change})
