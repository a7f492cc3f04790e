"""Every model family, in a tiny random instance: what is shared gives the same step as the naive trainer, the same
tokens as `generate`, and the same logits as the stock forward."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.families import FAMILIES, GLM_TOKENS, ROWS_AND_COLUMNS, assert_same, checkpoints
from tests.helpers.maker import Maker
from tests.helpers.rollouts import assert_close, completions, generated, stock_inputs, tokens
from tests.helpers.slow import mostly_slow
from tests.helpers.steps import NAIVE, assert_equal_steps, step, trainer_of
from vlmr1.cli import main
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.lifecycle.checkpoint import last_complete
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.models.families.idefics3 import tiles_of_images
from vlmr1.models.families.runs import runs
from vlmr1.rollout import NativeEngine, SamplingSettings, TransformersEngine

SIZES = (56, 84, "wide", "tall", "odd")
TILES = {  # of those sizes, where images have tiles
    "internvl": {56: 1, 84: 5, "wide": 3, "tall": 4, "odd": 3},
    "idefics3": {56: 5, 84: 5, "wide": 3, "tall": 3, "odd": 5},
}
TILES["smolvlm"] = TILES["idefics3"]
checkpoint = checkpoints()


# The step


TEXT_BESIDE_IMAGES = [
    ("Locate the digit 1.", ("tall",), (6, 3)),
    ("What is seven?", (), (4, 9)),
    ("Locate the digit 2, if there is one.", ("odd", 84, 56), (5, 1)),
]
CASES = {
    "one_image": [("Locate the digit 7.", (84,), (5, 9, 3))],
    "two_images": [("Which of them has a 4?", ("wide", 56), (7, 4, 11)), ("Locate the digit 4.", ("wide",), (2, 6))],
    "text_beside_images": TEXT_BESIDE_IMAGES,
}


@pytest.mark.parametrize("frozen", mostly_slow({"trained_tower": False, "frozen_tower": True}, "trained_tower"))
@pytest.mark.parametrize("case", CASES)
def test_shared_step_equals_naive(case, frozen, make, model, processor, tmp_path):
    groups = make.groups(*CASES[case])
    naive = step(model, processor, groups, tmp_path, freeze_vision=frozen, **NAIVE)
    assert naive[0] != 0 and naive[1]["kl"] > 1e-3
    vision = {id(parameter) for parameter in family_of(model).vision_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in vision}
    assert 10 < len(names) < len(list(model.parameters()))
    assert not names & naive[2].keys() if frozen else all(naive[2][name].norm() > 0 for name in names)
    assert_equal_steps(step(model, processor, groups, tmp_path, freeze_vision=frozen), naive)


def test_activation_checkpointing_gives_the_same_step(make, model, processor, tmp_path, monkeypatch):
    groups = make.groups(*TEXT_BESIDE_IMAGES)
    kept = step(model, processor, groups, tmp_path)
    passes = []
    kind = type(model.get_decoder().layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: passes.append(1) or forward(self, x))
    model.activation_checkpointing_enable()
    assert_equal_steps(step(model, processor, groups, tmp_path), kept)
    assert len(passes) == 3 * model.config.text_config.num_hidden_layers  # reference, policy, policy again


def test_autocast(make, model):
    """Features in bfloat16 meet embeddings in float32."""
    pack = make_pack(make.groups(*TEXT_BESIDE_IMAGES))
    family = family_of(model)
    exact, rounded = (
        PackedPolicy(model, family, temperature=1.0, dtype=dtype).logprobs(pack) for dtype in (None, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).abs().max()) < 0.05 and exact.std() > 0.2


@pytest.mark.parametrize("frozen, calls", [(True, 1), (False, 3)], ids=["frozen_tower", "trained_tower"])
def test_images_are_encoded_together(frozen, calls, make, model, processor, tmp_path, monkeypatch):
    """Each unique image once for rollout, reference and policy; by a frozen tower once for all of them."""
    seen = []
    kind = type(family_of(model))
    encode = kind.encode_images
    monkeypatch.setattr(kind, "encode_images", lambda *given: seen.append(len(given[2])) or encode(*given))
    rewards = [lambda prompts, completions, **_: [0.0, 1.0] * 2]
    settings = {"max_completion_length": 4, "freeze_vision": frozen}
    trainer = trainer_of(model, processor, tmp_path, rewards, **settings)
    prompts = [make.prompt("Locate the digit 7.", ("wide", 56)), make.prompt("Where is it?", (56, "tall"))]
    trainer.training_step(trainer.model, prompts)
    assert [count for count in seen if count] == [3] * calls


# Against the stock model

PROMPTS = {
    "one_image": [("Locate the digit 7.", ("tall",))],
    "two_prompts": [("Which of the two has a 4?", (84, "wide")), ("What is seven?", ())],
    "texts": [("What is seven?", ()), ("Where, if anywhere at all, is it?", ())],
    "unequal": [("Where?", (56,)), ("Where is it?", ("odd", "wide"))],
}


@pytest.mark.parametrize("generations", mostly_slow({"1": 1, "2": 2}, "2"))
@pytest.mark.parametrize("case", PROMPTS)
def test_greedy_equals_generate(case, generations, make, model, processor):
    """Token for token; and the log-probs are those of the policy's packed forward."""
    prompts = [make.prompt(*each) for each in PROMPTS[case]]
    family, settings = family_of(model), SamplingSettings(12, greedy=True)
    groups, fallback = (
        kind(model, family, processor.tokenizer).generate(prompts, generations, settings)
        for kind in (NativeEngine, TransformersEngine)
    )
    assert tokens(groups) == tokens(fallback)
    drawn = completions(groups)
    for one, other in zip(drawn, completions(fallback), strict=True):
        assert_close(one.logp, other.logp)
    for prompt, completion in zip(prompts, drawn[::generations], strict=True):
        assert completion.token_ids.tolist() == generated(model, processor, prompt, 12)[0]
    pack = make_pack([replace(group, advantages=torch.zeros(generations)) for group in groups])
    logp = PackedPolicy(model, family, temperature=1.0).logprobs(pack)
    assert_close(torch.cat([completion.logp for completion in drawn]), logp)


