"""Ten rows for each recipe, in the format of its data, and their images: `python -m tests.data.standins.make`.

Everything follows from the seed. Sides are odd, so that a processor of patch grids changes them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
SIZE = (151, 97)  # of a scene, in px
SCREEN = (90, 133)  # of a screenshot
COLOURS = {"red": (200, 30, 30), "green": (30, 150, 60), "blue": (40, 60, 200), "yellow": (220, 190, 30)}
Box = tuple[int, int, int, int]
Scene = list[tuple[str, Box]]  # a colour and the box of its rectangle


def scene(rng: random.Random) -> Scene:
    """Two to four rectangles, one in each quarter at most, of any colours."""
    quarters = rng.sample([(0, 0), (75, 0), (0, 48), (75, 48)], rng.randint(2, 4))
    found = []
    for left, top in quarters:
        x, y = left + rng.randint(3, 20), top + rng.randint(3, 12)
        found.append((rng.choice([*COLOURS]), (x, y, x + rng.randint(20, 45), y + rng.randint(15, 28))))
    return found


def draw(parts: Scene, size: tuple[int, int], name: str) -> str:
    """Boxes are continuous: the last pixel within is the one before the right and lower edge."""
    image = Image.new("RGB", size, (235, 235, 235))
    for colour, (x1, y1, x2, y2) in parts:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLOURS[colour])
    image.quantize(8).save(FOLDER / "images" / name, optimize=True)
    return name


def row(image: str | list[str], question: str, answer: str, **columns: str) -> dict:
    markers = "<image>" * (len(image) if isinstance(image, list) else 1)
    turns = [{"from": "human", "value": markers + question}, {"from": "gpt", "value": f"<answer>{answer}</answer>"}]
    return {"image": image, "conversations": turns} | columns


def rec(name: str, parts: Scene) -> dict:
    colour, box = parts[0]
    where = "on the left" if box[0] < 75 else "on the right"
    question = f"Please provide the bounding box of the {colour} rectangle {where}."
    return row(name, question, json.dumps({"bbox_2d": box}))


def rec_in_thousandths(name: str, parts: Scene) -> dict:
    colour, box = parts[0]
    thousandths = [round(1000 * edge / SIZE[i % 2]) for i, edge in enumerate(box)]
    return row(name, f"Please provide the bounding box of the {colour} rectangle.", json.dumps(thousandths))


def ovd(name: str, parts: Scene, asked: tuple[str, str]) -> dict:
    found = [{"bbox_2d": box, "label": f"{colour} rectangle"} for colour, box in parts if colour in asked]
    answer = f"```json\n{json.dumps(found)}\n```" if found else "None"
    labels = ", ".join(f"{colour} rectangle" for colour in asked)
    return row(name, f"Please carefully check the image and detect the following objects: {labels}.", answer)


def math(name: str, parts: Scene, i: int) -> dict:
    count, red = len(parts), sum(colour == "red" for colour, _ in parts)
    if i % 3 == 0:
        return row(name, "How many rectangles are there?", str(count))
    if i % 3 == 1:
        question = "What share of the rectangles is red? Answer with a fraction."
        return row(name, question, f"\\frac{{{red}}}{{{count}}}", accu_reward_method="math")
    letters = {2: "A", 3: "B", 4: "C"}
    question = "How many rectangles are there? A. two B. three C. four"
    return row(name, question, letters[count], accu_reward_method="mcq")


def gui(rng: random.Random, i: int) -> dict:
    """Two screenshots, and in every second row a button that only the second one has."""
    buttons: Scene = [("blue", (8, 8 + 40 * place, 60 + rng.randint(0, 20), 30 + 40 * place)) for place in range(3)]
    added = buttons.pop(rng.randrange(3))
    before = draw(buttons, SCREEN, f"gui-{i}-before.png")
    if i % 2:
        after = draw([*buttons, added], SCREEN, f"gui-{i}-after.png")
        question = "Where do you click on the button that only the second screenshot has?"
        return row([before, after], question, json.dumps(added[1]), accu_reward_method="point_in_box")
    after = draw([*buttons, ("red", added[1])] if i % 4 else buttons, SCREEN, f"gui-{i}-after.png")
    answer = "Yes, a red button." if i % 4 else "No."
    return row([before, after], "Does the second screenshot have a defect?", answer)


def make() -> None:
    """Write the files and images of all recipes."""
    (FOLDER / "images").mkdir(exist_ok=True)
    rng = random.Random(0)
    scenes = [scene(rng) for _ in range(10)]
    names = [draw(parts, SIZE, f"scene-{i}.png") for i, parts in enumerate(scenes)]
    pairs = [(name, parts) for name, parts in zip(names, scenes, strict=True)]
    asked = [tuple(rng.sample([*COLOURS], 2)) for _ in pairs]
    files = {
        "rec-3b": [rec(*pair) for pair in pairs],
        "internvl-rec": [rec_in_thousandths(*pair) for pair in pairs],
        "ovd-3b": [ovd(*pair, colours) for pair, colours in zip(pairs, asked, strict=True)],
        "math-3b": [math(*pair, i) for i, pair in enumerate(pairs)],
        "gui-multi-image": [gui(rng, i) for i in range(10)],
    }
    for recipe, rows in files.items():
        (FOLDER / f"{recipe}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


if __name__ == "__main__":
    make()
