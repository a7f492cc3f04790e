"""Particulars of the Triton implementations: blocks, buffers, dtypes, levels and grids."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmr1_kernels import GRPOSettings, group_advantages, grpo_loss, linear_grpo_loss, linear_logprob
from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.testing import (
    HEAD,
    Inputs,
    Problem,
    assert_within_budget,
    cast,
    eager_logprob,
    gradients,
    pooled,
    relative_error,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vlmr1_kernels.triton import head, sequences, softmax  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = softmax.LAUNCH["BLOCK"]
EVERYTHING: dict[str, Any] = {"beta": 0.2, "tis_cap": 1.1, "delta": 1.5, "temperature": 0.7}


def chunk(problem: Problem, rows: int) -> float:
    """The `chunk_mib` for a number of rows."""
    return rows * problem.vocab * 4 / 2**20


def run(problem: Problem, impl: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a drawn call."""
    inputs = cast(problem.draw(seed, dtype if dtype != torch.float64 else torch.float32), dtype, DEVICE)
    loss, _ = linear_grpo_loss(**inputs, softcap=problem.softcap, settings=problem.settings, impl=impl, **options)
    return loss, gradients(loss, inputs)


VOCABULARIES = {
    "one element": 1,
    "less than a block": 1001,
    "one block": BLOCK,
    "one more": BLOCK + 1,
    "several": 3 * BLOCK + 777,
}


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES.keys())
@pytest.mark.parametrize(
    "settings", [GRPOSettings(**EVERYTHING), GRPOSettings(entropy_coef=0.1)], ids=["all", "entropy"]
)
def test_rows_of_any_width(vocab: int, settings: GRPOSettings, poison: None) -> None:
    problem = Problem((2, 1, 2), 16, vocab, settings, bias=True)
    loss, ours = run(problem, "triton", torch.float32, chunk_mib=chunk(problem, 2))
    expected_loss, expected = run(problem, "reference", torch.float64)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    for value, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-7)


