"""The peers of whole steps and updates: the objective of the naive trainer, the work that is claimed, the worker."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import model as bench_model
from benchmarks.harness import require_equal
from benchmarks.peers import clock, steps
from benchmarks.peers.vlm_r1 import Form, VLMR1Step
from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer

SMALL = bench_model.Shape(
    bench_model.BENCH_TEXT
    | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    bench_model.BENCH_VISION
    | {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    | {"out_hidden_size": 128},
    image_px=112,
    num_generations=3,
    completion_length=5,
)
PHASES = {"rollout", "reward", "reference", "forward", "backward", "update"}
HERE = ("vlm-r1", "vlm-r1-repaired", "trl")


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    monkeypatch.setitem(bench_model.SHAPES, "small", SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bench_model.write(tmp_path_factory.mktemp("small"), SMALL)


def peer(folder: Path, name: str, kind: str) -> steps.Peer:
    return steps.Peer(name, kind, folder, "small", 2, torch.float32)


def naive(folder: Path, prompts: int, shape: bench_model.Shape) -> dict[str, float]:
    """Loss and gradient norm of our trainer with nothing shared."""
    model, processor = bench_model.read(folder)
    groups = bench_model.groups(folder, model, processor, prompts, shape)
    config = GRPOConfig(
        output_dir=str(folder / "output" / "naive"),
        use_cpu=True,
        num_generations=shape.num_generations,
        max_completion_length=shape.completion_length,
        beta=steps.BETA,
        share_vision=False,
        share_prompt=False,
        pack=False,
        skip_zero_advantage=False,
        report_to="none",
    )
    trainer = GRPOTrainer(model, config, [], processor, reward_funcs=["format"])
    assert trainer.reference is not None
    bench_model.perturb(trainer.reference.model)
    loss = float(update(trainer, groups)[0])
    norms = [each.grad.norm() for each in trainer.model.parameters() if each.grad is not None]
    return {"loss": loss, "grad_norm": float(torch.stack(norms).norm())}


@contextmanager
def widths_of(model: Any):
    """Positions that each call of the first decoder layer computes."""
    seen: list[tuple[int, int]] = []
    projection = model.model.language_model.layers[0].self_attn.q_proj
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    yield seen
    hook.remove()


def test_updates_are_those_of_the_naive_trainer(folder):
    expected = naive(folder, 2, SMALL)
    assert abs(expected["loss"]) > 1e-3 and expected["grad_norm"] > 1e-1
    found = {name: peer(folder, name, "update").figures() for name in HERE}
    require_equal({"naive": expected} | found)


@pytest.mark.slow
def test_worker_at_the_bench_shape(tmp_path):
    """A process of its own answers with JSON alone, and its update is the naive trainer's."""
    bench_model.write(tmp_path)
    given: dict[str, Any] = {"kind": "update", "folder": tmp_path, "shape_name": "bench", "dtype": "float32"}
    words = steps.command("vlm-r1-repaired", prompts=1, threads=1, **given)
    done = subprocess.run(words, input="figures\n", stdout=subprocess.PIPE, text=True, check=True)
    require_equal({"naive": naive(tmp_path, 1, bench_model.BENCH), "vlm-r1-repaired": json.loads(done.stdout)})


@pytest.mark.parametrize("form", [Form(), Form(checkpointing=False, top_k=0)], ids=["published", "repaired"])
def test_rollout_of_vlm_r1_has_a_kv_cache_and_repeats_the_image(folder, form):
    """One position a row and step after the prompt, and the tokens of a generation without cache or checkpoints."""
    model, processor = bench_model.read(folder)
    arm = VLMR1Step(folder, model, processor, 1, steps.BETA, bench_model.spread, form, SMALL)
    arm.generation.do_sample = False
    model.train()
    inputs = arm.inputs(arm.samples[0])
    with widths_of(model) as seen:
        rows = arm.rollout(inputs)
    size, width = SMALL.num_generations, inputs["input_ids"].shape[1]
    assert seen == [(size, width)] + [(size, 1)] * (SMALL.completion_length - 1)
    assert len(inputs["image_grid_thw"]) == size and model.training

    plain, _ = bench_model.read(folder)
    plain.generation_config.eos_token_id = None
    with widths_of(plain) as seen:
        wanted = plain.generate(**inputs, max_new_tokens=SMALL.completion_length, do_sample=False, use_cache=False)
    assert seen[-1] == (size, width + SMALL.completion_length - 1)
    assert torch.equal(rows.input_ids, wanted)