@pytest.mark.parametrize("sizes", [("odd",), (56, "wide", "tall"), ()], ids=["one", "three", "none"])
def test_logits_and_positions_equal_the_stock_forward(sizes, make, model, processor):
    """With a completion behind the prompt: it continues at `next_position`, as in the model's own numbering."""
    prompt = make.prompt("Where is the digit 7?", sizes)
    inputs = stock_inputs(processor, prompt)
    assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    more = torch.arange(40, 49)
    ids = torch.cat([prompt.input_ids, more])
    for name, value in inputs.items():  # masks and token types continue too
        if value.shape == (1, len(prompt.input_ids)):
            filler = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(name, torch.zeros_like(more))
            inputs[name] = torch.cat([value, filler[None]], 1)
    family = family_of(model)
    after = (prompt.next_position + torch.arange(len(more))).expand(len(prompt.positions), -1)
    positions = torch.cat([prompt.positions, after], 1)
    with torch.no_grad():
        expected = model(**inputs).logits
        features = family.encode_images(model, prompt.images)
        mask = torch.ones_like(ids)[None]
        hidden = family.hidden(model, ids[None], positions[:, None], features, attention_mask=mask)
    assert expected.std() > 0.05
    assert_close(family.head(model)(hidden), expected)


# Images


def test_images_alone_and_together(make, model, processor):
    """Equal rows; their numbers are those of the placeholders."""
    family = family_of(model)
    prompts = [make.prompt("Where?", SIZES), *(make.prompt("Where?", (name,)) for name in SIZES)]
    with torch.no_grad():
        together = family.encode_images(model, prompts[0].images)
        alone = [feature for prompt in prompts[1:] for feature in family.encode_images(model, prompt.images)]
    assert len(together) == len(alone) == len(SIZES)
    deepstack = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    for prompt, one, other in zip(prompts[1:], together, alone, strict=True):
        assert len(one.deepstack) == len(other.deepstack) == deepstack
        for rows, rows_ in zip(one.tensors(), other.tensors(), strict=True):
            assert_close(rows, rows_)
            assert len(rows) == int((prompt.input_ids == model.config.image_token_id).sum())
            assert rows.std(0).mean() > 1e-3
    if (tiles := TILES.get(model.config.model_type)) is not None:
        shapes = [prompt.images[0]["pixel_values"].shape for prompt in prompts[1:]]
        assert [shape[-4] for shape in shapes] == [tiles[name] for name in SIZES]
    assert len({len(feature.rows) for feature in alone}) > 1  # sizes that do not differ would not show an exchange
    assert family.split_images(model, {}, 0) == () and family.encode_images(model, []) == []


