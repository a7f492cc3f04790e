"""bfloat16 on two processes (gloo, CPU) with each engine, against one process: float32 masters, bfloat16 computation.

All draw the tokens that a float32 run drew. How far bfloat16 takes one process from that run is the measure of how far
an engine may be from it: rounding differs, as an engine's weights are bfloat16 between the products too, and so are the
sums of the residual stream; with one process autocast leaves these in float32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForImageTextToText

from tests.helpers.forced import Tokens, recording, repeating
from tests.helpers.two_ranks import ROOT, computed, metrics, resumable, two_ranks, words
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.train import train
from vlmr1.rollout import scheduler

# An epsilon beside which the rounding of gradients is small: else Adam moves weights by signs that are rounding alone.
FULL = {"learning_rate": 1e-3, "adam_epsilon": 1e-2, "beta": 0.04}
LORA = FULL | {"learning_rate": 1e-2, "use_peft": "true", "lora_r": 4, "lora_alpha": 8}
KINDS = {"full": FULL, "lora": LORA, "without KL": FULL | {"beta": 0.0}}
BF16, F32 = "torch.bfloat16", "torch.float32"
# Of what is trained: dtype of the weights that forwards gather or read, and of the export.
CASES = {
    ("zero2", "full"): (BF16, BF16),
    ("zero2", "lora"): (BF16, BF16),
    ("zero3", "full"): (BF16, BF16),
    ("zero3", "lora"): (F32, F32),
    ("fsdp2", "full"): (F32, F32),
    ("fsdp2", "lora"): (F32, F32),
}


@dataclass(frozen=True)
class Run:
    """Metrics by update, and the trained weights after the last."""

    steps: list[dict[str, float]]
    weights: dict[str, Tensor]


def exported(checkpoint: Path) -> dict[str, Tensor]:
    """What a plain `from_pretrained` reads; of an adapter its file."""
    if (checkpoint / "adapter_model.safetensors").exists():
        return load_file(checkpoint / "adapter_model.safetensors")
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").state_dict()


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[Run, Run]]:
    """One process, in float32 and in bfloat16, by kind of run; the tokens are in the folder then."""
    found = {}
    tokens: Tokens = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, settings in KINDS.items():
            runs = []
            for bf16 in ("false", "true"):
                output = folder / f"{kind}-{bf16}"
                patch.setattr(scheduler, "sample_tokens", repeating(tokens) if tokens else recording(tokens))
                train(parse_config(words(folder, output, prompts_per_device=2, use_cpu="true", bf16=bf16, **settings)))
                runs.append(Run(metrics(output), exported(output / "checkpoint-4")))
            found[kind] = tuple(runs)
    (folder / "tokens.json").write_text(json.dumps(list(tokens.items())), encoding="utf-8")
    return found


def run_two(engine: str, folder: Path, output: Path, **more: Any) -> list[dict[str, float]]:
    arguments = words(folder, output, prompts_per_device=1, bf16="true", **more)
    done = two_ranks(engine, arguments, TOKENS=folder / "tokens.json", SEEN=output)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(output)


def distance(one: Run, other: Run, exact: Run) -> float:
    """Of losses, gradient norms and KLs over the updates, each relative to its norm in the float32 run; their root mean
    square. Without a KL only gradient norms: the losses of on-policy updates are 0 but for the rounding of ratios."""
    parts = []
    for name in ("loss", "grad_norm", "kl") if exact.steps[-1]["kl"] else ("grad_norm",):
        rows = torch.tensor([[step[name] for step in run.steps] for run in (one, other, exact)], dtype=torch.float64)
        parts.append((rows[0] - rows[1]).norm() / rows[2].norm())
    return float(torch.stack(parts).square().mean().sqrt())


def change(weights: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    """How far the weights have moved, in one row; of an adapter its B, which begin as zeros."""
    names = [name for name in sorted(weights) if "lora_A" not in name]
    return torch.cat([(weights[name].double() - start.get(name, torch.zeros(()))).flatten() for name in names])


def masters_of(engine: str, checkpoint: Path) -> dict[str, Tensor]:
    """The float32 weights that the engine keeps, read by its own tool; FSDP exports them."""
    if engine == "fsdp2":
        return exported(checkpoint)
    state: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
    return {name.replace(".default.weight", ".weight"): value for name, value in state.items()}


def state_dtypes(engine: str, checkpoint: Path) -> set[str]:
    """Of all in the optimizer's state that is as large as weights: masters and moments."""
    if engine == "fsdp2":
        kept = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata.values()
        large_ones = [each for each in kept if isinstance(each, TensorStorageMetadata) and each.size.numel() > 1]
        return {str(each.properties.dtype) for each in large_ones}
    files = list(checkpoint.glob("global_step*/*optim_states.pt"))
    assert len(files) == 2
    return {str(each.dtype) for file in files for each in large(torch.load(file, weights_only=False))}