@pytest.fixture
def count_gemms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GEMMs of a call, by name."""
    calls: list[str] = []

    def counted(name: str, gemm: Callable[..., Any], *args: Any, **options: Any) -> Any:
        calls.append(name)
        return gemm(*args, **options)

    for name in ("project_into", "hidden_grad", "accumulate_weight_grad"):
        monkeypatch.setattr(head, name, partial(counted, name, getattr(head, name)))
    return calls


SEQUENCE_LEVEL: dict[str, tuple[dict[str, Any], tuple[str, ...], int, int]] = {
    # settings, what is trained, rows a chunk, GEMMs for each of the chunks
    "one chunk": ({}, HEAD, 20, 3),
    "trained head": (EVERYTHING, HEAD, 4, 4),
    "frozen head": (EVERYTHING, ("hidden",), 4, 2),
    "frozen head and entropy": ({"entropy_coef": 0.1}, ("hidden",), 4, 3),
    "frozen head, no gradient of the ratio": ({"loss_type": "cispo", "epsilon_high": 1.2}, ("hidden",), 4, 2),
    "only the head": ({"beta": 0.1}, ("weight", "bias"), 4, 3),
}


@pytest.mark.parametrize(("settings", "trained", "rows", "gemms"), SEQUENCE_LEVEL.values(), ids=SEQUENCE_LEVEL.keys())
def test_sequence_level_over_chunks(
    settings: dict[str, Any], trained: tuple[str, ...], rows: int, gemms: int, count_gemms: list[str], poison: None
) -> None:
    chosen = GRPOSettings(importance_level="sequence", **settings)
    problem = Problem((5, 1, 7, 2), 16, 37, chosen, bias=True)
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = cast(problem.draw(0, torch.float32), dtype, DEVICE)
        for name in set(HEAD) - set(trained):
            inputs[name].requires_grad_(False)
        loss, metrics = linear_grpo_loss(**inputs, settings=chosen, impl=impl, chunk_mib=chunk(problem, rows))
        wanted = torch.autograd.grad(loss, [inputs[name] for name in trained])
        numbers = {name: metrics[name] for name in ("kl", "entropy", "clip_low", "clip_high", "ratio_max", "logp")}
        results.append([loss, *wanted, *numbers.values()])
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) < 2e-6
    assert len(count_gemms) == gemms * -(-problem.rows // rows)


@pytest.mark.parametrize("settings", [GRPOSettings(), GRPOSettings(loss_type="gspo")], ids=["token", "sequence"])
def test_dropped_rows_in_chunks(settings: GRPOSettings, poison: None) -> None:
    problem = Problem((3, 2, 1, 5, 0, 4), 16, 37, settings)
    rewards = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.5, 1.5])
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs: dict[str, Any] = cast(problem.draw(0, torch.float32), dtype, DEVICE)
        active = (inputs["seq_ids"] < 2) | (inputs["seq_ids"] > 3)
        rows = active.nonzero()[:, 0]
        inputs |= {"advantages": None, "rewards": rewards.to(DEVICE, dtype), "num_generations": 2}
        options = {"active_rows": rows, "chunk_mib": chunk(problem, 4), "check": True}
        loss, metrics = linear_grpo_loss(**inputs, settings=settings, impl=impl, **options)
        assert torch.equal(metrics["logp"].isnan(), ~active)
        results.append([loss, *gradients(loss, inputs), metrics["ratio_max"], metrics["logp"][active]])
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) < 2e-6
    assert results[0][1][~active].abs().max() == 0


@pytest.fixture
def half_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMMs that read half precision and accumulate and write float32, as on CUDA."""
    if DEVICE == "cuda":
        return

    def project_into(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        logits.copy_(hidden.float() @ weight.float().T)

    def hidden_grad(d_logits: Tensor, weight: Tensor) -> Tensor:
        assert d_logits.dtype == weight.dtype
        return d_logits.float() @ weight.float()

    def accumulate_weight_grad(accumulator: Tensor, d_logits: Tensor, hidden: Tensor, beta: int = 1) -> None:
        assert d_logits.dtype == hidden.dtype
        accumulator.addmm_(d_logits.float().T, hidden.float(), beta=beta)

    monkeypatch.setattr(head, "gemm_operand", lambda matrix: matrix)
    for replacement in (project_into, hidden_grad, accumulate_weight_grad):
        monkeypatch.setattr(head, replacement.__name__, replacement)


WIDE = Problem((1, 2), 16, 151_936, GRPOSettings(**EVERYTHING), bias=True, softcap=8.0)
TOKEN = Problem((9, 1, 14), 32, BLOCK + 99, GRPOSettings(**EVERYTHING))
ENTROPY = Problem((3, 4), 32, 500, GRPOSettings(entropy_coef=0.1), bias=True, softcap=4.0)
SEQUENCE = Problem((3, 4, 2), 32, 500, GRPOSettings(loss_type="gspo", beta=0.1))

BUDGETS: dict[str, tuple[Problem, torch.dtype, int]] = {
    # the problem, its dtype, rows a chunk
    "whole vocabulary, float32": (WIDE, torch.float32, 2),
    "whole vocabulary, bfloat16": (WIDE, torch.bfloat16, 2),
    "token level, bfloat16": (TOKEN, torch.bfloat16, 9),
    "token level, float16": (TOKEN, torch.float16, 9),
    "entropy, bfloat16": (ENTROPY, torch.bfloat16, 3),
    "entropy, float16": (ENTROPY, torch.float16, 3),
    "sequence level, bfloat16": (SEQUENCE, torch.bfloat16, 4),
    "sequence level, float16": (SEQUENCE, torch.float16, 4),
}


def eager_loss(inputs: Inputs, problem: Problem) -> Tensor:
    inputs = dict(inputs)
    named = {name: inputs.pop(name) for name in (*HEAD, "targets") if name in inputs}
    settings = problem.settings
    logp, entropy = eager_logprob(**named, temperature=settings.temperature, softcap=problem.softcap)
    coefficient = settings.entropy_coef
    plain = GRPOSettings(**{**vars(settings), "entropy_coef": 0.0})
    loss, _ = grpo_loss(logp, **inputs, settings=plain, impl="reference")
    if coefficient:
        lengths = torch.bincount(inputs["seq_ids"])
        loss = loss - coefficient * (entropy / lengths[inputs["seq_ids"]]).sum() / len(lengths)
    return loss


@pytest.mark.parametrize(("problem", "dtype", "rows"), BUDGETS.values(), ids=BUDGETS.keys())
def test_error_is_within_budget_with_operands_as_on_cuda(
    problem: Problem, dtype: torch.dtype, rows: int, half_operands: None, poison: None
) -> None:
    ours, plain, oracle = [], [], []
    for seed in range(6):
        inputs = problem.draw(seed, dtype)
        loss, found = run(problem, "triton", dtype, seed, chunk_mib=chunk(problem, rows))
        assert {value.dtype for value in found} == {dtype}
        ours.append([loss, *found])
        for results, kind in ((plain, dtype), (oracle, torch.float64)):
            leaves = cast(inputs, kind, DEVICE)
            loss = eager_loss(leaves, problem)
            results.append([loss, *gradients(loss, leaves)])
    names = ("loss", "d_hidden", "d_weight", "d_bias")[: len(ours[0])]
    assert_within_budget(names, pooled(ours), pooled(plain), pooled(oracle))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["large", "below what float16 holds"])
