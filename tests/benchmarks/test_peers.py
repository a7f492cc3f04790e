"""Peers: their updates are those of our naive trainer, the work that is claimed, and workers with a time limit."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import model as bench_model
from benchmarks.arms import arms_of, settings_of
from benchmarks.harness import require_equal
from benchmarks.peers import worker
from benchmarks.peers.client import Worker
from benchmarks.trainer_arm import Bed, TrainerArm
from tests.helpers.small_bench import SMALL, gone


@pytest.fixture(scope="module")
def trl(tmp_path_factory: Any) -> Iterator[worker.Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_model.SHAPES, "small", SMALL)
        yield worker.Server("trl", tmp_path_factory.mktemp("peers"), "small", "float32")


@contextmanager
def widths_of(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and positions that each call of the first decoder layer computes."""
    seen: list[tuple[int, int]] = []
    projection = model.model.language_model.layers[0].self_attn.q_proj
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    yield seen
    hook.remove()


@pytest.mark.slow
def test_updates_are_those_of_the_naive_trainer(trl: worker.Server, tmp_path: Path):
    made, _ = arms_of("cpu", {})
    naive = TrainerArm("naive", Bed(tmp_path, SMALL, "cpu", "float32"), settings_of(made, "naive")).figures()
    assert abs(naive["loss"]) > 1e-3 and naive["grad_norm"] > 1e-1
    require_equal({"naive": naive, "trl": trl.answer("figures")}, 1e-4)


def test_a_step_draws_with_a_cache_and_moves_the_weights(trl: worker.Server):
    head = trl.model.lm_head.weight
    before = head.detach().clone()
    with widths_of(trl.model) as seen:
        assert trl.answer("seconds") > 0
    drawn = [positions for positions in seen if positions[1] == 1]
    assert drawn == [(SMALL.num_generations * 2, 1)] * (SMALL.completion_length - 1)
    assert not torch.equal(head, before) and head.grad is None


def test_trl_sees_the_prompts_of_the_groups(trl: worker.Server):
    trl.answer("seconds")
    wanted = trl.groups[0].prompt.input_ids.repeat(SMALL.num_generations, 1)
    drawn = trl.trainer.trainer._buffered_inputs
    assert len(drawn) == 2 and all(torch.equal(batch["prompt_ids"], wanted) for batch in drawn)


@contextmanager
def process(folder: Path, program: str, limit: float = 60.0) -> Iterator[Worker]:
    head = "import sys, os, subprocess\nfrom signal import signal, SIGTERM, SIG_IGN\nfrom time import sleep\n"
    made = Worker([sys.executable, "-c", head + program], folder / "log", limit=limit)
    try:
        yield made
    finally:
        made.kill()


def test_one_that_ended_says_its_last_words(tmp_path: Path):
    with process(tmp_path, "input(); sys.exit('no such thing')") as made:
        for _ in range(2):  # the second request finds it gone
            with pytest.raises(ChildProcessError, match=r"its process ended with status 1: no such thing"):
                made.ask("seconds")


def test_one_that_hangs_in_its_answer_is_ended_at_its_limit_with_what_it_started(tmp_path: Path):
    program = "print(subprocess.Popen(['sleep', '600']).pid, flush=True); signal(SIGTERM, SIG_IGN); input(); "
    with process(tmp_path, f"input(); {program} print('[1, ', end='', flush=True); sleep(600)") as made:
        child = made.ask("pid")
        made.limit = 0.5
        with pytest.raises(ChildProcessError, match=r"no answer in 0\.5 s: its process was ended"):
            made.ask("seconds")
        assert made.process.returncode == -9 and gone(child)