@pytest.mark.parametrize(
    "mask, expected",
    [([], []), ([0, 0], []), ([1], [(0, 1)]), ([1, 1, 0, 1], [(0, 2), (3, 4)]), ([0, 1, 0, 0, 1, 1], [(1, 2), (4, 6)])],
)
def test_runs(mask, expected):
    assert runs(torch.tensor(mask, dtype=torch.bool)) == expected


FAKE, IMAGE, WHOLE, TEXT = 1, 2, [3], 9  # token ids
TAGS = {
    "whole": ([[FAKE, *WHOLE]], [1]),
    "two whole": ([[FAKE, *WHOLE], [FAKE, TEXT, FAKE, *WHOLE]], [1, 1]),
    "two whole, adjacent": ([[FAKE, *WHOLE], [FAKE, FAKE, *WHOLE]], [1, 1]),
    "tiles": ([[FAKE, 4], [FAKE, 5], [TEXT, FAKE, *WHOLE]], [3]),
    "tiles, whole": ([[FAKE, 4], [FAKE, 5], [TEXT, FAKE, *WHOLE], [FAKE, FAKE, *WHOLE]], [3, 1]),
    "whole, tiles": ([[FAKE, *WHOLE], [FAKE, FAKE, 4], [TEXT, FAKE, *WHOLE]], [1, 2]),
    "tags of several tokens": ([[FAKE, 6, 7, 4], [FAKE, 6, 7, 5], [FAKE, 8, 7, 5], [FAKE, FAKE, 8, 7, 5]], [3, 1]),
}


@pytest.mark.parametrize("before, tiles", TAGS.values(), ids=TAGS.keys())
def test_tiles_of_images(before, tiles):
    """What stands before each run of three placeholders; the separator stands behind the last."""
    ids = [TEXT, *(token for each in before for token in (*each, *[IMAGE] * 3)), FAKE, TEXT]
    assert tiles_of_images(torch.tensor(ids), IMAGE) == tiles


@pytest.mark.parametrize("checkpoint", TILES, indirect=True)
def test_images_that_are_not_split(make, model, processor, monkeypatch):
    """Idefics3 and SmolVLM without tiles, InternVL with one: one each."""
    monkeypatch.setattr(processor.image_processor, "do_image_splitting", False, raising=False)
    monkeypatch.setattr(processor.image_processor, "max_patches", 1, raising=False)
    prompt = Maker(model, processor, make.image_files).prompt("Where?", ("wide", 56, 84))
    assert [image["pixel_values"].shape[-4] for image in prompt.images] == [1, 1, 1]


