"""The loader's workers: the same prompts, the same weights, and faults in the words that they have without workers."""

import json
import pickle
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from tests.helpers import digit_runs
from vlmr1.cli import main
from vlmr1.config import GRPOConfig
from vlmr1.data.faults import RowFault
from vlmr1.data.loader import PickledBatch, batch_loader, unpacked
from vlmr1.data.samples import load_samples
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.tiny import digits


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "train", 9, seed=1)
    return folder


def batches(data, model, processor, workers):
    config = GRPOConfig(
        output_dir=str(data / "out"), use_cpu=True, prompts_per_device=2, dataloader_num_workers=workers, seed=3
    )
    samples = load_samples([data / "train.jsonl"], [data / "images"], question="{question}", check_images=False)
    trainer = GRPOTrainer(model, config, samples, processor)
    torch.manual_seed(0)
    loader = trainer.get_train_dataloader()
    raw = [*loader]
    assert all(isinstance(batch[0], PickledBatch) is (workers > 0) for batch in raw)
    return [unpacked(batch) for batch in raw], torch.rand(1).item()


def test_workers_make_the_same_prompts_in_the_same_order(data, model, processor):
    expected, after = batches(data, model, processor, 0)
    made, after_workers = batches(data, model, processor, 2)
    assert [len(batch) for batch in expected] == [2, 2, 2, 2, 1]
    assert after == after_workers  # the random numbers of this process
    for one, other in zip(chain(*expected), chain(*made), strict=True):
        assert one.sample == other.sample
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.positions, other.positions)
        assert one.images[0].keys() == other.images[0].keys()
        assert all(torch.equal(one.images[0][name], other.images[0][name]) for name in one.images[0])


@pytest.mark.parametrize(("asked", "accelerator"), [(True, True), (True, False), (False, True)])
def test_memory_is_pinned_where_there_is_a_device_for_it(asked, accelerator, data, monkeypatch):
    """Without one torch would warn."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    args = GRPOConfig(output_dir=str(data / "out"), dataloader_pin_memory=asked)
    loader = batch_loader([], BatchSampler([], 1, False), args, Accelerator(cpu=True))
    assert loader.pin_memory == (asked and accelerator)


def command(data, output, workers, *more):
    small = {"num_generations": 2, "max_completion_length": 8, "max_steps": 4, "dataloader_num_workers": workers}
    return digit_runs.command(data, output, *map(str, more), **small)


@pytest.mark.slow
def test_a_run_that_goes_on_with_workers_ends_with_the_same_weights(data, tmp_path):
    """Two updates share a generation, so that workers make empty batches too."""
    lines = [
        "def alternating(prompts, completions, **columns):",
        "    return [float(i % 2) for i in range(len(completions))]",
    ]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    more = ["--steps_per_generation", 2, "--prompts_per_device", 1, "--reward_funcs", f"{tmp_path}/mine.py:alternating"]
    assert main(command(data, tmp_path / "none", 0, *more)) == 0
    checkpoint = tmp_path / "none" / "checkpoint-2"
    assert main(command(data, tmp_path / "two", 2, *more, "--resume_from_checkpoint", checkpoint)) == 0
    weights = [load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("none", "two")]
    before = load_file(checkpoint / "model.safetensors")
    assert any(not torch.equal(before[name], weights[0][name]) for name in before)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.slow
def test_a_fault_of_a_row_is_one_line(workers, data, tmp_path, capsys):
    """The image is cut after it was checked, so to speak: check_images is off."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (data / "images" / "cut.png").write_bytes((data / "images" / rows[0]["image"]).read_bytes()[:-2000])
    rows[4]["image"] = "cut.png"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = command(data, tmp_path / "out", workers, "--check_images", "false", "--max_steps", 9)
    words[words.index("--data_file_paths") + 1] = str(path)
    capsys.readouterr()
    assert main(words) == 2
    shown = capsys.readouterr().err
    _, _, message = shown.rpartition("vlmr1: ")
    assert message.startswith(f"{path}:5: image ") and "cannot be decoded" in message and message.count("\n") == 1
    assert "Traceback" not in shown


def test_a_fault_keeps_its_kind():
    fault = RowFault("rows.jsonl:5: gone", "missing image", "rows.jsonl:5")
    with pytest.raises(RowFault) as caught:
        unpacked([PickledBatch(pickle.dumps(fault))])
    assert (
        str(caught.value) == str(fault) and caught.value.kind == "missing image" and caught.value.source == fault.source
    )
