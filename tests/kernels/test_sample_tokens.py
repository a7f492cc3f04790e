"""Tokens against the interval of their draw in the exact cumulative distribution, log-probs against float64."""

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import Target
from vlmr1.planner.cuda_ops import SAMPLING_BLOCK
from vlmr1_kernels import SamplingOptions, sample_tokens
from vlmr1_kernels.testing import assert_within_budget, eager_sampling

OP = "sample_tokens"
pytestmark = pytest.mark.usefixtures("poison")
LAST = 1 - 2.0**-53  # the greatest draw there is
WIDE = (torch.float64, torch.float32)  # of the oracle, and of plain torch
WIDTH = 1e-6  # a draw so close to the boundary of two tokens may choose either
ROWS, VOCABULARY = 6, 75


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """Several blocks, several groups of blocks, and several groups of suppressed ids, whatever the vocabulary."""
    if target.impl == "triton":
        module = import_module("vlmr1_kernels.triton.sample_tokens")
        for name, value in {"BLOCK": 16, "SLOTS": 2, "IDS": 2}.items():
            monkeypatch.setattr(module, name, value)


small_blocks = pytest.mark.usefixtures("_small_blocks")


def inputs(
    options: SamplingOptions, *, rows: int = ROWS, vocabulary: int = VOCABULARY, suppressed: int = 5, spread: float = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    draws = torch.rand(rows, dtype=torch.float64)
    draws[:2] = torch.tensor([0.0, LAST], dtype=torch.float64)[: len(draws)]
    ids = torch.randperm(vocabulary)[:suppressed]
    return {
        "logits": (spread * torch.randn(rows, vocabulary, dtype=torch.float64)).to(dtype),
        "draws": draws,
        "suppressed_ids": torch.cat([ids, ids[:1]]) if suppressed else None,  # one of them twice
        "seen": torch.rand(rows, vocabulary) < 0.3 if options.repetition_penalty != 1 else None,
        "options": options,
    }


def on(device: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def assert_exact(run: Any, target: Target, given: dict[str, Any]) -> Tensor:
    """Tokens are those of their draws, log-probs are within the error budget; return the tokens."""
    tokens, *logps = (value.cpu() for value in run(**on(target.device, given)))
    exact, plain = (eager_sampling(**given | {"logits": given["logits"].to(dtype)}) for dtype in WIDE)  # [S, V] each
    allowed = exact[1]
    assert bool((allowed.gather(1, tokens[:, None]) > -math.inf).all())
    if given["options"].greedy:
        assert bool((allowed.gather(1, tokens[:, None])[:, 0] >= allowed.amax(1) - WIDTH).all())
    else:
        cumulative = allowed.exp().cumsum(1).gather(1, tokens[:, None])[:, 0]
        before = cumulative - allowed.exp().gather(1, tokens[:, None])[:, 0]
        draws = given["draws"]
        assert bool(((before - WIDTH <= draws) & (draws <= cumulative + WIDTH)).all())
    truth, other = ([values.gather(1, tokens[:, None])[:, 0] for values in each] for each in (exact, plain))
    assert {value.dtype for value in logps} == {torch.float32}
    assert_within_budget(["logp", "sampling_logp"], logps, other, truth)
    return tokens


CASES: dict[str, tuple[SamplingOptions, dict[str, Any]]] = {
    "default": (SamplingOptions(), {}),
    "nothing suppressed": (SamplingOptions(), {"suppressed": 0}),
    "temperature": (SamplingOptions(0.7), {}),
    "greedy": (SamplingOptions(greedy=True), {}),
    "greedy, temperature": (SamplingOptions(1.3, greedy=True), {"suppressed": 9}),
    "min_p": (SamplingOptions(0.9, min_p=0.03), {}),
    "min_p of the first alone": (SamplingOptions(min_p=1.0), {}),
    "penalty": (SamplingOptions(repetition_penalty=1.7), {}),
    "everything": (SamplingOptions(0.8, min_p=0.01, repetition_penalty=1.3), {"suppressed": 9}),
    "one token left": (SamplingOptions(), {"suppressed": 19, "vocabulary": 20}),
    "vocabulary of one": (SamplingOptions(), {"suppressed": 0, "vocabulary": 1}),
    "whole blocks": (SamplingOptions(), {"vocabulary": 64}),
    "flat": (SamplingOptions(), {"spread": 1e-3}),
    "steep": (SamplingOptions(), {"spread": 60.0}),
    "bfloat16": (SamplingOptions(1.1), {"dtype": torch.bfloat16}),
    "float16": (SamplingOptions(), {"dtype": torch.float16}),
}


@small_blocks
@pytest.mark.parametrize(("options", "change"), CASES.values(), ids=CASES.keys())
def test_tokens_are_those_of_their_draws(target: Target, options: SamplingOptions, change: dict[str, Any]) -> None:
    given = inputs(options, **change)
    assert_exact(target.run(given["logits"].dtype), target, given)


def test_a_vocabulary_of_several_blocks(target: Target) -> None:
    given = inputs(SamplingOptions(), rows=3, vocabulary=4500, spread=1.0)
    given["draws"] = torch.tensor([0.3, 0.7, LAST], dtype=torch.float64)
    assert_exact(target.run(torch.float32), target, given)


@small_blocks
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("alone", [0, 15, 16, VOCABULARY - 1])
def test_one_finite_logit_has_all_the_mass(target: Target, alone: int, greedy: bool) -> None:
    for value in (0.0, -3e4, 3e4):
        logits = torch.full((3, VOCABULARY), -math.inf)
        logits[:, alone] = value
        draws = torch.tensor([0.0, 0.5, LAST], dtype=torch.float64)
        run, options = target.run(torch.float32), SamplingOptions(0.5, greedy=greedy)
        tokens, *logps = run(logits.to(target.device), draws.to(target.device), options=options)
        assert tokens.tolist() == [alone] * 3
        assert [each.tolist() for each in logps] == [[0.0] * 3] * 2


@small_blocks
@pytest.mark.parametrize("lead", [20.0, 1000.0])
def test_suppressed_tokens_with_all_the_mass_are_not_drawn(target: Target, lead: float) -> None:
    vocabulary = 20
    logits = torch.zeros(4, vocabulary, device=target.device)
    logits[:, 1:-1] = lead
    logits[:, -1] = math.log(3)
    draws = torch.tensor([0.0, 0.2, 0.3, LAST], dtype=torch.float64, device=target.device)
    ids = torch.arange(1, vocabulary - 1, device=target.device)
    tokens, logp, sampling_logp = target.run(torch.float32)(logits, draws, ids)
    assert tokens.tolist() == [0, 0, vocabulary - 1, vocabulary - 1]
    assert sampling_logp.tolist() == pytest.approx([math.log(share) for share in (0.25, 0.25, 0.75, 0.75)], abs=1e-3)
    mass = lead + math.log(vocabulary - 2)
    assert logp.tolist() == pytest.approx([-mass, -mass, math.log(3) - mass, math.log(3) - mass], rel=1e-5)


@small_blocks
def test_greedy_takes_the_first_of_equal_tokens(target: Target) -> None:
    logits = torch.zeros(3, VOCABULARY, device=target.device)
    for row, places in enumerate([(3, 9), (20, 70), (5, 6, 40)]):
        logits[row, list(places)] = 2.5
    draws, ids = torch.full((3,), 0.9, dtype=torch.float64), torch.tensor([5])
    run = target.run(torch.float32)
    tokens, *_ = run(logits, draws.to(target.device), ids.to(target.device), options=SamplingOptions(greedy=True))
    assert tokens.tolist() == [3, 20, 6]


@small_blocks
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_nan_stays_in_its_row(target: Target) -> None:
    given = inputs(SamplingOptions(), rows=4)
    run = target.run(torch.float32)
    expected = run(**on(target.device, given))
    given["logits"][1, 30] = math.nan
    given["logits"][3] = math.nan
    tokens, *logps = run(**on(target.device, given))
    assert [each.isnan().tolist() for each in logps] == [[False, True, False, True]] * 2
    assert bool(((tokens >= 0) & (tokens < VOCABULARY)).all())
    for values, others in zip((tokens, *logps), expected, strict=True):
        assert torch.equal(values[::2], others[::2])


@small_blocks
def test_strides_do_not_matter_and_no_rows_are_none(target: Target) -> None:
    given = on(target.device, inputs(SamplingOptions(repetition_penalty=1.2), rows=3))
    run = target.run(torch.float32)
    expected = run(**given)
    for name, change in {
        "padded rows": {"logits": torch.nn.functional.pad(given["logits"], (0, 5), value=9e9)[:, :VOCABULARY]},
        "transposed": {name: given[name].T.contiguous().T for name in ("logits", "seen")},
        "every other": {name: given[name].repeat_interleave(2, 0)[::2] for name in ("logits", "draws", "seen")},
    }.items():
        for value, other in zip(run(**given | change), expected, strict=True):
            torch.testing.assert_close(value, other, msg=name)
    none = {name: given[name][:0] for name in ("logits", "draws", "seen")}
    assert [each.shape for each in run(**given | none)] == [(0,)] * 3


def test_the_reference_in_float64_is_the_oracle() -> None:
    options = SamplingOptions(0.8, min_p=0.01, repetition_penalty=1.3)
    given = inputs(options, dtype=torch.float64)
    full, allowed = eager_sampling(**given)
    tokens, logp, sampling_logp = sample_tokens(**given)
    expected = torch.searchsorted(allowed.exp().cumsum(1), given["draws"][:, None], right=True)[:, 0]
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logp, full.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(sampling_logp, allowed.gather(1, tokens[:, None])[:, 0])


def test_the_planner_knows_the_size_of_a_block() -> None:
    pytest.importorskip("triton")
    assert import_module("vlmr1_kernels.triton.sample_tokens").BLOCK == SAMPLING_BLOCK
