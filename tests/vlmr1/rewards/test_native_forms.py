"""Boxes in the form and the coordinates that each model family writes by itself, and which part of a text is read."""

import json

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers.rewards import group, sample, values
from vlmr1.data.box_coordinates import SPACES, BoxCoordinates
from vlmr1.rewards import RewardSettings, get_reward, score, score_groups

SIZE = (560, 280)
TRUE, OTHER = (280, 140, 336, 168), (0, 0, 56, 28)
HALVED = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 280 * 140})  # 560 x 280 -> 280 x 140
UNITS = {"original": (1, 1), "resized": (1 / 2, 1 / 2), "thousand": (1000 / 560, 1000 / 280)}

# By form: text before the boxes, a box, text between two, text behind; and what is left out to make it malformed.
FENCED = (
    "Here it is:\n```json\n[",
    '{{"bbox_2d": [{}, {}, {}, {}], "label": "cup"}}',
    ", ",
    "]\n```\nDone.",
    '"label"',
)
OBJECT = ("", '{{"bbox_2d": [{}, {}, {}, {}], "label": "cup"}}', "\n", "", "}")
SENTENCE = ("**The cup** is at ", "[{}, {}, {}, {}]", " or ", ".", "]")
CORNERS = ("", "({},{}),({},{})", " ", "", ")")
QWEN2_TOKENS = ("", "<|box_start|>({},{}),({},{})<|box_end|>", "", "", "<|box_end|>")
QWEN2_LABEL = ("<|object_ref_start|>cup<|object_ref_end|>", *QWEN2_TOKENS[1:])
LIST = ("", "[[{}, {}, {}, {}]]", ", ", "", "]")
INTERNVL = ("", "<box>[[{}, {}, {}, {}]]</box>", ", ", "", "</box>")
INTERNVL_LABEL = ("<ref>cup</ref>", *INTERNVL[1:])
GLM = ("<think>There.</think>It is at <|begin_of_box|>[", "[{}, {}, {}, {}]", ", ", "]<|end_of_box|>", "<|end_of_box|>")
GLM_ANSWER = ("<think>There.</think><answer><|begin_of_box|>[", *GLM[1:3], "]<|end_of_box|></answer>", "]")
GLM_ROUND = ("<|begin_of_box|>", "({}, {}, {}, {})", ", ", "<|end_of_box|>", ")")
QWEN_FORMS = {"fence": FENCED, "object": OBJECT, "sentence": SENTENCE}
FORMS = {
    "qwen2_vl": {"tokens": QWEN2_TOKENS, "label": QWEN2_LABEL, "corners": CORNERS},
    "qwen2_5_vl": QWEN_FORMS,
    "qwen3_vl": QWEN_FORMS,
    "internvl": {"box": INTERNVL, "ref and box": INTERNVL_LABEL, "list": LIST},
    "glm4v": {"box": GLM, "answer and box": GLM_ANSWER, "round brackets": GLM_ROUND, "list": LIST},
    "idefics3": {"sentence": SENTENCE, "list": LIST},
    "smolvlm": {"sentence": SENTENCE, "object": OBJECT},
}


def written(form, family, *boxes):
    before, box, between, behind, _ = form
    units = UNITS[SPACES[family]] * 2
    numbers = [[round(number * unit) for number, unit in zip(each, units, strict=True)] for each in boxes]
    return before + between.join(box.format(*each) for each in numbers) + behind


