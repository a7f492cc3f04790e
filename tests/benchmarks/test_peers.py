"""Peers: their updates are those of our naive trainer, the work that is claimed, and workers with a time limit."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from benchmarks import model as bench_model
from benchmarks.arms import arms_of, settings_of
from benchmarks.harness import require_equal
from benchmarks.peers import client, worker
from benchmarks.peers.client import PEERS, Worker
from benchmarks.trainer_arm import Bed, TrainerArm
from tests.helpers.small_bench import SMALL

HERE = ("vlm-r1", "trl")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: Any) -> Iterator[dict[str, worker.Server]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_model.SHAPES, "small", SMALL)
        folder = tmp_path_factory.mktemp("peers")
        yield {name: worker.Server(name, folder, "small", "float32") for name in HERE}


@contextmanager
def widths_of(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and positions that each call of the first decoder layer computes."""
    seen: list[tuple[int, int]] = []
    projection = model.model.language_model.layers[0].self_attn.q_proj
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    yield seen
    hook.remove()


def test_updates_are_those_of_the_naive_trainer(servers: dict[str, worker.Server], tmp_path: Path):
    made, _ = arms_of("cpu", {})
    naive = TrainerArm("naive", Bed(tmp_path, SMALL, "cpu", "float32"), settings_of(made, "naive")).figures()
    assert abs(naive["loss"]) > 1e-3 and naive["grad_norm"] > 1e-1
    require_equal({"naive": naive} | {name: server.answer("figures") for name, server in servers.items()}, 1e-4)


@pytest.mark.parametrize("name", HERE)
def test_a_step_draws_with_a_cache_and_moves_the_weights(servers: dict[str, worker.Server], name: str):
    given = servers[name]
    head = given.model.lm_head.weight
    before, calls = head.detach().clone(), {"vlm-r1": 2, "trl": 1}[name]  # TRL draws all prompts' completions at once
    with widths_of(given.model) as seen:
        assert given.answer("seconds") > 0
    drawn = [positions for positions in seen if positions[1] == 1]
    size, length = SMALL.num_generations, SMALL.completion_length
    assert drawn == [(size * 2 // calls, 1)] * (length - 1) * calls
    assert not torch.equal(head, before) and head.grad is None


def test_vlm_r1_repeats_prompt_and_image_and_normalizes_rewards(servers: dict[str, worker.Server]):
    trainer, group = servers["vlm-r1"].trainer, servers["vlm-r1"].groups[0]
    inputs = trainer.inputs(trainer.samples[0])
    assert all(torch.equal(row, group.prompt.input_ids) for row in inputs["input_ids"])
    assert torch.equal(inputs["pixel_values"], group.prompt.images[0]["pixel_values"].repeat(3, 1))
    # Rewards 0, 1, 2: their mean is 1, their standard deviation (of a sample) is 1.
    found = trainer.advantages(torch.zeros(3, 2, dtype=torch.long))
    assert found.tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001], abs=1e-6)
    assert trainer.generation.top_k == 0


def test_trl_sees_the_prompts_of_the_groups(servers: dict[str, worker.Server]):
    given = servers["trl"]
    given.answer("seconds")
    wanted = given.groups[0].prompt.input_ids.repeat(SMALL.num_generations, 1)
    drawn = given.trainer.trainer._buffered_inputs
    assert len(drawn) == 2 and all(torch.equal(batch["prompt_ids"], wanted) for batch in drawn)


def test_a_worker_answers_line_by_line_and_refuses_what_it_does_not_know(servers: dict[str, worker.Server]):
    answers = io.StringIO()
    worker.serve(servers["vlm-r1"], io.StringIO("seconds\npeak_mib\nsettings\n"), answers)
    seconds, peak, settings = map(json.loads, answers.getvalue().splitlines())
    assert seconds > 0 and (peak is None or isinstance(peak, float))
    assert settings["attention"] == "sdpa" and settings["versions"]["torch"] == torch.__version__
    with pytest.raises(SystemExit, match="'tokens' is none of figures, seconds"):
        servers["vlm-r1"].answer("tokens")


def test_why_a_peer_cannot_run(monkeypatch: Any):
    assert PEERS["vlm-r1"].why_not("cpu") is PEERS["trl"].why_not("cpu") is None
    monkeypatch.setattr(client, "find_spec", lambda name: None if name == "datasets" else object())
    assert PEERS["trl"].why_not("cuda") == "datasets not installed"


# Processes

HANGS = {
    "no answer": "sleep(600)",
    "half an answer": "print('[1, ', end='', flush=True); sleep(600)",
    "deaf to its end": "signal(SIGTERM, SIG_IGN); sleep(600)",
}


@contextmanager
def process(folder: Path, program: str, limit: float = 60.0) -> Iterator[Worker]:
    head = "import sys, os, subprocess\nfrom signal import signal, SIGTERM, SIG_IGN\nfrom time import sleep\n"
    made = Worker([sys.executable, "-c", head + program], folder / "log", limit=limit)
    try:
        yield made
    finally:
        made.kill()


def gone(pid: int) -> bool:
    """Whether it ends soon; a zombie that nobody has waited for counts."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        sleep(0.05)
    return False


def test_it_answers_line_by_line(tmp_path: Path):
    program = "import json\nfor line in sys.stdin: print(json.dumps([line] * 50_000), flush=True)"
    with process(tmp_path, program) as made:
        assert [len(made.ask(word)) for word in ("a", "b")] == [50_000, 50_000]
        made.close()
        assert made.process.returncode == 0


def test_one_that_ended_says_its_last_words(tmp_path: Path):
    with process(tmp_path, "input(); sys.exit('no such thing')") as made:
        for _ in range(2):  # the second request finds it gone
            with pytest.raises(ChildProcessError, match=r"its process ended with status 1: no such thing"):
                made.ask("seconds")


def test_what_one_that_ended_has_left_behind_is_ended(tmp_path: Path):
    program = "input(); print(subprocess.Popen(['sleep', '600']).pid, flush=True); input(); sys.exit('boom')"
    with process(tmp_path, program) as made:
        child = made.ask("pid")
        with pytest.raises(ChildProcessError, match=r"its process ended with status 1: boom"):
            made.ask("seconds")
        assert gone(child)


@pytest.mark.parametrize("program", HANGS.values(), ids=HANGS.keys())
def test_one_that_hangs_is_ended_at_its_limit_with_what_it_started(program: str, tmp_path: Path):
    start = "child = subprocess.Popen(['sleep', '600'])\nfor line in sys.stdin:\n if line == 'pid\\n': "
    with process(tmp_path, f"{start}print(child.pid, flush=True)\n else: {program}") as made:
        child = made.ask("pid")
        made.limit = 0.5
        with pytest.raises(ChildProcessError, match=r"no answer in 0\.5 s: its process was ended"):
            made.ask("seconds")
        assert made.process.returncode == -9 and gone(child)


def test_one_that_goes_on_after_its_input_is_ended(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(client, "CLOSING", 0.2)
    with process(tmp_path, "print(1, flush=True); sleep(600)") as made:
        assert made.ask("seconds") == 1
        made.close()
        assert made.process.returncode == -9
        made.close()  # and once more
