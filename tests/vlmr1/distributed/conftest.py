"""Rows for two ranks, laid out by the seeded order of the data so that in the first update one rank has no image, in
the second one rank has only groups of equal rewards."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.golden.cases import REWARD
from tests.helpers.two_ranks import ROOT, ROWS, words
from vlmr1.commands.arguments import parse_config
from vlmr1.data.loader import as_list
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model, load_processor

FUSED = """
from tests.helpers.fused import DEFINITIONS
from vlmr1.models.family import ModelFamily

ModelFamily.operators = property(lambda self: DEFINITIONS, lambda self, value: None)
"""


def order_of_rows(folder: Path) -> list[int]:
    """The places of the rows in the order in which a run takes them."""
    config = parse_config(words(folder, folder / "unused", prompts_per_device=4, use_cpu="true"))
    model, processor = load_model(ROOT / "vlmr1/tiny/checkpoint"), load_processor(ROOT / "vlmr1/tiny/checkpoint")
    trainer = GRPOTrainer(model, config, [], processor)
    trainer.train_dataset = list(range(ROWS))
    trainer.data_collator = as_list
    return [row for batch in trainer.get_train_dataloader() for row in batch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    (folder / "fused.py").write_text(REWARD + FUSED, encoding="utf-8")
    rng = np.random.default_rng(0)
    rows: list[dict] = [{}] * ROWS
    (folder / "data.jsonl").write_text('{"prompt": "?", "solution": "1", "flat": true}\n', encoding="utf-8")
    for place, row in enumerate(order_of_rows(folder)):
        update, rank = place // 2 % 2, place % 2  # two prompts an update, one a rank
        rows[row] = {"prompt": f"What is {row}?", "solution": "1", "flat": update == 1 and rank == 1}
        if update == 1 or rank == 0:
            size = (56, 84, 112)[row % 3]
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{row}.png")
            rows[row] |= {"prompt": f"Locate the digit {row}.", "image": f"{row}.png"}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