def test_half_precision_gradients_of_log_probs(size: float, dtype: torch.dtype, half_operands: None) -> None:
    problem = Problem((11,), 32, 700)
    values, oracle = [], []
    for results, kind, impl in ((values, dtype, "triton"), (oracle, torch.float64, "reference")):
        inputs = cast(problem.draw(0, dtype), kind, DEVICE)
        named = {name: inputs[name] for name in ("hidden", "weight", "targets")}
        options = {"entropy": True, "chunk_mib": chunk(problem, 4), "impl": impl}
        logp, entropy = linear_logprob(**named, **options)
        mix = torch.linspace(-1, 2, 11, device=DEVICE, dtype=logp.dtype)
        # The factor that the loss scaler of a trainer would take out again.
        loss = size * ((mix * logp).sum() + (mix.flip(0) * entropy).sum())
        results.extend(gradient.double() / size for gradient in gradients(loss, inputs))
    spacing = 2**-24 / size if dtype == torch.float16 else 0.0  # of the smallest float16, which the result is in
    for value, truth in zip(values, oracle, strict=True):
        floor = spacing * truth.numel() ** 0.5 / truth.norm().item()
        assert relative_error(value, truth) < 2 * torch.finfo(dtype).eps + floor


@pytest.mark.parametrize("settings", [GRPOSettings(), GRPOSettings(loss_type="gspo")], ids=["token", "sequence"])
def test_no_rows_in_float16(settings: GRPOSettings, poison: None) -> None:
    inputs = cast(Problem((0, 0), 8, 20, bias=True).draw(0, torch.float16), torch.float16, DEVICE)
    loss, metrics = linear_grpo_loss(**inputs, settings=settings, impl="triton")
    logp, _ = linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"], entropy=True, impl="triton")
    assert (loss.item(), metrics["entropy"].item(), logp.shape) == (0, 0, (0,))
    assert [gradient.abs().sum().item() for gradient in gradients(loss, inputs)] == [0, 0, 0]
    assert torch.autograd.grad(logp.sum(), inputs["weight"])[0].abs().max() == 0


def test_forbidden_tokens_have_no_part_in_anything() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(4, 8, device=DEVICE), torch.randn(90, 8, device=DEVICE)
    bias = torch.zeros(90, device=DEVICE)
    bias[30:] = -torch.inf
    targets = torch.tensor([0, 7, 29, 3], device=DEVICE)
    results = []
    for size in (90, 30):
        leaves = [hidden.clone().requires_grad_(), weight[:size].clone().requires_grad_()]
        logp, entropy = linear_logprob(*leaves, targets, bias=bias[:size], entropy=True, impl="triton")
        d_hidden, d_weight = torch.autograd.grad((logp + entropy).sum(), leaves)
        results.append([logp, entropy, d_hidden, d_weight[:30]])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hidden", "old_logp", "ref_logp", "sampling_logp", "advantages"])
def test_nan_is_not_lost_in_a_clip(name: str) -> None:
    problem = Problem((3, 2), 8, 40, GRPOSettings(**EVERYTHING))
    inputs = cast(problem.draw(0, torch.float32), torch.float32, DEVICE)
    inputs[name].data.view(-1)[0] = torch.nan
    loss, _ = linear_grpo_loss(**inputs, settings=problem.settings, impl="triton")
    assert loss.isnan()
    assert gradients(loss, inputs)[0].isnan().any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"epsilon_low": 0.0}, {"epsilon_high": 0.0}, {"epsilon_low": 0.0, "epsilon_high": 0.0}],
    ids=["inside", "on the lower bound", "on the upper bound", "on both"],
)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "ratio 1"])
def test_ties_of_the_clip_pass_the_whole_gradient(settings: dict[str, float], on_policy: bool) -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5], device=DEVICE, requires_grad=True)
    ids, advantages = torch.tensor([0, 0, 1], device=DEVICE), torch.tensor([2.0, -3.0], device=DEVICE)
    old = None if on_policy else logp.detach().clone()
    loss, _ = grpo_loss(logp, ids, advantages, old_logp=old, settings=GRPOSettings(**settings), impl="triton")
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (loss.item(), gradient.tolist()) == (0.5, [-0.5, -0.5, 1.5])


