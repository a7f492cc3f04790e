"""Packs written out by hand, the plans of a token budget, and the padded batch as the pack's inverse. Completions of
advantage 0, and truncated ones where these are masked, leave the policy pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.handmade import group, prompt
from tests.helpers.maker import Maker
from tests.helpers.steps import NAIVE, TOLERANCE
from tests.helpers.trainers import relative, trainer_of
from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.grpo.naive import padded
from vlmr1.grpo.packing import dummy_pack, make_pack, plan_packs, repeated_prompt_tokens, with_signal
from vlmr1.models.features import unique_images
from vlmr1.types import Completion, Group, Pack
from vlmr1_kernels import PrefixLayout


def pixels(pack: Pack) -> list[int]:
    return [int(image["pixel_values"]) for image in pack.images]


def names(plan: list[list[Group]]) -> list[list[str]]:
    """Each part as prompt start : the completions it holds."""
    return [[f"{int(g.prompt.input_ids[0])}:" + "".join(c.text for c in g.completions) for g in row] for row in plan]


def test_pack_by_hand():
    """Two groups; an image prompt whose last position is not its length, a completion of length 1."""
    image = prompt(4, ("a",), 10, [[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 1, 2]])
    pack = make_pack([group(image, 3, 1, start=20), group(prompt(2, start=40), 2, 3, start=50)])
    assert pack.input_ids.tolist() == [10, 11, 12, 13, 40, 41, 20, 21, 50, 150, 151]
    first = [0, 1, 1, 2, 0, 1, 3, 4, 2, 2, 3]
    assert pack.positions.tolist() == [first, [0, 1, 2, 2, 0, 1, 3, 4, 2, 2, 3], first]
    assert pack.layout == PrefixLayout((4, 2), ((2, 0), (1, 2)))
    assert pack.rows.tolist() == [3, 6, 7, 3, 5, 8, 5, 9, 10]
    assert pack.targets.tolist() == [20, 21, 22, 120, 50, 51, 150, 151, 152]
    assert pack.seq_ids.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert pack.advantages.tolist() == [0, 10, 0, 10]
    assert pack.rollout_logp is not None and pack.rollout_logp.tolist() == (-pack.targets).tolist()
    assert pack.old_logp is None and pack.ref_logp is None and pack.importance_denominator is None
    assert (pack.image_ids, pack.image_refs, pixels(pack)) == ((0,), (Path("a"),), [10])


def test_pack_of_one_completion_of_one_token():
    pack = make_pack([group(prompt(3), 1)])
    assert pack.input_ids.tolist() == [100, 101, 102] and pack.positions.shape == (3, 3)
    assert (pack.rows.tolist(), pack.targets.tolist(), pack.seq_ids.tolist()) == ([2], [1000], [0])
    assert pack.images == pack.image_refs == pack.image_ids == ()


def test_logprobs_are_absent_where_a_completion_has_none():
    one = group(prompt(3), 2, 2)
    unknown = Completion(torch.tensor([1]), None, None, "", "stop")
    pack = make_pack([Group(one.prompt, (*one.completions, unknown), None, torch.zeros(3))])
    assert pack.rollout_logp is None and len(pack.targets) == 5


def test_a_pack_is_a_view_of_what_its_completions_know():
    """Values [N] that are set piece by piece stand in the next pack, whatever is packed in which order."""
    one, two = group(prompt(3), 2, 4), group(prompt(5, start=200), 3, start=5000)
    pack = make_pack([one, two])
    values = -pack.targets.float()
    for completion, piece in zip(pack.completions, pack.split(values), strict=True):
        completion.ref_logp = piece
        assert piece.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    again = make_pack([two, one])
    assert again.ref_logp is not None and again.ref_logp.tolist() == (-again.targets).tolist()
    assert make_pack([replace(one, advantages=None)]).advantages is None


# Prompts of 10 tokens; a completion of C tokens takes C - 1 rows.
PLANS = {
    "first fit": ([(5, 5), (11, 11), (2, 2)], 32, {}, [["100:01", "300:01"], ["200:01"]]),
    "exactly full": ([(5, 5), (5, 5)], 36, {}, [["100:01", "200:01"]]),
    "one over": ([(5, 5), (5, 5)], 35, {}, [["100:01"], ["200:01"]]),
    "a group over the budget": ([(6, 6, 6, 6, 6)], 22, {}, [["100:01"], ["100:23"], ["100:4"]]),
    "the rest of a split group has room": ([(8, 8, 3), (2,)], 25, {}, [["100:01"], ["100:2", "200:0"]]),
    "a branch over the budget": ([(50, 3, 3)], 20, {}, [["100:0"], ["100:12"]]),
    "a prompt over the budget": ([(1, 1), (3,)], 5, {}, [["100:0"], ["100:1"], ["200:0"]]),
    "no pack": ([(2, 2), (2, 2)], 99, {"pack": False}, [["100:01"], ["200:01"]]),
    "no pack, split": ([(6, 6, 6)], 22, {"pack": False}, [["100:01"], ["100:2"]]),
    "no shared prompt": ([(3, 3), (3,)], 24, {"share_prompt": False}, [["100:0", "100:1"], ["200:0"]]),
    "naive": ([(3, 1), (9, 4)], 24, {"share_prompt": False, "pack": False}, [["100:0", "100:1"], ["200:0", "200:1"]]),
}


@pytest.mark.parametrize("lengths, budget, switches, expected", PLANS.values(), ids=PLANS.keys())
def test_plan(lengths, budget, switches, expected):
    groups = [group(prompt(10, start=100 * (i + 1)), *each) for i, each in enumerate(lengths)]
    plan = plan_packs(groups, tokens_per_pack=budget, **{"share_prompt": True, "pack": True} | switches)
    assert names(plan) == expected
    for row in plan if switches.get("share_prompt", True) else []:
        branches = sum(len(part.completions) for part in row)
        assert branches == 1 or make_pack(row).layout.total_length <= budget


def test_a_split_group_keeps_the_rewards_and_advantages_of_its_branches():
    plan = plan_packs([group(prompt(10), 6, 6, 6)], tokens_per_pack=22, share_prompt=True, pack=True)
    (first,), (second,) = plan
    assert first.rewards is not None and first.rewards.tolist() == [[0, 0], [1, -1]]
    assert second.rewards is not None and second.rewards.tolist() == [[2, -2]]
    assert first.advantages is not None and first.advantages.tolist() == [0, 10]
    assert second.advantages is not None and second.advantages.tolist() == [20]
    assert second.prompt is first.prompt


def test_unique_images():
    prompts = [prompt(3, ("a",), 10), prompt(3, ("b", "c"), 20), prompt(3), prompt(3, ("a",), 30)]
    prompts += [prompt(3, ("c", "a", "d"), 40)]
    images, paths, image_ids = unique_images(prompts)
    assert [int(image["pixel_values"]) for image in images] == [10, 20, 21, 42]
    assert paths == (Path("a"), Path("b"), Path("c"), Path("d"))
    assert image_ids == (0, 1, 2, 0, 2, 0, 3)


def test_images_of_a_pack():
    first, second = group(prompt(3, ("a",), 10), 2), group(prompt(5, ("b", "c"), 20), 2)
    shared, repeated = (make_pack([first, second, first], share_vision=share) for share in (True, False))
    assert (shared.image_ids, pixels(shared)) == ((0, 1, 2, 0), [10, 20, 21])
    assert (repeated.image_ids, pixels(repeated)) == ((0, 1, 2, 3), [10, 20, 21, 10])


def test_padded_batch_of_prompts_of_different_lengths():
    """One row: the shorter prompt is padded on the left, the shorter completion on the right. The last position
    of a prompt with an image is not its length."""
    image = prompt(4, ("a",), 30, [[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 1, 2]])
    pack = make_pack([group(prompt(2, start=10), 3, start=20), group(image, 1, start=40)])
    ids, positions, mask, lengths = padded(pack)
    assert ids.tolist() == [[0, 0, 10, 11, 20, 21, 22], [30, 31, 32, 33, 40, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    first = [1, 1, 0, 1, 2, 3, 4]
    assert positions[0].tolist() == positions[2].tolist() == [first, [0, 1, 1, 2, 3, 1, 1]]
    assert positions[1].tolist() == [first, [0, 1, 2, 2, 3, 1, 1]]
    assert lengths.tolist() == [3, 1]


REPEATED = {
    "whole": (99, {}, 0),
    "a group in three parts": (22, {}, 10 + 10),
    "every branch its own": (99, {"share_prompt": False}, 4 * 10 + 10),
}


@pytest.mark.parametrize(("budget", "switches", "repeated"), REPEATED.values(), ids=REPEATED.keys())
def test_repeated_prompt_tokens(budget, switches, repeated):
    groups = [group(prompt(10), 6, 6, 6, 6, 6), group(prompt(10, start=200), 2, 2)]
    plan = plan_packs(groups, tokens_per_pack=budget, **{"share_prompt": True, "pack": True} | switches)
    assert repeated_prompt_tokens(plan) == repeated


SIGNALS = {
    "all": ({}, ["0", "1", "2"], ["0"]),
    "advantage": ({"skip_zero_advantage": True}, ["1", "2"], []),
    "truncated": ({"mask_truncated": True}, ["0", "1"], ["0"]),
    "both": ({"skip_zero_advantage": True, "mask_truncated": True}, ["1"], []),
}


@pytest.mark.parametrize(("settings", "of_three", "of_one"), SIGNALS.values(), ids=SIGNALS.keys())
def test_with_signal(settings, of_three, of_one):
    """Advantages are 0, 10, 20, and the third completion is truncated; the other group has the first alone."""
    three, one = group(prompt(10), 6, 5, 4), group(prompt(10, start=200), 2)
    cut = replace(three.completions[2], finish_reason="length")
    three = replace(three, completions=(*three.completions[:2], cut))
    off = {"skip_zero_advantage": False, "mask_truncated": False}
    found = with_signal([three, one], **off | settings)
    assert [[c.text for c in each.completions] for each in found] == [each for each in (of_three, of_one) if each]
    assert found[0].prompt is three.prompt and found[0].advantages is not None
    assert found[0].advantages.tolist() == [10.0 * int(text) for text in of_three]


def test_a_dummy_pack_is_of_one_completion():
    pack = dummy_pack([group(prompt(10), 6, 5), group(prompt(7), 3)])
    assert pack.weight == 0 and pack.targets.tolist() == [1000, 1001, 1002, 1003, 1004, 1005]
    assert make_pack([group(prompt(10), 6)]).weight == 1


# Completions that are dropped


def groups_of(make: Maker) -> list[Group]:
    """A group without signal, one with some in three of four completions, one with signal everywhere."""
    return make.groups(
        ("Locate the digit 8.", (84,), (5, 4, 6), (0.0, 0.0, 0.0)),
        ("Locate the digit 9.", (56,), (3, 7, 2, 4), (1.0, 0.0, -0.25, 0.5)),
        ("What is seven?", (), (6, 5), (0.7, 0.3)),
    )


def step(model, processor, output, groups, **settings):
    """Loss, metrics, gradients and the rows of the packs."""
    trainer = trainer_of(model, processor, output, beta=0.0, **settings)
    return *update(trainer, groups), sum(len(pack.targets) for pack in trainer.runner.packs(groups))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_loss_and_gradients_are_those_of_all_rows(loss_type, model, processor, make, tmp_path):
    groups = groups_of(make)
    settings = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2}
    loss, metrics, gradients, rows = step(model, processor, tmp_path, groups, **settings)
    settings |= NAIVE | {"skip_zero_advantage": False}
    loss_, metrics_, gradients_, rows_ = step(model, processor, tmp_path, groups, **settings)
    assert (rows, rows_) == (3 + 2 + 4 + 6 + 5, 42)
    assert loss == pytest.approx(loss_, rel=TOLERANCE) and loss != 0
    assert relative(gradients, gradients_) < TOLERANCE
    assert (metrics["tokens"], metrics["dropped_rows"]) == (42, 22)
    assert (metrics_["tokens"], metrics_["dropped_rows"]) == (42, 0)


def test_metrics_are_means_over_the_rows_that_are_left(model, processor, make, tmp_path):
    groups = groups_of(make)
    _, metrics, _, _ = step(model, processor, tmp_path, groups)
    left = with_signal(groups, skip_zero_advantage=True, mask_truncated=False)
    _, expected, _, _ = step(model, processor, tmp_path, left, skip_zero_advantage=False)
    assert expected["dropped_rows"] == 0
    for name in ("entropy", "clip_low", "clip_high", "ratio_max"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6)
    _, every, _, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    assert metrics["entropy"] != pytest.approx(every["entropy"], rel=1e-3)


def test_a_step_without_signal_runs_one_pass_of_zero_weight(model, processor, make, tmp_path):
    """Gradients are zeros, as without skipping, and not absent: optimizers with momentum still move."""
    groups = groups_of(make)[:1] * 2
    loss, metrics, gradients, rows = step(model, processor, tmp_path, groups)
    _, _, expected, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    assert (loss, rows, metrics["dropped_rows"]) == (0, 5, 30)  # no row counts, the one that is computed neither
    assert gradients.keys() == expected.keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_a_group_without_images_can_be_what_is_left(model, processor, make, tmp_path):
    """The tower gets no gradient from text: what is left of the step has to say so as the whole step does."""
    groups = [groups_of(make)[0], groups_of(make)[2]]
    _, _, gradients, _ = step(model, processor, tmp_path, groups)
    _, _, expected, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    tower = {name for name in expected if "visual" in name}
    assert tower and all(not expected[name].any() and not gradients[name].any() for name in tower)
    assert relative(gradients, expected) < TOLERANCE


SKIPPED = {
    "beta 0": ({"beta": 0.0}, True),
    "beta": ({"beta": 0.04}, False),
    "off": ({"beta": 0.0, "skip_zero_advantage": False}, False),
    "entropy bonus": ({"beta": 0.0, "entropy_coef": 0.1}, False),
    "KL in the reward": ({"beta": 0.04, "kl_in_reward": True}, True),
}


@pytest.mark.parametrize(("settings", "expected"), SKIPPED.values(), ids=SKIPPED.keys())
def test_on_where_the_advantage_is_the_only_source(settings, expected, tmp_path):
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).skips_zero_advantage == expected


# mask_truncated_completions: what met the length limit leaves the loss, the KL included


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_have_no_part(loss_type, model, processor, make, tmp_path):
    """The longest of a group is truncated. The loss written out over the others: per-token losses at ratio r of the
    rollout's log-probs, no KL."""
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, loss_type=loss_type, beta=0.0)
    some = ("Locate the digit 9.", (56,), (3, 7, 2), (1.0, 0.4, -0.5))
    groups = make.groups(some, ("What is seven?", (), (6, 5), (0.7, 0.3)))
    loss, metrics, _ = update(trainer, groups)
    logp = trainer.policy.logprobs(make_pack(groups)).split([3, 7, 2, 6, 5])
    terms = []
    for row, i, advantage in ((0, 0, 1.0), (2, 2, -0.5), (4, 1, 0.3)):
        old = groups[row // 3].completions[i].logp
        ratio = (logp[row] - old).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    expected = {
        "grpo": sum(term.mean() for term in terms) / 5,
        "dapo": torch.cat(terms).sum() / (3 + 2 + 5),
        "dr_grpo": torch.cat(terms).sum() / (5 * 8),
    }[loss_type]
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert (metrics["tokens"], metrics["dropped_rows"]) == (23, 13)


def test_where_all_are_truncated_nothing_moves(model, processor, make, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, beta=1.0)
    groups = make.groups(("Locate the digit 9.", (56,), (4, 4), (1.0, -1.0)))
    for parameter in trainer.reference.model.parameters():
        parameter.mul_(1.1)
    loss, _, gradients = update(trainer, groups)
    assert loss == 0 and gradients.keys() == dict(trainer.model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())
    assert update(trainer_of(model, processor, tmp_path, beta=1.0), groups)[0] != 0