def test_top_k_reaches_the_rollout_of_vlm_r1(folder):
    """Of one token, it is the greedy one, although tokens are sampled."""
    model, processor = bench_model.read(folder)
    arm = VLMR1Step(folder, model, processor, 1, steps.BETA, bench_model.spread, Form(top_k=1), SMALL)
    published, repaired = (peer(folder, name, "step").arm.generation for name in ("vlm-r1", "vlm-r1-repaired"))
    assert (published.top_k, repaired.top_k) == (50, 0)
    drawn = arm.rollout(arm.inputs(arm.samples[0])).completion_ids()
    assert torch.equal(drawn, drawn[:1].expand_as(drawn))
    arm.generation.top_k = 0
    free = arm.rollout(arm.inputs(arm.samples[0])).completion_ids()
    assert not torch.equal(free, free[:1].expand_as(free))


def test_prompt_of_vlm_r1_is_that_of_the_groups(folder):
    model, processor = bench_model.read(folder)
    group = bench_model.groups(folder, model, processor, 1, SMALL)[0]
    arm = VLMR1Step(folder, model, processor, 1, steps.BETA, bench_model.spread, Form(), SMALL)
    inputs = arm.inputs(arm.samples[0])
    for row in inputs["input_ids"]:
        assert torch.equal(row, group.prompt.input_ids)
    patches = group.prompt.images[0]["pixel_values"]
    assert torch.equal(inputs["pixel_values"], patches.repeat(SMALL.num_generations, 1))
    rows = arm.rollout(inputs)
    # Rewards 0, 1, 2: their mean is 1, their standard deviation (of a sample) is 1.
    assert arm.advantages(rows).tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001], abs=1e-6)


CHECKPOINTS = [("vlm-r1", True), ("vlm-r1-repaired", False), ("trl", False)]


@pytest.mark.parametrize(("name", "checkpointing"), CHECKPOINTS, ids=[name for name, _ in CHECKPOINTS])
def test_policy_is_computed_again_where_it_is_checkpointed(folder, name, checkpointing):
    given = peer(folder, name, "update")
    with widths_of(given.model) as seen:
        given.sample()
    assert len(seen) == 2 * (1 + checkpointing)
    assert given.settings()["gradient_checkpointing"] == checkpointing


@pytest.mark.parametrize("name", ["vlm-r1-repaired", "trl"])
def test_checkpointing_follows_the_other_arms(folder, name, monkeypatch):
    monkeypatch.setitem(bench_model.SHAPES, "small", replace(SMALL, checkpointing=True))
    given = peer(folder, name, "update")
    with widths_of(given.model) as seen:
        given.sample()
    assert len(seen) == 4
    require_equal({"naive": naive(folder, 2, SMALL), name: given.figures()})


CALLS = {"vlm-r1": 2, "vlm-r1-repaired": 2, "trl": 1}  # TRL draws the completions of all prompts at once


