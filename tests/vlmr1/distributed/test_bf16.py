"""bfloat16 on two processes (gloo, CPU) with each engine: float32 masters, bfloat16 computation.

The oracle is one process with the same arithmetic, which an engine equals but for the order of float32 sums. A float32
run would be none: in four updates bfloat16 leaves it by 3 to 20%, as rounding has it on a processor. All runs draw the
tokens that a float32 run drew."""

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
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from tests.helpers.bf16_ranks import AsEngine, OnCPU
from tests.helpers.forced import Tokens, recording
from tests.helpers.forked_ranks import assert_resumes, run_forked
from tests.helpers.two_ranks import ENGINES, ROOT, assert_close, run_alone
from vlmr1.rollout import scheduler

# An epsilon beside which the rounding of gradients is small: else Adam moves weights by signs that are rounding alone.
# One pass a group, of which each rank has one, and no clipping: sums and norms of float32 have one order.
# Stock layers in decode steps too, as where weights are sharded.
FULL = {"learning_rate": 1e-3, "adam_epsilon": 5e-2, "beta": 0.04, "pack": "false", "max_grad_norm": 100.0}
FULL |= {"fused_layers": "torch"}
LORA = FULL | {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "use_peft": "true", "lora_r": 4, "lora_alpha": 8}
KINDS = {"full": FULL, "lora": LORA, "without KL": FULL | {"beta": 0.0}}
BF16, F32 = "torch.bfloat16", "torch.float32"
# Of what is trained: dtype of the weights that forwards gather or read, and that are exported.
CASES = {(engine, kind): BF16 if engine == "zero2" else F32 for engine in ENGINES[1:] for kind in ("full", "lora")}
CASES["zero3", "full"] = BF16


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
def exact(folder: Path) -> Run:
    """One process in float32, whose tokens are in the folder then."""
    tokens: Tokens = {}
    output = folder / "exact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "sample_tokens", recording(tokens))
        found = run_alone(folder, output, **FULL)
    (folder / "tokens.json").write_text(json.dumps(list(tokens.items())), encoding="utf-8")
    return Run(found, exported(output / "checkpoint-4"))


def run_as(engine: str, folder: Path, output: Path, **more: Any) -> Run:
    """One process with the arithmetic of this engine."""
    tokens = dict(json.loads((folder / "tokens.json").read_text(encoding="utf-8")))
    more |= {"bf16": "true", "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patch:
        process = AsEngine(engine, tokens, patch)
        found = run_alone(folder, output, **more)
    return Run(found, process.weights)


def on_two(folder: Path, output: Path, kind: str) -> dict[str, Any]:
    """What a run on two ranks is given; what they see goes to `output`."""
    output.mkdir()
    return {"prepare": OnCPU(folder / "tokens.json", output), "bf16": "true", **KINDS[kind]}


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
    """For all in the optimizer's state that is as large as weights: masters and moments."""
    if engine == "fsdp2":
        kept = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata.values()
        large_ones = [each for each in kept if isinstance(each, TensorStorageMetadata) and each.size.numel() > 1]
        return {str(each.properties.dtype) for each in large_ones}
    files = list(checkpoint.glob("global_step*/*optim_states.pt"))
    assert len(files) == 2
    return {str(each.dtype) for file in files for each in large(torch.load(file, weights_only=False))}


def large(value: Any) -> list[Tensor]:
    tensors = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
    return [each for each in tensors if each.is_floating_point() and each.numel() > 1]


def check_dtypes(engine: str, output: Path, working: str, trained: int) -> None:
    """What every rank saw: log-probs and sums over ranks are float32, whatever the weights are."""
    assert state_dtypes(engine, output / "checkpoint-4") == {F32}
    for rank in range(2):
        seen = json.loads((output / f"seen-{rank}.json").read_text(encoding="utf-8"))
        assert seen["returned"]["policy"] == seen["returned"]["reference"] == [F32]
        assert seen["trained"] == [working]
        assert BF16 not in seen["added"]
        assert seen["added"][F32] >= 4 * trained  # every gradient of four updates


def check_same(found: list[dict[str, float]], masters: dict[str, Tensor], single: Run) -> None:
    """Reported metrics, and the masters after the last update."""
    for one, other in zip(found, single.steps, strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (name, one["step"])
    assert_close({name: masters[name] for name in single.weights}, single.weights, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_bf16_is_near_float32(folder, exact, tmp_path):
    """By the change of weights in four updates, of one process with the arithmetic of the engines."""
    start = exported(ROOT / "vlmr1/tiny/checkpoint")
    single = run_as("fsdp2", folder, tmp_path, **FULL)
    path = change(single.weights, start)
    names = single.weights.keys()
    expected = change({name: exact.weights[name] for name in names}, start)
    assert 0 < (path - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("engine, kind", CASES)
def test_bf16_on_two_ranks(engine, kind, folder, exact, tmp_path):
    """One rank has no image in the first update; the checkpoint lies between two updates of one generation."""
    single = run_as(engine, folder, tmp_path / "alone", **KINDS[kind])
    more = on_two(folder, tmp_path / "run", kind)
    found = run_forked(engine, folder, tmp_path / "run", **more)
    assert found[0]["kl"] == 0  # policy and reference round alike
    checkpoint = tmp_path / "run" / "checkpoint-4"
    masters, weights = masters_of(engine, checkpoint), exported(checkpoint)
    assert {str(value.dtype) for value in weights.values()} == {CASES[engine, kind]}
    for name, value in weights.items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(value, masters[name].to(value.dtype)), name
    check_dtypes(engine, tmp_path / "run", CASES[engine, kind], sum(map(torch.numel, masters.values())) - tied(masters))
    check_same(found, masters, single)

    if kind == "lora":
        return  # what resumes is the engine's state, whatever is trained
    resumed = exported(assert_resumes(engine, folder, tmp_path / "run", **more) / "checkpoint-4")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def tied(weights: dict[str, Tensor]) -> int:
    """Numbers that are there twice: the head's are the embeddings'."""
    return weights["lm_head.weight"].numel() if "lm_head.weight" in weights else 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bf16_where_a_rank_has_no_signal(engine, folder, exact, tmp_path):
    """Without a KL, groups of equal rewards have no part in the passes: one rank has nothing else in an update."""
    single = run_as(engine, folder, tmp_path / "alone", **KINDS["without KL"])
    found = run_forked(engine, folder, tmp_path / "run", **on_two(folder, tmp_path / "run", "without KL"))
    assert found[1]["dropped_rows"] == single.steps[1]["dropped_rows"] > 0
    check_same(found, masters_of(engine, tmp_path / "run" / "checkpoint-4"), single)
