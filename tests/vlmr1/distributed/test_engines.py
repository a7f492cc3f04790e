"""Two processes (gloo, CPU) against one: the same losses, gradient norms and rewards for the same global batches."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import assert_resumes, run_forked
from tests.helpers.two_ranks import (
    ENGINES,
    ROOT,
    ROWS,
    assert_same,
    evaluations,
    run_alone,
    run_launched,
    two_ranks,
    words,
)
from vlmr1.distributed.launch import LAUNCHES, launch_command
from vlmr1.errors import SettingError
from vlmr1.models import load_model


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[float, list[dict[str, float]]]:
    """One process with twice the prompts, by beta."""
    return {beta: run_alone(folder, folder / f"alone-{beta}", beta=beta) for beta in (0.0, 0.04)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero3-offload"])
def test_two_ranks_do_what_one_process_does_and_resume_exactly(engine, folder, alone, tmp_path):
    """With a reference model. The checkpoint lies between two updates of one generation. One run is started by
    `--launch`, the others are forked with the same variables and arguments."""
    run = run_launched if engine == "zero3-offload" else run_forked
    found = run(engine, folder, tmp_path / "run", beta=0.04)
    assert_same(found, alone[0.04])
    assert found[1]["kl"] > 0

    resumed = assert_resumes(engine, folder, tmp_path / "run", beta=0.04)
    exported = [load_file(path / "checkpoint-4" / "model.safetensors") for path in (tmp_path / "run", resumed)]
    assert exported[0].keys() == exported[1].keys()
    for name, value in exported[0].items():
        assert torch.equal(value, exported[1][name]), name
    names = load_file(ROOT / "vlmr1/tiny/checkpoint/model.safetensors").keys()
    assert exported[0].keys() | {"lm_head.weight"} == names  # which is tied to the embeddings
    read = load_model(tmp_path / "run" / "checkpoint-4")  # an ordinary directory
    before = load_model(ROOT / "vlmr1/tiny/checkpoint").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in read.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_frozen_tower_that_is_sharded(engine, folder, tmp_path):
    """Its features are made before the passes, also by a run that goes on within a generation; and the ranks share an
    evaluation."""
    more = {"beta": 0.04, "freeze_vision": "true", "eval_steps": 2}
    more |= {"eval_data_file_paths": folder / "data.jsonl", "eval_image_folders": folder}
    expected = run_alone(folder, tmp_path / "alone", **more)
    assert_same(run_forked(engine, folder, tmp_path / "run", **more), expected)
    one, other = evaluations(tmp_path / "run"), evaluations(tmp_path / "alone")
    assert [row["step"] for row in one] == [2, 4] and [row["rows"] for row in one] == [ROWS, ROWS]
    for row, expected in zip(one, other, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert_resumes(engine, folder, tmp_path / "run", **more)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_signal_joins_every_pass(engine, folder, alone, tmp_path):
    """Without a KL, groups of equal rewards have no part in the passes: one rank has nothing else in an update. The
    ranks have fused layers, by their definitions, the process alone stock layers."""
    fused = {"reward_funcs": f"{folder / 'fused.py'}:noise"}
    assert_same(run_forked(engine, folder, tmp_path, beta=0.0, save_strategy="no", **fused), alone[0.0])
    assert alone[0.0][1]["dropped_rows"] > 0


@pytest.mark.slow
def test_the_rank_that_fails_says_why_and_ends_all(folder, tmp_path):
    reward = tmp_path / "bad.py"
    text = "import os\ndef bad(completions, **columns):\n    return "
    reward.write_text(text + "['x' if os.environ['RANK'] == '1' else 0.0 for _ in completions]\n", encoding="utf-8")
    done = two_ranks("ddp", words(folder, tmp_path / "run", prompts_per_device=1, reward_funcs=f"{reward}:bad"))
    assert done.returncode != 0
    assert done.stderr.count(f"vlmr1: rank 1: reward {reward}:bad: returned 'x'") == 1, done.stderr[-3000:]


def test_launch_commands(monkeypatch):
    environment, command = launch_command("zero3", 2, ["--recipe", "rec-3b"])
    config = json.loads(Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == 3
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    at = command.index("vlmr1.cli")
    assert command[at - 1 : at + 4] == ["-m", "vlmr1.cli", "train", "--recipe", "rec-3b"]
    assert "SIGUSR1" in command[command.index("--signals-to-handle") + 1]
    with (
        pytest.raises(SettingError, match=r"--launch zero3 needs deepspeed: pip install 'vlmr1\[scale\]'"),
        monkeypatch.context() as patch,
    ):
        patch.setitem(sys.modules, "deepspeed", None)
        launch_command("zero3", 2, [])
    for name in LAUNCHES:
        if name.startswith("zero"):
            path = Path(LAUNCHES[name]["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
            assert json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"] == int(name[4])