@pytest.mark.parametrize("checkpoint", TILES, indirect=True)
def test_tiles_that_do_not_fit_are_refused(make, model, processor):
    inputs = stock_inputs(processor, make.prompt("Where?", ("wide", 56)))
    tiles = sum(TILES[model.config.model_type][name] for name in ("wide", 56))
    with pytest.raises(ValueError, match=f"3 images of {tiles} tiles do not fit"):
        family_of(model).split_images(model, inputs, 3)
    inputs["pixel_values"] = inputs["pixel_values"].repeat_interleave(2, inputs["pixel_values"].ndim - 4)
    inputs["input_ids"] = inputs["input_ids"][:, (inputs["input_ids"][0] != model.config.image_token_id).cumsum(0) != 4]
    with pytest.raises(ValueError, match=f"2 images of {2 * tiles} tiles do not fit"):
        family_of(model).split_images(model, inputs, 2)


def test_every_parameter_is_in_one_part(model):
    family = family_of(model)
    decoder = (f"{family.decoder_path}.", "lm_head.")
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith(decoder)]
    vision = family.vision_parameters(model)
    assert {id(parameter) for parameter in vision} == {id(parameter) for parameter in rest}
    assert len(vision) == len(rest) > 10
    merger = family.merger_parameters(model)
    assert {id(parameter) for parameter in merger} < {id(parameter) for parameter in vision}
    assert merger[-1].shape[0] == model.config.text_config.hidden_size  # it ends where the decoder begins


PLACEHOLDERS = {
    "qwen2_vl": ({"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"},) * 2,
    "glm4v": (set(GLM_TOKENS.values()),) * 2,
    "internvl": ({"<IMG_CONTEXT>"}, {"<IMG_CONTEXT>", "<img>", "</img>", "<video>"}),
    "idefics3": ({"<image>"}, {"<image>", "<fake_token_around_image>", "<global-img>", *ROWS_AND_COLUMNS}),
}
PLACEHOLDERS |= {"qwen2_5_vl": PLACEHOLDERS["qwen2_vl"], "qwen3_vl": PLACEHOLDERS["qwen2_vl"]}
PLACEHOLDERS["smolvlm"] = PLACEHOLDERS["idefics3"]


def test_placeholders(make, model, processor):
    """By the config alone, and with the tokenizer; and a prompt's images hold no others."""
    family, tokenizer = family_of(model), processor.tokenizer
    of_config, of_tokenizer = PLACEHOLDERS[model.config.model_type]
    assert set(tokenizer.convert_ids_to_tokens(family.placeholder_ids(model))) == of_config
    banned = family.placeholder_ids(model, tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(banned)) == of_tokenizer and len(set(banned)) == len(banned)
    special = set(tokenizer.convert_tokens_to_ids(list(FAMILIES[model.config.model_type].special)))
    plain, shown = (set(make.prompt("Where?", sizes).input_ids.tolist()) & special for sizes in ((), (84,)))
    assert shown - plain and shown - plain <= set(banned) and not plain & set(banned)


# Through the command line


@pytest.mark.parametrize("checkpoint", mostly_slow([*FAMILIES], "internvl"), indirect=True)
def test_one_step_through_the_command_line(checkpoint, data, processor, tmp_path, capsys):
    words = f"""train --model_name_or_path {checkpoint} --output_dir {tmp_path}/out --use_cpu true
        --data_file_paths {data}/train.jsonl --image_folders {data}/images --learning_rate 1e-2
        --prompts_per_device 2 --num_generations 2 --max_completion_length 6 --max_steps 2 --save_steps 2
        --loss_type dr_grpo --scale_rewards none --disable_tqdm true --report_to none --weight_decay 0.1
        --write_report false"""
    assert main(words.split()) == 0, capsys.readouterr().err  # weights decay: random completions have rewards of 0
    last = last_complete(tmp_path / "out")
    assert last is not None and last.name == "checkpoint-2"
    start, trained, read = load_model(checkpoint), load_model(last), load_processor(last)
    assert type(trained) is type(start)
    before, after = start.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    changed = [name for name, value in before.items() if value.ndim > 1 and not torch.equal(value, after[name])]
    assert len(changed) == sum(value.ndim > 1 for value in before.values())
    assert_same(read, processor)
