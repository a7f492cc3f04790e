"""Mode strict: what a right answer earns, and what no longer earns anything; more is in `reward_cases.jsonl`."""

import itertools
import json
import math

import pytest

from tests.helpers.rewards import answered, box
from vlmr1.rewards import score
from vlmr1.rewards.length import cosine, overlong


def accuracy(method, said, right):
    said = said if isinstance(said, str) else json.dumps(said)
    right = right if isinstance(right, str) else json.dumps(right)
    return score("accuracy", answered(said), f"<answer> {right} </answer>", accu_reward_method=method)


CAT, DOG = box(0, 0, 100, 100), box(200, 200, 300, 300, label="dog")


@pytest.mark.parametrize(
    "said, ap, by_count, weighted",
    [
        pytest.param([CAT, DOG], 1, 1, 1, id="right"),
        pytest.param([CAT], 1 / 2, 1 / 2, 0.35 + 0.3 * 0.75, id="missed"),
        pytest.param([CAT] * 5 + [DOG], (0.2 + 1) / 2, (0.2 + 1) / 6, 0.7 + 0.3 * (1 - 4 / 12), id="duplicates"),
        pytest.param(
            [CAT, DOG, box(0, 0, 9, 9, label="owl")], 2 / 3, 4 / 9, 0.7 + 0.3 * (1 - 1 / 6), id="unknown-label"
        ),
        pytest.param([CAT, DOG, {"label": "cat"}], 3 / 4, 1 / 2, 0.7 + 0.3 * (1 - 1 / 6), id="entry-without-box"),
        pytest.param([CAT, DOG, box(5, 5, 5, 5)], 3 / 4, 1 / 2, 0.7 + 0.3 * (1 - 1 / 6), id="box-without-area"),
        pytest.param([CAT, box(200, 200, 300, 300)], 1 / 4, 1 / 4, 0.35 + 0.3 / 2, id="wrong-label"),
        pytest.param([box(0, 0, 50, 100), DOG], 0.55, 0.55, 0.7 * 0.75 + 0.3, id="half"),
        pytest.param([box(0, 0, 100, 100, label=" Cat"), DOG], 1, 1, 1, id="case-of-a-label"),
        pytest.param([], 0, 0, 0, id="nothing"),
        pytest.param("None", 0, 0, 0, id="none"),
        pytest.param("a cat", 0, 0, 0, id="garbage"),
    ],
)
def test_detection(said, ap, by_count, weighted):
    right = [CAT, DOG]
    assert accuracy("od_ap", said, right) == pytest.approx(ap, abs=1e-12)
    assert accuracy("map", said, right) == pytest.approx(ap, abs=1e-12)
    assert accuracy("odLength", said, right) == pytest.approx(by_count, abs=1e-12)
    assert accuracy("weighted_sum", said, right) == pytest.approx(weighted, abs=1e-12)


def test_detection_at_one_threshold():
    assert accuracy("od_ap50", [box(0, 0, 50, 100), DOG], [CAT, DOG]) == 1
    assert accuracy("od_ap50", [box(0, 0, 49, 100), DOG], [CAT, DOG]) == 0.5


def test_two_boxes_are_matched_to_two_though_both_fit_the_first():
    """The first takes the only one that the second fits, and has to give it up."""
    right = [box(0, 0, 100, 100), box(0, 0, 100, 45)]
    said = [box(0, 0, 100, 70), box(0, 0, 100, 100)]
    for order in (said, said[::-1]):
        assert accuracy("od_ap50", order, right) == 1


@pytest.mark.parametrize("method", ["map", "od_ap", "od_ap50", "odLength", "weighted_sum"])
def test_the_order_of_boxes_does_not_matter(method):
    right = [CAT, DOG, box(50, 50, 150, 150)]
    said = [
        box(10, 0, 110, 100),
        box(55, 50, 150, 150),
        box(210, 200, 300, 300, label="dog"),
        box(0, 0, 9, 9, label="owl"),
    ]
    values = {accuracy(method, list(order), right) for order in itertools.permutations(said)}
    assert len(values) == 1 and 0 < values.pop() < 1


@pytest.mark.parametrize("method", ["map", "od_ap", "od_ap50", "odLength", "weighted_sum"])
@pytest.mark.parametrize("right", ["None", "[]", "```json\n[]\n```"], ids=["none", "list", "fence"])
def test_an_image_without_objects(method, right):
    for said in ("None", "none.", "[]", "```json\n[]\n```"):
        assert accuracy(method, said, right) == 1
    for said in ("garbage", "[{oops", "", "0", "[1, 2, 3]", json.dumps([CAT])):
        assert accuracy(method, said, right) == 0


@pytest.mark.parametrize("method", ["default", "mcq", "yes_no", "math", "all_match", "map", "iou", "counting"])
def test_without_an_answer_there_is_nothing(method):
    right = {"mcq": "A", "yes_no": "no", "map": "[]", "iou": "[0, 0, 1, 1]"}.get(method, "3")
    bare = [] if method in ("map", "iou") else [right]  # boxes are read without an answer
    for content in ("", *bare, f"<answer>{right}", f"<think>{right}", "<answer></answer>"):
        assert score("accuracy", content, f"<answer>{right}</answer>", accu_reward_method=method) == 0


def test_iou_of_boxes_in_px_of_the_model_input():
    kwargs = {"image_grid_thw": [1, 30, 46], "image_size": [641, 427]}
    solution = f"<answer>[0, 0, {641 / 2}, 427]</answer>"
    assert score("iou_qwen", answered("[0, 0, 322, 420]"), solution, **kwargs) == pytest.approx(1, abs=1e-12)
    assert score("iou_qwen", answered("[0, 0, 644, 420]"), solution, **kwargs) == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match="iou_qwen needs the columns image_grid_thw and image_size"):
        score("iou_qwen", answered("[0, 0, 1, 1]"), solution)


def test_cosine_falls_monotonically():
    values = [cosine(length, correct=True, longest=100) for length in range(101)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] == pytest.approx(0.5)
    assert values[25] == pytest.approx(1 - 0.25 * (1 - math.sqrt(0.5)))


def test_a_tokenizer_counts():
    class Letters:
        def encode(self, text):
            return list(text)

    content = "<answer>None</answer>"
    for tokenizer, length in ((Letters(), len(content)), ("whitespace", 1)):
        assert score("length", content, content, tokenizer=tokenizer) == cosine(length, correct=True)
    with pytest.raises(TypeError, match="tokenizer is None: it must have encode"):
        score("length", content, content)


@pytest.mark.parametrize("length, expected", [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (150, -1)])
def test_overlong(length, expected):
    assert overlong(length, 100, 20) == pytest.approx(expected, abs=1e-12)
