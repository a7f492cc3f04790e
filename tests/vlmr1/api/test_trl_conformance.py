"""What TRL 1.16 promises those who train a vision-language model, as tests: TRAINER=trl runs them against TRL itself,
TRAINER=vlmr1 against `from vlmr1 import GRPOConfig, GRPOTrainer`, and so any other module with the two names.

Where the drop-in refuses on purpose, `refused` asks for an error that names what is refused. Models are tiny.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, HfArgumentParser
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.vlmr1.api.suite_models import CHATML, FAMILIES, QWEN, Family, build, text, tokenizer, with_parts
from vlmr1.errors import UserError
from vlmr1.models.processor import load_processor

datasets = pytest.importorskip("datasets")
TRAINER = os.environ.get("TRAINER", "vlmr1")
OURS = TRAINER != "trl"
trl = importlib.import_module(TRAINER)
CLEAR = (ValueError, NotImplementedError, UserError)  # an error that was meant
MODELS = TemporaryDirectory()
MAIN, SUPPORTED = "qwen2_5_vl", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "internvl")
LLAVA = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>")
ENDS = range(7, 107)  # tokens of Qwen's tiny tokenizer that are no special ones


def llava(ids: dict[str, int]) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, projection_dim=32)
    vision = dict(model_type="clip_vision_model", image_size=56, patch_size=14, **sizes)
    known = dict(image_token_id=ids["<image>"], image_seq_length=16, vision_config=vision)
    return transformers.LlavaConfig(text_config=text(ids, LLAVA, model_type="llama"), **known)


SIDES = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PATCHES: Any = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TEMPLATE = with_parts(CHATML, "<image>\n")
FAMILIES["llava"] = Family(llava, LLAVA, TEMPLATE, lambda: CLIPImageProcessorPil(**SIDES), settings=PATCHES)


def picture(seed: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def row_of(i: int, kind: str) -> dict[str, Any]:
    """A row in TRL's format; `kind` is how it holds its images."""
    question = f"Where is {i}?"
    prompt: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if kind == "bare":
        return {"prompt": question, "place": i}
    if kind == "placeholders":
        parts = [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": question}]
        system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        return {"prompt": [system, {"role": "user", "content": parts}], "images": [picture(i)], "place": i}
    if kind == "within":
        prompt[0]["content"] = [{"type": "image", "image": picture(i)}, {"type": "text", "text": question}]
    images = {"image": {"image": picture(i)}, "images": {"images": [picture(i), picture(i + 100, (56, 56))]}}
    images |= {"batches": {"images": [picture(i)] * (i // 2 % 2)}, "mixed": {"images": [picture(i)] * (i % 2)}}
    return {"prompt": prompt, "place": i} | images.get(kind, {})


def rows_of(kind: str = "image", count: int = 8, **more: Any) -> Any:
    """A data set; `more` are columns by a function of the place."""
    rows = [row_of(i, kind) | {name: value(i) for name, value in more.items()} for i in range(count)]
    if kind != "within":
        return datasets.Dataset.from_list(rows)
    part = dict(type=datasets.Value("string"), text=datasets.Value("string"), image=datasets.Image())
    prompt = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    return datasets.Dataset.from_list(rows, features=datasets.Features(prompt=prompt, place=datasets.Value("int64")))


def recorder(score: Callable[[list[int]], float] = lambda ids: float(sum(ids) % 7)) -> Any:
    """The reward `score`, of the token ids that keeps what each call was given, and what it gave, in `calls`."""
    calls = []

    def reward(prompts: list, completions: list, completion_ids: list, **more: Any) -> list[float]:
        values = [score(ids) for ids in completion_ids]
        given = dict(prompts=prompts, completions=completions, ids=completion_ids, more=more, values=values)
        calls.append(SimpleNamespace(**given, step=more["trainer_state"].global_step))
        return values

    reward.calls = calls  # type: ignore[attr-defined]
    return named("score", reward)


def named(name: str, reward: Any) -> Any:
    reward.__name__ = name
    return reward


def constant(value: float, name: str) -> Any:
    return named(name, lambda completions, **_: [value] * len(completions))


def config(output: Path, **settings: Any) -> Any:
    """Two prompts a step, two completions each, two steps; as a script would set it."""
    given: dict[str, Any] = dict(output_dir=str(output), per_device_train_batch_size=4, num_generations=2, max_steps=2)
    given |= dict(max_completion_length=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none")
    return trl.GRPOConfig(**given | dict(use_cpu=True, bf16=False) | settings)


@cache
def folder_of(family: str) -> Path:
    """The checkpoint of a family; "judge" is a sequence classifier with one label."""
    place = Path(MODELS.name) / family
    if family != "judge":
        return build(family, place)
    tokens = tokenizer(FAMILIES[MAIN])
    known = transformers.Qwen2Config(**text(tokens.get_vocab(), QWEN, num_hidden_layers=1), num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(known).save_pretrained(place)
    tokens.save_pretrained(place)
    return place


@dataclass
class Kit:
    """Makes models and trainers; `output` is the directory of runs."""

    output: Path

    def model(self, family: str = MAIN) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder_of(family), dtype=torch.float32)

    def ending(self) -> Any:  # at any of a hundred tokens, a quarter of all
        model = self.model()
        model.generation_config.eos_token_id = list(ENDS)
        return model

    def processor(self, family: str = MAIN) -> Any:
        return load_processor(folder_of(family))

    def trainer(self, reward: Any = None, data: Any = None, given: Any = None, **settings: Any) -> Any:
        """`given` are arguments of the constructor that replace those that most scripts pass."""
        arguments = dict(model=str(folder_of(MAIN)), processing_class=self.processor())
        arguments |= dict(reward_funcs=reward or recorder(), args=config(self.output, **settings))
        arguments |= dict(train_dataset=rows_of() if data is None else data) | (given or {})
        return trl.GRPOTrainer(**{name: value for name, value in arguments.items() if value is not None})


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path / "run")


def refused(name: str | None) -> Any:
    """The drop-in does not have what the block asks for: there it must end in an error that names it."""
    return nullcontext() if name is None or not OURS else pytest.raises(CLEAR, match=name)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(trainer: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are not what they were."""
    now = weights(trainer.model)
    assert all(bool(value.isfinite().all()) for value in now.values())
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def trained(trainer: Any) -> set[str]:
    """Train to the end; the names of what moved."""
    before = weights(trainer.model)
    result = trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps and np.isfinite(result.training_loss)
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    return moved(trainer, before)


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def table(output: Path) -> list[dict[str, Any]]:
    """The completions that a run has logged, in whichever of the two forms."""
    files = map(str, sorted((output / "completions").glob("*.parquet")))
    rows = [row for file in files for row in datasets.Dataset.from_parquet(file)]
    return rows or [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]


def is_vision(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "connector", "projector"))


@pytest.mark.parametrize("family", [*SUPPORTED, "llava"])
def test_trains_every_family(family: str, kit: Kit) -> None:
    reward, given = recorder(), dict(model=kit.model(family), processing_class=kit.processor(family))
    with refused(None if family in SUPPORTED else family):
        trainer = kit.trainer(reward, given=given)
        names, total = trained(trainer), len(weights(trainer.model))
        assert {is_vision(name) for name in names} == {True, False}
        assert len(names) == total or family == "llava"  # the last layer of whose tower is not looked at
        assert [len(call.values) for call in reward.calls] == [4, 4]


def test_the_processor_is_found_where_none_is_given(kit: Kit) -> None:
    """By the model's own name. Without torchvision, TRL can read those only that have no video processor."""
    family = MAIN if OURS else "idefics3"
    for model in (str(folder_of(family)), kit.model(family)):
        assert trained(kit.trainer(given=dict(model=model, processing_class=None)))


def test_defaults_are_those_of_trl(kit: Kit) -> None:
    known: dict[str, Any] = dict(num_generations=8, max_completion_length=512, temperature=1.0, top_p=1.0, top_k=0)
    known |= dict(beta=0.0, epsilon=0.2, epsilon_high=None, loss_type="dapo", scale_rewards="group", num_iterations=1)
    known |= dict(importance_sampling_level="token", mask_truncated_completions=False, use_bias_correction_kl=True)
    known |= dict(learning_rate=1e-6, lr_scheduler_type="linear", per_device_train_batch_size=8, shuffle_dataset=True)
    known |= dict(gradient_accumulation_steps=1, steps_per_generation=1, generation_batch_size=8, num_train_epochs=3.0)
    known |= dict(logging_steps=10, save_steps=500, gradient_checkpointing=True, bf16=True, log_completions=False)
    found = trl.GRPOConfig(output_dir=str(kit.output), use_cpu=True)
    assert {name: getattr(found, name, "missing") for name in known} == known


def test_settings_that_scripts_have_are_taken(kit: Kit) -> None:
    settings: dict[str, Any] = dict(log_completions=True, num_completions_to_print=1, log_multimodal=False, seed=3)
    settings |= dict(gradient_checkpointing=True, warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5)
    settings |= dict(lr_scheduler_type="cosine", remove_unused_columns=False, dataloader_num_workers=0)
    settings |= dict(save_total_limit=1, run_name="mine", push_to_hub=False, use_vllm=False, min_p=None)
    settings |= dict(epsilon_high=0.28, ddp_find_unused_parameters=False, logging_first_step=True)
    settings |= dict(disable_dropout=True, log_unique_prompts=True, optim="adamw_torch", eval_strategy="no")
    settings |= dict(model_init_kwargs={"attn_implementation": "eager"}, num_train_epochs=1, max_steps=2)
    trainer = kit.trainer(**settings, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert trained(trainer) and trainer.model.config._attn_implementation == "eager"
    assert {name: getattr(trainer.args, name, "missing") for name in settings} == settings
    model_config = pytest.importorskip("trl").ModelConfig  # beside which scripts have it in one parser
    words = "--output_dir out --use_cpu true --bf16 false --log_completions --use_peft --model_name_or_path mine"
    found, of_model = HfArgumentParser((trl.GRPOConfig, model_config)).parse_args_into_dataclasses(words.split())
    assert found.log_completions is True and of_model.use_peft and of_model.model_name_or_path == "mine"


NONE_IN_A_BATCH = pytest.mark.xfail(not OURS, reason="TRL 1.16 gives the processor None for a row without images")
KINDS = ["images", "batches", pytest.param("mixed", marks=NONE_IN_A_BATCH), "placeholders", "within", "text", "bare"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_images_in_any_of_these_ways(kind: str, kit: Kit) -> None:
    reward = recorder()
    with refused("prompt" if kind == "bare" else None):
        assert trained(kit.trainer(reward, rows_of(kind), shuffle_dataset=False))
    if kind == "bare":  # text, which goes to the model as it is: there is no chat, and rewards get text
        assert all(isinstance(each, str) for call in reward.calls for each in (*call.prompts, *call.completions))
        return
    contents = [[message["content"] for message in prompt] for call in reward.calls for prompt in call.prompts]
    parts = [[p["type"] for each in c if isinstance(each, list) for p in each] for c in contents]
    images = dict(images=[2] * 8, batches=[0] * 4 + [1] * 4, mixed=[0, 0, 1, 1] * 2, text=[0] * 8)
    assert [each.count("image") for each in parts] == images.get(kind, [1] * 8)
    if kind == "placeholders":
        assert parts[0] == ["text", "text", "image", "text"]  # of the system message, and the image in its place


def test_streams_and_lists_of_rows(kit: Kit) -> None:
    """TRL refuses lists, which the drop-in takes."""
    reward = recorder()
    assert trained(kit.trainer(reward, rows_of().to_iterable_dataset(), shuffle_dataset=False, max_steps=3))
    assert [place for call in reward.calls for place in call.more["place"][::2]] == list(range(6))
    with nullcontext() if OURS else pytest.raises(TypeError, match="Dataset"):
        assert trained(kit.trainer(data=[row_of(i, "image") for i in range(8)]))


def test_columns_reach_the_rewards_as_they_are(kit: Kit) -> None:
    """Numbers, lists, tables, nothing, images; a solution that is no text stays what it is."""
    reward = recorder()
    more: dict[str, Any] = dict(box=lambda i: [i, 2, 30], solution=lambda i: {"label": f"{i}"}, note=lambda i: None)
    trained(kit.trainer(reward, rows_of(**more), shuffle_dataset=False))
    for call, places in zip(reward.calls, ([0, 0, 1, 1], [2, 2, 3, 3]), strict=True):
        expected = {name: [value(i) for i in places] for name, value in more.items()} | {"place": places}
        assert {name: call.more[name] for name in expected} == expected
        assert [image.tobytes() for image in call.more["image"]] == [picture(i).tobytes() for i in places]


def test_rows_are_shuffled_unless_told_otherwise(kit: Kit) -> None:
    orders = []
    for settings in ({"shuffle_dataset": False}, {"seed": 1}, {"seed": 1}, {"seed": 2}):
        reward = recorder()
        kit.trainer(reward, rows_of("text"), max_steps=-1, num_train_epochs=1, **settings).train()
        orders.append([place for call in reward.calls for place in call.more["place"][::2]])
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] == list(range(8)) and orders[1] == orders[2] and len(set(map(tuple, orders))) == 3


def test_what_a_reward_is_called_with(kit: Kit) -> None:
    reward = recorder()
    trainer = kit.trainer([reward, constant(0.0, "other")])
    assert trained(trainer) and [call.step for call in reward.calls] == [0, 1]
    assert {"rewards/score/mean", "rewards/other/mean"} <= logged(trainer)[0].keys()
    for call in reward.calls:
        assert len(call.prompts) == len(call.completions) == len(call.ids) == 4
        assert call.more["place"][0] == call.more["place"][1] != call.more["place"][2] == call.more["place"][3]
        for prompt, completion, ids in zip(call.prompts, call.completions, call.ids, strict=True):
            assert prompt[0]["role"] == "user" and isinstance(prompt[0]["content"][0]["image"], Image.Image)
            said = kit.processor().tokenizer.decode(ids, skip_special_tokens=True)
            assert completion == [{"role": "assistant", "content": said}] and isinstance(ids, list)


def test_weights_and_numbers_of_rewards(kit: Kit) -> None:
    rewards = [constant(1.0, "one"), constant(3.0, "three"), constant(9.0, "nine")]
    trainer = kit.trainer(rewards, reward_weights=[0.7, 0.1, 0.0], max_steps=1)
    trained(trainer)
    (line,) = logged(trainer)
    assert [line[f"rewards/{name}/mean"] for name in ("one", "three", "nine")] == [1.0, 3.0, 9.0]
    assert line["reward"] == pytest.approx(1.0) and line["frac_reward_zero_std"] == 1.0
    with pytest.raises(CLEAR, match="weights"):
        kit.trainer(constant(1.0, "one"), reward_weights=[0.7, 0.3])
    with pytest.raises(CLEAR, match=r"short.*3.*4"):
        kit.trainer(named("short", lambda completions, **_: [1.0] * (len(completions) - 1))).train()


def test_none_is_no_reward(kit: Kit) -> None:
    """What a function has no opinion on has no part in its mean, nor in the mean of a group, and teaches nothing."""
    odd = named("odd", lambda place, **_: [1.0 if each % 2 else None for each in place])
    even = named("even", lambda place, **_: [None if each % 2 else 3.0 for each in place])
    trainer = kit.trainer([odd, even], shuffle_dataset=False)
    trainer.train()
    for line in logged(trainer):
        assert [line[name] for name in ("rewards/odd/mean", "rewards/even/mean", "reward")] == [1.0, 3.0, 2.0]
    some = named("some", lambda place, **_: [5.0 if i % 2 else None for i in range(len(place))])
    trainer = kit.trainer(some)
    assert trained(trainer) == set() and logged(trainer)[0]["reward"] == 5.0


def test_rewards_may_be_coroutines_and_may_log(kit: Kit) -> None:
    async def later(completions: list, completion_ids: list, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("found", 0.25)
        log_extra("heading", [f"completion {i}" for i in range(len(completions))])
        return [float(len(set(ids))) for ids in completion_ids]

    trainer = kit.trainer([recorder(), later], log_completions=True)
    assert trained(trainer)
    assert logged(trainer)[0]["rewards/later/mean"] > 1 and logged(trainer)[0]["found"] == 0.25
    headings = [row["heading"] for row in table(kit.output) if row["step"] == 1]
    assert headings == [f"completion {i}" for i in range(4)]


def test_a_reward_may_be_a_model(kit: Kit) -> None:
    folder = folder_of("judge")
    for judge in (str(folder), AutoModelForSequenceClassification.from_pretrained(folder)):
        trainer = kit.trainer([judge, recorder()])
        assert trained(trainer)
        (line, _) = logged(trainer)
        assert np.isfinite(line["rewards/judge/mean"]) and line["rewards/judge/std"] > 0


def test_evaluation(kit: Kit) -> None:
    """During training; on demand, of one data set or of several by name, with another number of completions."""
    reward, one = recorder(lambda _: 2.0), rows_of(count=2)
    settings = dict(eval_strategy="steps", eval_steps=1, num_generations_eval=1, per_device_eval_batch_size=1)
    trainer = kit.trainer(reward, given=dict(eval_dataset=one), **settings)
    trained(trainer)
    lines, before = [line for line in trainer.state.log_history if "eval_loss" in line], weights(trainer.model)
    assert [(line["step"], line["eval_reward"]) for line in lines] == [(1, 2.0), (2, 2.0)]
    assert {"eval_rewards/score/mean", "eval_completions/mean_length"} <= lines[0].keys()
    assert [len(call.values) for call in reward.calls] == [4, 1, 1] * 2 and np.isfinite(trainer.evaluate()["eval_loss"])
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate(eval_dataset=dict(near=one, far=one)).keys()
    assert moved(trainer, before) == set()


@pytest.mark.parametrize("how", ["float32", "bfloat16", "there_already", "dropout"])
def test_adapters(how: str, kit: Kit) -> None:
    """Only the adapter moves, and it alone is saved; the reference is the model without it."""
    peft = pytest.importorskip("peft")
    settings = dict(target_modules=["q_proj", "v_proj"], lora_dropout=0.05 if how == "dropout" else 0.0)
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    given = dict(model=peft.get_peft_model(kit.model(), lora)) if how == "there_already" else dict(peft_config=lora)
    settings = dict(bf16=True, model_init_kwargs={"dtype": "bfloat16"}) if how == "bfloat16" else {}
    trainer = kit.trainer(given=given, beta=0.1, **settings)
    names = trained(trainer)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in names} == {"q_proj", "v_proj"}
    assert all("lora_" in name for name in names) and logged(trainer)[1]["kl"] > 0
    trainer.save_model(str(kit.output / "saved"))
    assert not (kit.output / "saved" / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(kit.model(), kit.output / "saved")
    here = {name: value.float() for name, value in trainer.model.named_parameters()}
    saved = {name: value for name, value in again.named_parameters() if name in names}
    assert saved.keys() == names and all(torch.allclose(v, here[name], atol=1e-2) for name, v in saved.items())


def test_beta_brings_a_reference(kit: Kit) -> None:
    trainer = kit.trainer(beta=0.1, max_steps=3, max_completion_length=12)
    assert trained(trainer)
    kl = [line["kl"] for line in logged(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[2] > 1e-4
    settings = dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    followed = kit.trainer(max_steps=3, **settings)
    assert trained(followed) and [line["kl"] for line in logged(followed)] == pytest.approx([0, 0, 0], abs=1e-5)


OBJECTIVES = {name: ([dict(loss_type=name)], None) for name in ("grpo", "bnpo", "dr_grpo", "dapo")} | {
    "cispo": ([dict(loss_type="cispo", epsilon_high=2.0)], None),
    "soft": ([dict(loss_type="sapo"), dict(loss_type="luspo"), dict(loss_type="vespo")], "loss_type"),
    "sequence": ([dict(importance_sampling_level="sequence", loss_type="grpo")], None),
    "two_sided": ([dict(delta=2.0, epsilon_high=0.28, entropy_coef=0.01)], None),
    "top_entropy": ([dict(top_entropy_quantile=0.2)], "top_entropy_quantile"),
    "normalized": ([dict(multi_objective_aggregation="normalize_then_sum")], None),
}


@pytest.mark.parametrize(("every", "name"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objectives(every: list[dict[str, Any]], name: str | None, kit: Kit) -> None:
    """Two passes over a generation, so that ratios are not 1."""
    for settings in every:
        with refused(name):
            assert trained(kit.trainer([recorder(), constant(1.0, "length")], num_iterations=2, beta=0.01, **settings))


def test_advantages(kit: Kit) -> None:
    for scale in (True, False, "batch"):
        reward, kit.output = recorder(), kit.output / str(scale)
        kit.trainer(reward, scale_rewards=scale, log_completions=True, max_steps=1).train()
        rewards = torch.tensor(reward.calls[0].values).view(2, 2)
        deviation = {True: rewards.std(1, keepdim=True) + 1e-4, False: 1.0, "batch": rewards.std() + 1e-4}[scale]
        expected = ((rewards - rewards.mean(1, keepdim=True)) / deviation).flatten().tolist()
        assert sorted(row["advantage"] for row in table(kit.output)) == pytest.approx(sorted(expected), abs=1e-4)


ARITHMETIC = {  # settings, completions a call, updates a call, updates an epoch of 9 rows
    "plain": ({}, 4, 1, 4),
    "halves": (dict(per_device_train_batch_size=2, num_generations=4, gradient_accumulation_steps=2), 4, 1, 9),
    "accumulation": (dict(gradient_accumulation_steps=2), 8, 1, 2),
    "several_steps": (dict(generation_batch_size=8), 8, 2, 4),
    "iterations": (dict(num_iterations=2), 4, 2, 8),
}


@pytest.mark.parametrize(("settings", "size", "updates", "epoch"), ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic_of_batches(settings: dict[str, Any], size: int, updates: int, epoch: int, kit: Kit) -> None:
    reward = recorder()
    trainer = kit.trainer(reward, rows_of(count=9), max_steps=-1, num_train_epochs=1, **settings)
    assert trained(trainer) and trainer.state.global_step == epoch
    assert [len(call.values) for call in reward.calls] == [size] * (epoch // updates)


def test_truncated_completions_may_be_left_out(kit: Kit) -> None:
    settings = dict(mask_truncated_completions=True, max_completion_length=3, per_device_train_batch_size=8)
    reward = recorder()
    trainer = kit.trainer(reward, given=dict(model=kit.ending()), max_steps=1, **settings)
    assert trained(trainer)
    ended = np.mean([ids[-1] in ENDS for ids in reward.calls[0].ids])
    assert 0 < ended < 1 and logged(trainer)[0]["completions/clipped_ratio"] == pytest.approx(1 - ended)
    endless, reward = kit.model(), recorder()
    endless.generation_config.eos_token_id = [kit.processor().tokenizer.eos_token_id]
    trainer = kit.trainer(reward, given=dict(model=endless), **settings)
    names, cut = trained(trainer), all(ids[-1] > 1 for call in reward.calls for ids in call.ids)  # 0 and 1 end them
    assert not cut or (names == set() and logged(trainer)[0]["loss"] == 0)


def test_how_completions_are_drawn(kit: Kit) -> None:
    """Settings, and `generation_kwargs`, which go before them; with one token to draw from, a group is one text."""
    penalized = dict(top_p=1e-6, repetition_penalty=1.1)
    for settings in (dict(temperature=3.0), dict(top_k=1), penalized, dict(generation_kwargs={"top_k": 1})):
        reward = recorder()
        kit.trainer(reward, max_steps=1, **settings).train()
        ids = reward.calls[0].ids
        assert (ids[0] == ids[1] and ids[2] == ids[3]) == ("temperature" not in settings)


def test_completions_end(kit: Kit) -> None:
    """At any of the tokens that the model says, or the tokenizer; the others at the limit."""
    reward, seen, last = recorder(), recorder(), recorder()
    kit.trainer(reward, given=dict(model=kit.ending()), max_completion_length=5).train()
    for ids in [ids for call in reward.calls for ids in call.ids]:
        stops = [i for i, each in enumerate(ids) if each in ENDS]
        assert stops == [len(ids) - 1] or (stops == [] and len(ids) == 5)
    model, processor, greedy = kit.model(), kit.processor(), dict(top_k=1, max_steps=1, shuffle_dataset=False)
    kit.trainer(seen, given=dict(model=copy.deepcopy(model)), **greedy).train()
    ids = seen.calls[0].ids[0]
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(ids[2])
    kit.trainer(last, given=dict(model=model, processing_class=processor), **greedy).train()
    assert last.calls[0].ids[0] == ids[: ids.index(ids[2]) + 1]


def test_the_chat_template_gets_its_arguments(kit: Kit) -> None:
    processor = kit.processor()
    guard = "{% if not asked %}{{ raise_exception('asked is not set') }}{% endif %}"
    processor.chat_template = guard + processor.chat_template
    assert trained(kit.trainer(given=dict(processing_class=processor), chat_template_kwargs={"asked": True}))


def test_callbacks_and_optimizers(kit: Kit) -> None:
    logs = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3 and kwargs["model"] is not None

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs.append(dict(kwargs["logs"]))

    model = kit.model()
    given = dict(model=model, callbacks=[Watching()], optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None))
    trainer = kit.trainer(given=given, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 3 and len(logs) == 4  # the last one is of the run
    assert {"reward", "rewards/score/mean", "completions/mean_length"} <= logs[0].keys()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.SGD)


def test_metrics(kit: Kit) -> None:
    """All that the documentation names, and what they say."""
    reward = recorder()
    trainer = kit.trainer(reward, given=dict(model=kit.ending()), beta=0.1, per_device_train_batch_size=8)
    trainer.train()
    ends, clipped = ("mean", "min", "max"), ("region_mean", "low_mean", "low_min", "high_mean", "high_max")
    names = {f"completions/{end}{kind}_length" for end in ends for kind in ("", "_terminated")}
    names |= {f"clip_ratio/{each}" for each in clipped} | {"completions/clipped_ratio", "entropy", "kl", "num_tokens"}
    names |= {"step_time", "loss", "grad_norm", "learning_rate", "epoch", "step"}
    for line, call in zip(logged(trainer), reward.calls, strict=True):
        assert names <= line.keys(), sorted(names - line.keys())
        values, lengths = torch.tensor(call.values), torch.tensor([float(len(ids)) for ids in call.ids])
        ended, pairs = torch.tensor([ids[-1] in ENDS for ids in call.ids]), values.view(-1, 2)
        expected = dict(reward=values.mean(), reward_std=values.std())
        expected |= {"rewards/score/mean": values.mean(), "rewards/score/std": values.std()}
        expected |= {f"completions/{end}_length": getattr(lengths, end)() for end in ends}
        expected |= {f"completions/{end}_terminated_length": getattr(lengths[ended], end)() for end in ends}
        expected |= {"frac_reward_zero_std": (pairs[:, 0] == pairs[:, 1]).float().mean()}
        assert {name: line[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert 0 < logged(trainer)[0]["num_tokens"] < logged(trainer)[1]["num_tokens"]


def test_a_frozen_tower_stays_and_what_is_saved_is_an_ordinary_model(kit: Kit) -> None:
    model, saved = kit.model(), kit.output / "saved"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_vision(name))
    trainer = kit.trainer(given=dict(model=model))
    assert {is_vision(name) for name in trained(trainer)} == {False}
    trainer.save_model(str(saved))
    again, here = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32), trainer.model.state_dict()
    assert all(torch.equal(value, here[name]) for name, value in again.state_dict().items())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    texts = [each.apply_chat_template(chat, tokenize=False) for each in (load_processor(saved), kit.processor())]
    assert texts[0] == texts[1]


def test_a_run_goes_on_from_its_checkpoint(kit: Kit) -> None:
    settings = dict(save_strategy="steps", save_steps=1, save_total_limit=2)
    kit.trainer(max_steps=3, **settings).train()
    assert {path.name for path in kit.output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    reward = recorder()
    again = kit.trainer(reward, max_steps=5, **settings)
    again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in logged(again)] == [1, 2, 3, 4, 5] and len(reward.calls) == 2


def test_push_to_hub(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: pushed.append(given))
    trainer = kit.trainer(hub_model_id="me/mine", max_steps=1)
    trainer.train()
    trainer.push_to_hub(dataset_name="me/rows")
    assert pushed[0]["repo_id"] == "me/mine" and Path(pushed[0]["folder_path"]) == kit.output
    assert (kit.output / "model.safetensors").exists() and (kit.output / "README.md").exists()


def test_what_cannot_be_is_refused_by_name(kit: Kit) -> None:
    """Of TRL vLLM, where it is not installed, and tools that a chat template has no words for; of the drop-in all."""
    twice = dict(generation_batch_size=8, steps_per_generation=2)
    for settings in (dict(per_device_train_batch_size=3), dict(num_generations=1), twice):
        with pytest.raises(CLEAR, match="generation"):
            config(kit.output, **settings)
    with pytest.raises((ImportError, *CLEAR), match="vllm"):
        kit.trainer(use_vllm=True)
    with pytest.raises(TypeError, match="no_such_setting"):
        config(kit.output, no_such_setting=1)
    for name in ("tools", "rollout_func", "environment_factory") if OURS else ("tools",):
        with pytest.raises(CLEAR, match="tool" if name == "tools" else name):
            kit.trainer(given={name: [len] if name == "tools" else len})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels, and bfloat16 by default, need a GPU")
def test_on_a_gpu(kit: Kit) -> None:
    assert trained(kit.trainer(use_liger_kernel=True, use_cpu=False))
    assert kit.trainer(given=dict(args=None)).args.output_dir.endswith("-GRPO")
