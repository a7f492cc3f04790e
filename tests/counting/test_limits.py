"""Operators and bytes of one layer, counted on tensors without data, within the limits of limits.toml.

Models have their published widths and one layer. They run on fake CPU tensors with autocast to bfloat16, which inserts
the casts of CUDA's around matrix products: for stock layers the counts are those of a CUDA build of torch. CUDA's also
runs LayerNorm and some reductions in float32, of which Qwen2.5-VL has none. Liger's operators and attention are the
stand-ins of `vlmr1 plan`. Views and allocations are not counted; bytes are those of all tensors that an operator reads
or writes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.helpers.jobs import job
from tests.helpers.limits import LIMITS
from vlmr1.planner.job import packs_of, prompts_of
from vlmr1.planner.known_models import config_named
from vlmr1.planner.passes import policy_of
from vlmr1.planner.plan import model_without_data
from vlmr1.planner.work import Kernels, WorkRun, totals

ROOT = Path(__file__).parents[2]
BY_TEST = {each["test"]: each["limit"] for each in LIMITS}
TRAFFIC = "tests/kernels/test_traffic.py::test_bytes_of_a_step_are_within_limits"


@pytest.fixture
def limit(request: Any) -> float:
    """The limit that names this test."""
    return BY_TEST[request.node.nodeid]


@contextmanager
def counted_apart(run: WorkRun, module: nn.Module, name: str) -> Iterator[None]:
    """In this block what the module's forward runs is of a phase of its own: the one around it, and this name."""
    phases: list[str] = []

    def enter(*_: Any) -> None:
        phases.append(run.phase)
        run.phase += name

    def leave(*_: Any) -> None:
        run.phase = phases.pop()

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    yield
    for handle in handles:
        handle.remove()


class Counted:
    """A job on a model of one layer, and the kernels of its decoder layer and of its tower block."""

    def __init__(self, name: str, **settings: Any):
        config = config_named(name)
        text, vision = config.get_text_config(), config.vision_config
        text.num_hidden_layers, text.layer_types, vision.depth = 1, ["full_attention"], 1
        vision.fullatt_block_indexes, vision.deepstack_visual_indexes = [0], []
        self.job = job(config, bf16=True, num_generations=8, tokens_per_pack=16384, **settings)
        self.run = WorkRun()
        trained = model_without_data(self.job, self.run)
        self.policy = policy_of(self.job, trained, self.run)
        self.prompts = prompts_of(self.job, self.policy.family, self.policy.model)

    @contextmanager
    def counting(self) -> Iterator[None]:
        model, family = self.policy.model, self.policy.family
        layer = attrgetter(family.decoder_path)(model).layers[0]
        block = attrgetter(family.vision_paths[0])(model).blocks[0]
        weights = {p.numel() for p in (*layer.parameters(), *block.parameters()) if p.dim() == 2}
        self.weights = weights
        with counted_apart(self.run, layer, " layer"), counted_apart(self.run, block, " block"), self.run:
            yield

    def kernels(self, phase: str) -> Kernels:
        return sum((each for (name, _), each in self.run.kernels.items() if name == phase), Counter())

    def weight_casts(self, kernels: Kernels) -> Kernels:
        """Casts of tensors as large as a weight of the layer."""
        return Counter({k: n for k, n in kernels.items() if k.name == "_to_copy" and k.numels[0] in self.weights})


def moved(kernels: Kernels) -> float:
    return totals(kernels)["bytes"]


@pytest.fixture(scope="module")
def forward() -> Counted:
    """The forward of a policy pass: 5 groups of 1,200 prompt tokens and 8 branches of 255."""
    settings = {"prompts_per_device": 5, "max_completion_length": 256, "image_tokens": 992, "text_tokens": 208}
    counted = Counted("Qwen2.5-VL-3B-Instruct", **settings)
    counted.policy.model.train()
    [counted.pack] = packs_of(counted.job, counted.prompts)
    with counted.counting():
        counted.policy.hidden_rows(counted.pack)
    return counted


@pytest.mark.parametrize(("where", "phase"), [("decoder", " layer"), ("tower", " block")], ids=["decoder", "tower"])
def test_bytes_of_a_training_forward(where: str, phase: str, forward: Counted, limit: float):
    """Outside of matrix products, attention and the casts of weights, which do not grow with the pack."""
    kernels, pack = forward.kernels(phase), forward.pack
    assert len(pack.input_ids) == 16_200
    rows = {"decoder": len(pack.input_ids), "tower": sum(len(image["pixel_values"]) for image in pack.images)}
    others = Counter({kernel: n for kernel, n in kernels.items() if kernel.kind == "other"})
    assert 0 < moved(others - forward.weight_casts(kernels)) / rows[where] / 1e3 <= limit


# The table


def test_every_limit_has_its_test():
    for test in BY_TEST:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test
    assert len({each["what"] for each in LIMITS}) == len(LIMITS)


def test_limits_of_traffic_are_those_of_its_test():
    traffic = pytest.importorskip("tests.kernels.test_traffic").LIMITS
    for test, limit in BY_TEST.items():
        if test.startswith(TRAFFIC):
            assert traffic[test.removeprefix(f"{TRAFFIC}[").removesuffix("]")][3] == limit


def table() -> str:
    """The table of docs/kernels.md."""
    rows = [(each["what"], f"{each['before']:g}", f"{each['limit']:g}", f"`{each['test']}`") for each in LIMITS]
    head = ["| counted | before | limit | test |", "|---|--:|--:|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def test_the_manual_has_the_table():
    assert table() in (ROOT / "docs/kernels.md").read_text(), f"docs/kernels.md should have:\n{table()}"