def rewards_of(family, texts, reward, solution, tmp_path, boxes=None, size=SIZE, grid=(1, 10, 20), **columns):
    """The scores of completions by a model of the family, all of an image of this size."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    row = sample(1, solution, [tmp_path / "a.png"], **columns)
    function = get_reward(reward, RewardSettings(boxes=boxes or BoxCoordinates.of("auto", family, HALVED)))
    groups = [group(row, *texts, images=[{"image_grid_thw": torch.tensor([grid])}])]
    ((*scores,),) = values(score_groups(groups, [function]))
    return [each for (each,) in scores]


@pytest.mark.parametrize("family, form", [(name, form) for name, forms in FORMS.items() for form in forms])
def test_one_box_two_boxes_malformed(family, form, tmp_path):
    kind = FORMS[family][form]
    one = written(kind, family, TRUE)
    malformed = one[: one.rindex(kind[-1])] + one[one.rindex(kind[-1]) + len(kind[-1]) :]
    texts = [one, written(kind, family, TRUE, OTHER), malformed]
    assert rewards_of(family, texts, "iou", json.dumps(TRUE), tmp_path) == pytest.approx([1, 0, 0], abs=1e-6)
    if "<think>" not in one:
        answered = [f"<think>so</think><answer>{each}</answer>" for each in texts]
        assert rewards_of(family, answered, "iou", json.dumps(TRUE), tmp_path) == pytest.approx([1, 0, 0], abs=1e-6)
    solution = json.dumps([{"bbox_2d": TRUE, "label": "Cup"}])
    for method in ("map", "od_ap", "od_ap50"):
        found = rewards_of(family, texts, "accuracy", solution, tmp_path, accu_reward_method=method)
        assert found == pytest.approx([1, 0.5, 0], abs=1e-6), method
    found = rewards_of(family, texts, "accuracy", solution, tmp_path, accu_reward_method="weighted_sum")
    assert found == pytest.approx([1, 0.7 + 0.3 * 0.75, 0], abs=1e-6)


def test_every_family_has_forms():
    assert FORMS.keys() == SPACES.keys()


@pytest.mark.parametrize(
    "family, box, coordinates, expected",
    [
        ("qwen2_vl", [500, 500, 600, 600], "auto", 1),  # thousandths
        ("qwen2_vl", [500, 500, 600, 600], "original", 0),  # trained to write pixels of the file
        ("qwen2_vl", [300, 150, 360, 180], "original", 1),
        ("qwen2_5_vl", [308, 154, 369.6, 184.8], "auto", 1),  # 616 x 308
        ("qwen2_5_vl", [500, 500, 600, 600], "thousand", 1),
        ("smolvlm", [500, 500, 600, 600], "thousand", 1),
    ],
)
def test_coordinates_of_a_family_and_of_a_model_trained_otherwise(family, box, coordinates, expected, tmp_path):
    boxes = BoxCoordinates.of(coordinates, family, Qwen2VLImageProcessorPil())
    more = {"boxes": boxes, "size": (600, 300), "grid": (1, 22, 44)}
    found = rewards_of(family, [f"<answer>{box}</answer>"], "iou", "[300, 150, 360, 180]", tmp_path, **more)
    assert found == pytest.approx([expected], abs=1e-6)


LABELLED = '[{"bbox_2d": [0, 0, 9, 9], "label": "cat"}, {"bbox_2d": [20, 0, 29, 9], "label": "dog"}]'
DETECTION = {
    "tokens of Qwen2-VL": (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(9,9)<|box_end|> "
        "<|object_ref_start|>Dog<|object_ref_end|><|box_start|>(20,0),(29,9)<|box_end|>",
        1,
    ),
    "tokens of InternVL": ("<ref>cat</ref><box>[[0,0,9,9]]</box> and <ref>dog</ref><box>[[20,0,29,9]]</box>", 1),
    "JSON in the tokens of GLM": (f"<|begin_of_box|>{LABELLED}<|end_of_box|>", 1),
    "a fence without an answer": (f"Two animals.\n```json\n{LABELLED}\n```", 1),
    "key bbox": (f"<answer>{LABELLED.replace('bbox_2d', 'bbox')}</answer>", 1),
    "labels exchanged": ("<ref>dog</ref><box>[[0,0,9,9]]</box><ref>cat</ref><box>[[20,0,29,9]]</box>", 0),
    "no labels, and two to choose from": ("<box>[[0,0,9,9],[20,0,29,9]]</box>", 0),
    "one label, several boxes": ("<ref>cat</ref><box>[[0,0,9,9],[20,0,29,9]]</box>", 0.5 * 0.5),
    "token not closed": ("<ref>cat</ref><box>[[0,0,9,9]]", 0),
    "broken JSON": ("```json\n" + LABELLED[:-1] + "\n```", 0),
}


@pytest.mark.parametrize("text, expected", DETECTION.values(), ids=DETECTION)
def test_labels_of_detection(text, expected):
    assert score("accuracy", text, LABELLED, accu_reward_method="od_ap") == pytest.approx(expected, abs=1e-12)


def test_words_in_the_marks_of_glm():
    """Its tokenizer may keep the marks around every answer."""
    for method, said, right in (("mcq", "B", "B"), ("math", "\\frac12", "1/2"), ("yes_no", "Yes", "yes")):
        content = f"<think>so</think><answer><|begin_of_box|>{said}<|end_of_box|></answer>"
        assert score("accuracy", content, right, accu_reward_method=method) == 1
