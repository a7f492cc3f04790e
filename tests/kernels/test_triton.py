"""Particulars of the Triton implementations: blocks, buffers, dtypes, levels and grids."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import (
    DEVICE,
    HALVES,
    Case,
    Target,
    check_budget,
    eager_loss_and_gradients,
    loss_and_gradients,
    on_device,
    options_of,
)
from vlmr1_kernels import GRPOSettings, linear_grpo_loss, linear_logprob
from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.testing import Problem, cast, gradients, relative_error

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vlmr1_kernels.triton import head, sequences, softmax  # noqa: E402

pytestmark = on_device
BLOCK = softmax.BLOCK
EVERYTHING: dict[str, Any] = {"beta": 0.2, "tis_cap": 1.1, "delta": 1.5, "temperature": 0.7}


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

    def weight_grad(d_logits: Tensor, hidden: Tensor) -> Tensor:
        assert d_logits.dtype == hidden.dtype
        return (d_logits.float().T @ hidden.float()).to(hidden.dtype)

    def accumulate_weight_grad(accumulator: Tensor, d_logits: Tensor, hidden: Tensor, beta: int = 1) -> None:
        assert d_logits.dtype == hidden.dtype
        accumulator.addmm_(d_logits.float().T, hidden.float(), beta=beta)

    monkeypatch.setattr(head, "gemm_operand", lambda matrix: matrix)
    for replacement in (project_into, hidden_grad, weight_grad, accumulate_weight_grad):
        monkeypatch.setattr(head, replacement.__name__, replacement)


def case_of(lengths: tuple[int, ...], dim: int, vocab: int, rows: int, **settings: Any) -> Case:
    """A case of `rows` rows a chunk."""
    return Case(lengths, dim, vocab, chunk_mib=rows * vocab * 4 / 2**20, draws=6, **settings)


CASES: dict[str, Case] = {
    "token level": case_of((9, 1, 14), 32, BLOCK + 99, 9, settings=GRPOSettings(**EVERYTHING)),
    "entropy": case_of((3, 4), 32, 500, 3, settings=GRPOSettings(entropy_coef=0.1), bias=True, softcap=4.0),
    "sequence level": case_of((3, 4, 2), 32, 500, 4, settings=GRPOSettings(loss_type="gspo", beta=0.1)),
}
WIDE = {"settings": GRPOSettings(**EVERYTHING, entropy_coef=0.1), "bias": True, "softcap": 8.0}
WIDTHS = (1, 1001, BLOCK, BLOCK + 1, 3 * BLOCK + 777, 151_936)
CASES |= {f"{width} wide": case_of((1, 2), 16, width, 2, **WIDE) for width in WIDTHS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_within_budget_with_operands_as_on_cuda(case, dtype, half_operands: None, poison: None) -> None:
    target, ours = Target("", "triton", DEVICE), partial(loss_and_gradients, partial(linear_grpo_loss, impl="triton"))
    check_budget(("loss", "d_hidden", "d_weight", "d_bias"), ours, eager_loss_and_gradients, target, case, dtype)


@pytest.fixture(params=[2, 9], ids=["two chunks a block", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks are consumed at once, as many rows on a GPU."""
    make = head.Head.__init__

    def init(self: Any, inputs: Any, chunks: Any, *others: Any) -> None:
        make(self, inputs, (chunks[0], request.param * chunks[0]), *others)

    monkeypatch.setattr(head.Head, "__init__", init)


@pytest.mark.parametrize("name", ["entropy", "sequence level"])
def test_chunks_of_a_block(name: str, blocks: None, half_operands: None, poison: None) -> None:
    case, dtype = replace(CASES[name], draws=2), torch.bfloat16
    target, ours = Target("", "triton", DEVICE), partial(loss_and_gradients, partial(linear_grpo_loss, impl="triton"))
    check_budget(("loss", "d_hidden", "d_weight", "d_bias"), ours, eager_loss_and_gradients, target, case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradient_of_a_float32_head_is_the_float32_sum_of_products(
    dtype: torch.dtype, blocks: None, half_operands: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, accumulate = torch.zeros(500, 32, dtype=torch.float64, device=DEVICE), head.accumulate_weight_grad

    def record(accumulator: Tensor, d_logits: Tensor, hidden: Tensor, **options: Any) -> None:
        exact.addmm_(d_logits.double().T, hidden.double())
        accumulate(accumulator, d_logits, hidden, **options)

    monkeypatch.setattr(head, "accumulate_weight_grad", record)
    case, inputs = CASES["sequence level"], cast(CASES["sequence level"].draw(0, dtype), dtype, DEVICE)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    _, d_weight = gradients(linear_grpo_loss(**inputs, **options_of(case), impl="triton")[0], inputs)
    scale = 16 if dtype == torch.float16 else 1  # of the gradients of 9 rows
    assert d_weight.dtype == torch.float32
    assert relative_error(scale * d_weight, exact) < 2e-7
    assert relative_error(scale * d_weight.to(dtype), exact) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-7], ids=["large", "below what float16 holds"])
def test_half_precision_gradients_of_log_probs(size: float, dtype: torch.dtype, half_operands: None) -> None:
    check_log_probs(size, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chunks_of_a_block_of_log_probs(dtype: torch.dtype, blocks: None, half_operands: None, poison: None) -> None:
    check_log_probs(1.0, dtype)


def check_log_probs(size: float, dtype: torch.dtype) -> None:
    problem = Problem((11,), 32, 700)
    values, oracle = [], []
    for results, kind, impl in ((values, dtype, "triton"), (oracle, torch.float64, "reference")):
        inputs = cast(problem.draw(0, dtype), kind, DEVICE)
        named = {name: inputs[name] for name in ("hidden", "weight", "targets")}
        options = {"entropy": True, "chunk_mib": 4 * 700 * 4 / 2**20, "impl": impl}
        logp, entropy = linear_logprob(**named, **options)
        mix = torch.linspace(-1, 2, 11, device=DEVICE, dtype=logp.dtype)
        # The factor that the loss scaler of a trainer would take out again.
        loss = size * ((mix * logp).sum() + (mix.flip(0) * entropy).sum())
        results.extend(gradient.double() / size for gradient in gradients(loss, inputs))
    spacing = 2**-24 / size if dtype == torch.float16 else 0.0  # of the smallest float16, which the result is in
    for value, truth in zip(values, oracle, strict=True):
        floor = spacing * truth.numel() ** 0.5 / truth.norm().item()
        assert relative_error(value, truth) < 2 * torch.finfo(dtype).eps + floor


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.slow
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