@pytest.mark.parametrize("gap", [1e-4, -3e-2, 0.3, -2.0])
def test_kl_near_its_zero(gap: float) -> None:
    logp = torch.full((7,), -1.25, device=DEVICE, requires_grad=True)
    ref = logp.detach() + gap
    ids, nothing = torch.zeros(7, dtype=torch.int32, device=DEVICE), torch.zeros(1, device=DEVICE)
    _, metrics = grpo_loss(logp, ids, nothing, ref_logp=ref, settings=GRPOSettings(beta=1.0), impl="triton")
    d = (ref.double() - logp.detach().double())[0]
    assert metrics["kl"].item() == pytest.approx((torch.expm1(d) - d).item(), rel=2e-6)


@pytest.mark.parametrize("generations", [1, 3, 8])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_many_sequences(scale: str, generations: int) -> None:
    count = 66_000 // generations * generations
    rewards = torch.rand(count, device=DEVICE)
    rewards[:generations] = 0.1
    advantages = group_advantages(rewards, generations, scale=scale, impl="triton")
    expected = group_advantages(rewards.double(), generations, scale=scale, impl="reference")
    assert relative_error(advantages, expected) < 1e-6 or generations == 1
    assert advantages[:generations].abs().max() == 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_table_of_many_sequences(loss_type: str) -> None:
    count = 20_000
    lengths = torch.randint(0, 9, (count,))
    lengths[-1] = 0
    ids = torch.arange(count).repeat_interleave(lengths).to(DEVICE)
    kept = ids[ids % 3 != 1]
    settings = GRPOSettings(loss_type=loss_type, max_completion_length=5)
    scores = torch.rand(count, device=DEVICE)
    inputs = LossInputs(ids, scores, None, 1, None, None, None, torch.tensor(7.0, device=DEVICE))
    table = sequences.sequence_table(ids, kept, inputs, settings)
    expected = torch.searchsorted(kept, torch.arange(count + 1, device=DEVICE))
    assert torch.equal(table.first, expected)
    assert torch.equal(table.length.cpu(), lengths.float())
    assert torch.equal(table.advantage, scores)
    share = {"grpo": 1 / (7 * lengths.clamp(min=1)) * (lengths > 0), "dapo": torch.tensor(1 / 7), "dr_grpo": 1 / 35}
    torch.testing.assert_close(table.weight.cpu(), torch.as_tensor(share[loss_type]).expand(count))


def test_views_of_a_larger_tensor() -> None:
    problem = Problem((3, 2, 4), 8, 33, GRPOSettings(**EVERYTHING), bias=True)
    inputs = cast(problem.draw(0, torch.float32), torch.float32, DEVICE)
    loss, _ = linear_grpo_loss(**inputs, settings=problem.settings, impl="triton")
    expected = gradients(loss, inputs)
    moved: Inputs = {}
    for name, value in inputs.items():
        if value.dim() == 1 and name != "bias":
            moved[name] = torch.stack([value, value], dim=1).flatten()[1::2]  # strided, and not aligned
        else:
            padded = torch.zeros(value.shape[0] + 1, *value.shape[1:], device=DEVICE)
            padded[1:] = value.detach()
            moved[name] = padded[1:].requires_grad_()
    moved["targets"], moved["seq_ids"] = moved["targets"].int(), moved["seq_ids"].int()
    other, _ = linear_grpo_loss(**moved, settings=problem.settings, impl="triton")
    assert other.item() == loss.item()
    for value, truth in zip(gradients(other, moved), expected, strict=True):
        torch.testing.assert_close(value, truth)


def tanh_kernel(x, out, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(out + offsets, softmax.tanh(tl.load(x + offsets, mask=mask)), mask=mask)


def test_tanh() -> None:
    x = torch.cat([torch.logspace(-30, 3, 3000), torch.linspace(0.5, 0.7, 1000), torch.tensor([0.0, torch.inf])])
    x = torch.cat([x, -x]).to(DEVICE)
    out = torch.empty_like(x)
    kernel = triton.jit(tanh_kernel)  # here, where the interpreter is asked for
    kernel[(1,)](x, out, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    expected = torch.tanh(x.double())
    assert ((out - expected).abs() <= 2.5e-7 * expected.abs()).all()