def large(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in large(each)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1 else []


def check_dtypes(engine: str, output: Path, working: str, trained: int) -> None:
    """What every rank saw: log-probs and sums over ranks are float32, whatever the weights are."""
    assert state_dtypes(engine, output / "checkpoint-4") == {F32}
    for rank in range(2):
        seen = json.loads((output / f"seen-{rank}.json").read_text(encoding="utf-8"))
        assert seen["returned"]["policy"] == seen["returned"]["reference"] == [F32]
        assert seen["weights"]["trained"] == [working]
        assert BF16 not in seen["added"]
        assert seen["added"][F32] >= 4 * trained  # every gradient of four updates


def check_nearness(engine: str, run: Run, exact: Run, single: Run) -> None:
    """At most twice as far from float32 as bfloat16 with one process: what is reported, and the weights' change."""
    own, apart = distance(single, exact, exact), distance(run, exact, exact)
    assert 0 < own < 0.25 and apart < 2 * own, (own, apart)
    start = exported(ROOT / "vlmr1/tiny/checkpoint")
    rounded = start if engine == "fsdp2" else {name: value.bfloat16() for name, value in start.items()}  # as ZeRO reads
    path = change(exact.weights, start)
    own = float((change(single.weights, start) - path).norm() / path.norm())
    apart = float((change(run.weights, rounded) - path).norm() / path.norm())
    assert 0 < own < 0.1 and apart < 2 * own, (own, apart)


@pytest.mark.slow
@pytest.mark.parametrize("engine, kind", [pytest.param(*case, id="-".join(case)) for case in CASES])
def test_bf16_on_two_ranks(engine, kind, folder, alone, tmp_path):
    """One rank has no image in the first update; the checkpoint lies between two updates of one generation."""
    working, written = CASES[engine, kind]
    exact, single = alone[kind]
    found = run_two(engine, folder, tmp_path / "run", **KINDS[kind])
    assert found[0]["kl"] == 0  # policy and reference round alike
    checkpoint = tmp_path / "run" / "checkpoint-4"
    masters, weights = masters_of(engine, checkpoint), exported(checkpoint)
    assert {str(value.dtype) for value in weights.values()} == {written}
    for name, value in weights.items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(value, masters[name].to(value.dtype)), name
    check_dtypes(engine, tmp_path / "run", working, sum(map(torch.numel, masters.values())) - tied(masters))

    check_nearness(engine, Run(found, masters), exact, single)

    again = run_two(engine, folder, resumable(tmp_path / "run", tmp_path / "resumed"), **KINDS[kind])
    assert [computed(step) for step in again] == [computed(step) for step in found]
    resumed = exported(tmp_path / "resumed" / "checkpoint-4")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def tied(weights: dict[str, Tensor]) -> int:
    """Numbers that are there twice: the head's are the embeddings'."""
    return weights["lm_head.weight"].numel() if "lm_head.weight" in weights else 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bf16_where_a_rank_has_no_signal(engine, folder, alone, tmp_path):
    """Without a KL, groups of equal rewards have no part in the passes: one rank has nothing else in an update."""
    exact, single = alone["without KL"]
    found = run_two(engine, folder, tmp_path, **KINDS["without KL"])
    assert found[1]["dropped_rows"] == exact.steps[1]["dropped_rows"] > 0
    check_nearness(engine, Run(found, masters_of(engine, tmp_path / "checkpoint-4")), exact, single)
