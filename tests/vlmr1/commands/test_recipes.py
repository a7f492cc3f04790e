"""Each recipe on ten rows in the format of its data: it trains through the command line, and its rewards say which
answers are right."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.data.standins import make
from tests.helpers.families import build
from tests.helpers.rewards import answered, group, values
from tests.helpers.slow import mostly_slow
from vlmr1.cli import main
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.prepare import prepare
from vlmr1.data.box_coordinates import SPACES
from vlmr1.data.boxes import scale_between, scale_box
from vlmr1.data.prompts import PromptBuilder
from vlmr1.data.templates import question_text
from vlmr1.models import family_of
from vlmr1.report.progress import read_metrics
from vlmr1.rewards import get_reward, score_groups
from vlmr1.rewards.answer import find_answer

STANDINS = Path(__file__).parents[2] / "data" / "standins"
WRONG = {
    "rec-3b": '{"bbox_2d": [0, 0, 3, 3]}',
    "ovd-3b": '[{"bbox_2d": [0, 0, 3, 3], "label": "red rectangle"}]',
    "math-3b": "17",
    "gui-multi-image": "(-5, -5)",
    "internvl-rec": "[0, 0, 3, 3]",
}
RECIPES = [*WRONG]
VARIANTS = {
    "rec-3b-lora": "rec-3b",
    "rec-3b-more-params": "rec-3b",
    "gui-defect-7b": "gui-multi-image",
}  # and whose data
PIXELS = [recipe for recipe in RECIPES if recipe != "internvl-rec"]  # true boxes are in pixels of the file
NUMBERS = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return build("internvl", tmp_path_factory.mktemp("recipes") / "internvl")


def words(recipe, model, output):
    """What a user overrides: model, data, place, sizes."""
    settings = {
        "model_name_or_path": model,
        "data_file_paths": STANDINS / f"{VARIANTS.get(recipe, recipe)}.jsonl",
        "image_folders": STANDINS / "images",
        "output_dir": output,
        "use_cpu": "true",
        "bf16": "false",
        "max_steps": 2,
        "prompts_per_device": 1,
        "num_generations": 2,
        "max_completion_length": 6,
        "write_report": "false",
    }
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.fixture
def model(recipe, internvl):
    return internvl if recipe == "internvl-rec" else "tiny"


@pytest.mark.parametrize("recipe", mostly_slow([*RECIPES, *VARIANTS], "rec-3b-lora", "internvl-rec"))
def test_a_recipe_trains(recipe, model, tmp_path):
    assert main(["train", "--recipe", recipe, *words(recipe, model, tmp_path)]) == 0
    metrics = read_metrics(tmp_path)
    config = parse_config(["--use_cpu", "true"], recipe=recipe)
    assert [step["step"] for step in metrics] == [1, 2]
    for step in metrics:
        assert {f"rewards/{name}/mean" for name in config.reward_funcs} <= step.keys()
        assert 1 <= step["completion_length"] <= 6
    weights = "adapter_model" if config.use_peft else "model"
    assert (tmp_path / "checkpoint-2" / f"{weights}.safetensors").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rewards_of_a_recipe_fit_its_data(recipe, model, tmp_path):
    """Every reward gives the true answer 1; the wrong one has the format alone; without tags only boxes are read."""
    config = parse_config(words(recipe, model, tmp_path), recipe=recipe)
    prepared = prepare(config)
    builder = PromptBuilder(prepared.model, family_of(prepared.model), prepared.processor)
    family, image_processor = prepared.model.config.model_type, prepared.processor.image_processor
    settings = config.rewards().with_boxes(config.box_coordinates, family, image_processor)
    rewards = [get_reward(name, settings) for name in config.reward_funcs]
    template = question_text(config.question_template, family)
    assert len(prepared.train) == 10
    for sample in prepared.train:
        prompt = builder(sample)
        answer = find_answer(sample.solution)
        if recipe in PIXELS:
            answer = written(answer, prompt, family, image_processor.patch_size)
        right, wrong = answered(answer), answered(WRONG[recipe])
        groups = [replace(group(sample, right, wrong, answer), prompt=prompt)]
        ((of_right, of_wrong, of_bare),) = values(score_groups(groups, rewards))
        assert of_right == pytest.approx([1, 1], abs=1e-6), sample.source
        assert of_wrong[0] < 0.1 and of_wrong[1] == 1, sample.source
        assert of_bare == pytest.approx([float("[" in answer or answer == "None"), 0], abs=1e-6), sample.source
        shown = prepared.processor.tokenizer.decode(prompt.input_ids)  # no character is unknown to the tiny models
        question = json.loads(line_of(sample))["conversations"][0]["value"].replace("<image>", "")
        assert template.format(question=question) in shown


def line_of(sample):
    path, _, line = sample.source.rpartition(":")
    return Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def written(answer, prompt, family, patch):
    """A true answer with its boxes as the model writes them: it sees the image resized."""
    with Image.open(prompt.sample.images[0]) as image:
        size = image.size
    _, rows, columns = (prompt.images[0]["image_grid_thw"][0] * patch).tolist()
    assert (columns, rows) != size
    extent = {"resized": (columns, rows), "thousand": (1000, 1000), "original": size}[SPACES[family]]
    scale = scale_between(size, extent)
    return NUMBERS.sub(lambda box: json.dumps(scale_box(tuple(map(int, box.groups())), scale)), answer)


def test_the_standins_are_what_their_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.make()
    for path in [*tmp_path.rglob("*.jsonl"), *tmp_path.rglob("*.png")]:
        kept = STANDINS / path.relative_to(tmp_path)
        if path.suffix == ".jsonl":
            assert path.read_text() == kept.read_text()
        else:  # how a file is compressed depends on libraries
            with Image.open(path) as one, Image.open(kept) as other:
                assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()
    made, kept = ({path.name for path in folder.rglob("*.*")} for folder in (tmp_path, STANDINS))
    assert made == {name for name in kept if name.endswith((".jsonl", ".png"))}