@pytest.mark.parametrize("name", HERE)
def test_step_draws_with_a_cache_and_moves_the_weights(folder, name):
    given = peer(folder, name, "step")
    head = given.model.lm_head.weight
    before, size = head.detach().clone(), SMALL.num_generations
    with widths_of(given.model) as seen:
        given.sample()
    drawn = [positions for positions in seen if positions[1] == 1]
    calls = CALLS[name]
    assert drawn == [(size * 2 // calls, 1)] * (SMALL.completion_length - 1) * calls
    assert not torch.equal(head, before) and head.grad is None


@pytest.mark.parametrize(
    ("name", "kind", "phases"),
    [
        ("vlm-r1-repaired", "step", PHASES),
        ("trl", "step", PHASES),
        ("vlm-r1-repaired", "update", {"reference", "forward", "backward"}),
        ("trl", "update", {"reference", "forward", "backward"}),
    ],
    ids=["vlm-r1 step", "trl step", "vlm-r1 update", "trl update"],
)
def test_worker_answers(folder, name, kind, phases):
    given, answers = peer(folder, name, kind), io.StringIO()
    steps.serve(given, io.StringIO("seconds\npeak_mib\nphases\nseconds\nsettings\n"), answers)
    first, peak, split, second, settings = map(json.loads, answers.getvalue().splitlines())
    assert first > 0 and second > 0 and peak > 0
    assert split.keys() == phases and all(value > 0 for value in split.values())
    assert settings["attention"] == "sdpa" and settings["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("length", [None, 60], ids=["one line", "60 tokens"])
def test_trl_sees_the_prompts_of_the_groups(folder, length, monkeypatch):
    shape = replace(SMALL, prompt_length=length)
    monkeypatch.setitem(bench_model.SHAPES, "small", shape)
    given = peer(folder, "trl", "step")
    given.sample()
    groups = bench_model.groups(folder, given.model, given.processor, 2, shape)
    wanted = groups[0].prompt.input_ids.repeat(SMALL.num_generations, 1)
    drawn = given.arm.trainer._buffered_inputs
    assert len(drawn) == 2 and all(torch.equal(batch["prompt_ids"], wanted) for batch in drawn)
    # Rows are shuffled over the micro-batches: their images are told apart by the sum of their pixels.
    seen = torch.cat([batch["pixel_values"] for batch in drawn]).view(2 * SMALL.num_generations, -1).sum(dim=1)
    images = torch.stack([group.prompt.images[0]["pixel_values"].sum() for group in groups])
    expected = images.repeat(SMALL.num_generations).sort().values
    torch.testing.assert_close(seen.sort().values, expected, rtol=1e-4, atol=1e-3)


def test_worker_refuses_what_it_cannot_answer(folder):
    given = peer(folder, "vlm-r1", "step")
    with pytest.raises(SystemExit, match="'tokens' is none of figures, seconds"):
        given.answer("tokens")
    with pytest.raises(SystemExit, match="a step draws its completions"):
        given.answer("figures")


def test_phase_clock_takes_an_inner_phase_from_the_outer_one(monkeypatch):
    times = iter([0.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(times))
    timed = clock.PhaseClock()
    with timed("rollout"), timed("reward"):
        pass
    assert timed.seconds == {"rollout": 2.0 + 4.0, "reward": 3.0}


def test_weights_are_built_where_the_folder_holds_none(tmp_path, folder):
    built, _ = steps.weights(tmp_path, SMALL, "cpu", torch.float32)
    torch.manual_seed(0)
    wanted = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    read, _ = steps.weights(folder, SMALL, "cpu", torch.bfloat16)
    assert torch.equal(built.lm_head.weight, wanted.lm_head.weight)
    assert read.dtype == torch.bfloat16 and not any(tmp_path.glob("*.safetensors"))


def test_why_not(monkeypatch):
    assert steps.PEERS.keys() == {"vlm-r1", "vlm-r1-repaired", "trl", "trl+liger"}
    for name in HERE:
        assert steps.PEERS[name].why_not("cpu") is None
    assert "do not run on cpu" in (steps.PEERS["trl+liger"].why_not("cpu") or "")
    monkeypatch.setattr(steps, "find_spec", lambda name: None if name == "datasets" else object())
    for name in ("trl", "trl+liger"):
        assert steps.PEERS[name].why_not("cuda") == "datasets not installed"
    assert steps.PEERS["vlm-r1"].why_not("cuda") is None


def test_why_not_says_that_liger_and_transformers_do_not_fit(monkeypatch):
    """Asked on a GPU, the only obstacle is an import that fails, and there is none where it does not."""

    def failing(name: str) -> Any:
        raise ImportError("cannot import name 'Some' from 'liger_kernel' (/somewhere/file.py)")

    monkeypatch.setattr(steps, "import_module", lambda name: None)
    assert steps.PEERS["trl+liger"].why_not("cuda") is None
    monkeypatch.setattr(steps, "import_module", failing)
    reason = steps.PEERS["trl+liger"].why_not("cuda") or ""
    assert reason.endswith("do not fit each other on any device: cannot import name 'Some' from 'liger_kernel'")
    assert reason.startswith("liger-kernel ")


def test_command_is_that_of_the_worker(tmp_path):
    given: dict[str, Any] = {"kind": "update", "folder": tmp_path, "shape_name": "bench", "prompts": 2, "threads": 1}
    words = steps.command("trl", dtype="bfloat16", **given)
    assert words[0] == sys.executable
    assert steps.command("trl", dtype="bfloat16", python="other", **given) == ["other", *words[1:]]
    with pytest.raises(SystemExit):  # an unknown peer is refused before anything is loaded
        steps.main([*words[3:], "--peer", "verl"])
