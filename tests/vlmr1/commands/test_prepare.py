"""What a run starts from: files joined as VLM-R1's scripts join them, one pass over the rows, the validation split,
images as the settings limit them."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.rows import row, write
from vlmr1.cli import main
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.prepare import prepare
from vlmr1.commands.train import train
from vlmr1.data.rows import LineRows
from vlmr1.errors import DataError, SettingError
from vlmr1.models import load_processor


@pytest.fixture
def folder(tmp_path):
    for name, size in (("one", 56), ("two", 84)):
        (tmp_path / name).mkdir()
        noise = np.random.default_rng(size).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name / "a.png")
    (tmp_path / "one" / "cut.png").write_bytes((tmp_path / "one" / "a.png").read_bytes()[:-900])
    return tmp_path


def config(folder, files, folders, *more):
    words = ["--model_name_or_path", "tiny", "--use_cpu", "true", "--output_dir", str(folder / "out")]
    return parse_config([*words, "--data_file_paths", str(files), "--image_folders", str(folders), *map(str, more)])


def test_files_folders_and_methods_joined_by_colons(folder):
    first = write(folder / "a.jsonl", row(), row(gpt="B", accu_reward_method="mcq"))
    second = write(folder / "b.jsonl", row(gpt="seven"))
    settings = config(
        folder, f"{first}:{second}", f"{folder}/one:{folder}/two", "--accu_reward_method", "iou:all_match"
    )
    samples = prepare(settings).train
    found = [(each.source, each.images[0].parent.name, each.columns["accu_reward_method"]) for each in samples]
    assert found == [(f"{first}:1", "one", "iou"), (f"{first}:2", "one", "mcq"), (f"{second}:1", "two", "all_match")]
    with pytest.raises(SettingError, match="accu_reward_method has 3 methods for 2 data files"):
        prepare(config(folder, f"{first}:{second}", f"{folder}/one", "--accu_reward_method", "iou:map:mcq"))
    with pytest.raises(DataError, match=rf"^{second}:1: the solution has no box"):
        prepare(config(folder, f"{first}:{second}", f"{folder}/one", "--accu_reward_method", "iou"))


def test_each_row_is_read_once(folder, monkeypatch):
    path = write(folder / "a.jsonl", *[row()] * 5)
    read, real = [], LineRows.read
    monkeypatch.setattr(LineRows, "read", lambda self, index: read.append(index) or real(self, index))
    prepare(config(folder, path, folder / "one", "--reward_funcs", "accuracy", "iou", "format"))
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row(), row(image="cut.png"), row(gpt="none")], ":2: image .*cut.png cannot be decoded"),
        ([row(), row(gpt="none"), row(image="cut.png")], ":2: the solution has no box"),
        ([row(image="cut.png", gpt="none"), row(image="gone.png")], ":1: the solution has no box"),
        ([row(image="cut.png"), row(image="gone.png")], ":1: image .*cut.png cannot be decoded"),
        ([row(), row(image="gone.png"), row(image="cut.png")], ":2: image gone.png is missing"),
    ],
    ids=["image-first", "reward-first", "same-row", "image-before-row", "row-before-image"],
)
def test_the_first_row_with_a_fault_is_named(rows, expected, folder):
    path = write(folder / "a.jsonl", *rows)
    with pytest.raises(DataError, match=rf"^{path}{expected}"):
        prepare(config(folder, path, folder / "one"))


def test_several_images_of_different_scale_stop_the_run_before_training(folder, capsys):
    """The second file is 84 px, which the processor leaves; the first is made of odd sides."""
    Image.new("RGB", (75, 133)).save(folder / "two" / "odd.png")
    path = write(folder / "a.jsonl", row(), row("Where?", image=["odd.png", "a.png"]))
    words = ["train", "--model_name_or_path", "tiny", "--use_cpu", "true", "--output_dir", f"{folder}/out"]
    words += ["--data_file_paths", str(path), "--image_folders", f"{folder}/two"]
    assert main(words) == 2
    (message,) = capsys.readouterr().err.splitlines()[-1:]
    assert message.startswith(f"vlmr1: {path}:2: its 2 images have different scales") and not (folder / "out").exists()
    assert len(prepare(config(folder, path, folder / "two", "--box_coordinates", "original")).train) == 2


def test_the_validation_split(folder):
    path = write(folder / "a.jsonl", *(row(id=i) for i in range(20)))

    def ids(*more):
        prepared = prepare(config(folder, path, folder / "one", "--check_images", "false", *more))
        return [[each.columns["id"] for each in part] for part in (prepared.train, prepared.validation or [])]

    assert ids() == [list(range(20)), []]
    kept, held = ids("--val_split_ratio", 0.2)
    assert len(held) == 4 and sorted(kept + held) == list(range(20)) and kept == sorted(kept)
    assert ids("--val_split_ratio", 0.2) == [kept, held]
    assert ids("--val_split_ratio", 0.2, "--seed", 7) == ids("--val_split_ratio", 0.2, "--data_seed", 7) != [kept, held]
    assert ids("--val_split_ratio", 0.2, "--seed", 9, "--data_seed", 42) == [kept, held]  # 42 is the default seed


def test_rows_of_both_parts_are_checked(folder):
    path = write(folder / "a.jsonl", row(), row(gpt="none"))
    for seed in range(4):
        with pytest.raises(DataError, match=rf"^{path}:2: the solution has no box"):
            prepare(config(folder, path, folder / "one", "--val_split_ratio", 0.5, "--seed", seed))


def test_training_takes_the_train_part_and_the_limits_of_images(folder):
    path = write(folder / "a.jsonl", *(row(id=i) for i in range(6)))
    more = ["--val_split_ratio", 0.5, "--min_pixels", 112 * 112, "--max_pixels", 112 * 112, "--max_steps", 1]
    more += ["--prompts_per_device", 2, "--num_generations", 2, "--max_completion_length", 4, "--disable_tqdm", "true"]
    trainer = train(config(folder, path, folder / "one", *more))
    assert len(trainer.train_dataset) == 3
    assert trainer.train_dataset[0].images[0]["image_grid_thw"].tolist() == [[1, 8, 8]]  # 56 px enlarged to 112
    saved = load_processor(folder / "out" / "checkpoint-1")
    assert dict(saved.image_processor.size) == {"shortest_edge": 112 * 112, "longest_edge": 112 * 112}


def test_limits_reach_the_check_of_data_files(folder, capsys):
    path = write(folder / "a.jsonl", row())
    words = ["data", "check", str(path), "--images", f"{folder}/one", "--model", "tiny", "--max_prompt_length", "40"]
    assert main(words) == 0
    assert main([*words, "--min_pixels", str(280 * 280)]) == 1  # 100 image tokens
    assert "prompt length" in capsys.readouterr().out
    assert main([*words, "--max_anyres_num", "6"]) == 2
    assert main(["data", "check", str(path), "--images", f"{folder}/one", "--max_pixels", "9"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("vlmr1: max_anyres_num cannot be set for qwen2_5_vl")
    assert lines[-1].startswith("vlmr1: --max_pixels needs --model")


def test_the_check_of_data_files_knows_box_coordinates(folder, capsys):
    Image.new("RGB", (75, 133)).save(folder / "one" / "odd.png")
    path = write(folder / "a.jsonl", row("Where?", image=["a.png", "odd.png"]))
    words = ["data", "check", str(path), "--images", f"{folder}/one", "--reward_funcs", "accuracy"]
    assert main(words) == 0
    assert main([*words, "--model", "tiny"]) == 1
    assert f"{path}:1: solution: its 2 images have different scales" in capsys.readouterr().out
    assert main([*words, "--model", "tiny", "--box_coordinates", "original"]) == 0
