"""The table of the rewards' README: each of its figures is what the code computes."""

import re
from pathlib import Path

import pytest

from vlmr1.rewards import score
from vlmr1.rewards.registry import REWARDS
from vlmr1.rewards.strict.accuracy import METHODS

README = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
TABLE = README.partition("| case |")[2].partition("\n\n")[0].splitlines()[2:]
ROWS = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in TABLE]
FENCED = ("map", "od_ap", "od_ap50", "odLength", "weighted_sum")
BOX = re.compile(r"(\w+)\[([-\d., ]+)\]")
OPTIONS = {"tokenizer": "whitespace", "image_grid_thw": [1, 20, 20], "image_size": [280, 280]}


def spelled(text, reward):
    """`cat[0,0,9,9]` -> the JSON of a box in a fence, `word x 3` -> word word word."""
    text = text.strip("`")
    if reward in FENCED and BOX.match(text):
        boxes = [f'{{"bbox_2d": [{numbers}], "label": "{label}"}}' for label, numbers in BOX.findall(text)]
        return f"```json\n[{', '.join(boxes)}]\n```"
    return re.sub(r"(\w+) x (\d+)", lambda match: " ".join([match[1]] * int(match[2])), text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table(row):
    _, reward, completion, solution, *figures = row
    content = spelled(completion, reward)
    if not completion.startswith("`<") and reward not in ("length", "repetition"):
        content = f"<think>so</think><answer>{content}</answer>"
    truth = f"<answer>{spelled(solution, reward)}</answer>"
    options = OPTIONS if reward in REWARDS else OPTIONS | {"accu_reward_method": reward}
    name = reward if reward in REWARDS else "accuracy"
    for mode, figure in zip(("vlm_r1", "strict"), figures, strict=True):
        assert score(name, content, truth, mode=mode, **options) == pytest.approx(float(figure), abs=5e-5), mode


def test_every_reward_and_method_is_named():
    for name in (*REWARDS, *METHODS, "llm"):
        assert f"`{name}`" in README, name
