"""`vlmr1 data rate` on the embedded model: the same bytes after a kill, and training on the rows that it rated."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.helpers.pages import Page
from tests.helpers.tiny_runs import during, write_data
from vlmr1.cli import main
from vlmr1.commands.arguments import parse_config
from vlmr1.commands.prepare import prepare
from vlmr1.data.mixture import Mixture
from vlmr1.data.pass_rates import PassRates, within_pass_rates
from vlmr1.data.samples import load_samples
from vlmr1.errors import DataError, SettingError
from vlmr1.evaluation.rate import Rater
from vlmr1.evaluation.rate_options import pass_reward_of
from vlmr1.evaluation.rated import rate_rows, write_rows
from vlmr1.report.pass_rates import histogram
from vlmr1.rewards import score
from vlmr1.tiny import digits

ROWS, GENERATIONS = 7, 4
SAME = ("train.rated.jsonl", "completions.jsonl", "results.json", "evaluation.json")
ENGINES = ("native", "transformers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"))
    digits.write(folder, "train", ROWS, seed=3)
    return folder


def run_settings(data: Path, rows: Path, output: Path, *more: Any) -> list[str]:
    words = ["--model_name_or_path", "tiny", "--data_file_paths", rows, "--image_folders", data / "images", "--use_cpu"]
    words += ["true", "--reward_funcs", "accuracy", f"{data}/mine.py:mine", "--reward_weights", "1.0", "0.5"]
    words += ["--prompts_per_device", 2, "--max_completion_length", 40, "--temperature", 1.3, "--output_dir", output]
    words = [str(word) for word in (*words, "--num_generations", GENERATIONS)]
    names = [word for word in more if str(word).startswith("--")]
    for name in names:  # `more` replaces settings
        if name in words:
            start = words.index(name)
            end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[start:end]
    return [*words, *map(str, more)]


def command(data: Path, output: Path, *more: Any) -> list[str]:
    return ["data", "rate", "--pictures", "1", *run_settings(data, data / "train.jsonl", output, *more)]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ratings that nothing disturbed, by engine."""
    outputs = {engine: tmp_path_factory.mktemp(engine) for engine in ENGINES}
    for engine, output in outputs.items():
        assert main(command(data, output, "--rollout_engine", engine)) == 0
    return {engine: output / "tiny" for engine, output in outputs.items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_same(one: Path, other: Path, names: tuple[str, ...] = SAME) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_each_row_gets_its_pass_rate_and_mean_reward(whole, data):
    """The completions are scored again, one at a time."""
    rows, records = lines(data / "train.jsonl"), lines(whole["native"] / "completions.jsonl")
    rated = lines(whole["native"] / "train.rated.jsonl")
    assert len(rows) == len(records) == len(rated) == ROWS
    for row, record, own in zip(rows, records, rated, strict=True):
        solution = row["conversations"][-1]["value"]
        ious = [score("accuracy", text, solution) for text in record["completions"]]
        mine = [len(set(text)) / 10 for text in record["completions"]]
        assert len(ious) == GENERATIONS and len(set(record["completions"])) > 1
        reward = sum(iou + 0.5 * other for iou, other in zip(ious, mine, strict=True)) / GENERATIONS
        rate = sum(iou >= 0.5 for iou in ious) / GENERATIONS
        assert own == row | {"pass_rate": rate, "mean_reward": pytest.approx(reward, abs=1e-5)}
    assert len({own["pass_rate"] for own in rated}) > 1
    metrics = json.loads((whole["native"] / "results.json").read_text())["metrics"]
    assert metrics["pass_rate"]["value"] == pytest.approx(sum(own["pass_rate"] for own in rated) / ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_in_the_middle_and_continued(engine, whole, data, tmp_path):
    """Killed where the third of four batches is scored; the same command then gives the same files."""
    words = command(data, tmp_path, "--rollout_engine", engine)
    during(data, 3, "os.kill(os.getpid(), signal.SIGKILL)")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-m", "vlmr1.cli", *words], capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(lines(tmp_path / "tiny" / "completions.jsonl")) == 4
    assert not list((tmp_path / "tiny").glob("*.rated.jsonl"))
    assert main(words) == 0
    assert_same(tmp_path / "tiny", whole[engine])


def test_only_missing_rows_are_sampled(whole, data, tmp_path, monkeypatch):
    """Half a line and half a batch are sampled again; a row's random numbers do not depend on what came before."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "evaluation.json").write_bytes((whole["native"] / "evaluation.json").read_bytes())
    found = (whole["native"] / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "completions.jsonl").write_bytes(b"".join([*found[2:5], found[5][:-30]]))
    sampled, original = [], Rater.__call__
    monkeypatch.setattr(Rater, "__call__", lambda self, s, rows: sampled.extend(rows) or original(self, s, rows))
    assert main(command(data, tmp_path)) == 0
    assert sampled == [0, 1, 4, 5, 6]
    assert_same(folder, whole["native"])
    # Another reward decides: nothing is sampled again.
    assert main(command(data, tmp_path, "--pass_reward", f"{data}/mine.py:mine", "--pass_threshold", "1e9")) == 0
    assert sampled == [0, 1, 4, 5, 6]
    assert {row["pass_rate"] for row in lines(folder / "train.rated.jsonl")} == {0.0}


def test_a_row_does_not_depend_on_its_batch(whole, data, tmp_path):
    assert main(command(data, tmp_path, "--prompts_per_device", 3)) == 0
    assert_same(tmp_path / "tiny", whole["native"], SAME[:2])


@pytest.mark.slow
def test_two_ranks(whole, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*torchrun, "-m", "vlmr1.cli", *command(data, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean reward") == 1  # one rank speaks
    assert_same(tmp_path / "tiny", whole["native"])


@pytest.mark.parametrize(
    "more, name",
    [
        (["--num_generations", 5], "options.num_generations is 5"),
        (["--seed", 7], "options.seed is 7"),
        (["--rollout_engine", "transformers"], "options.rollout_engine is 'transformers'"),
        (["--reward_weights", 1, 1], "options.reward_weights is [1.0, 1.0]"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_in_a_directory_are_refused(more, name, whole, data, capsys):
    assert main(command(data, whole["native"].parent, *more)) == 2
    assert f"vlmr1: {name}, but the evaluation in {whole['native']} was begun with" in capsys.readouterr().err


def test_a_changed_reward_function_is_refused(data, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def own(completions, **columns):\n    return [1.0 for _ in completions]\n")
    words = command(data, tmp_path / "out", "--reward_funcs", f"{tmp_path}/own.py:own", "--reward_weights", 1)
    assert main(words) == 0
    assert {row["pass_rate"] for row in lines(tmp_path / "out/tiny/train.rated.jsonl")} == {1.0}
    (tmp_path / "own.py").write_text("def own(completions, **columns):\n    return [0.0 for _ in completions]\n")
    assert main(words) == 2
    assert "reward_files" in capsys.readouterr().err


def test_a_row_for_which_a_reward_raises_scores_0(data, tmp_path):
    source = (
        "def own(completions, id, **columns):\n    assert 'train-4' not in id\n    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "own.py").write_text(source)
    words = command(data, tmp_path / "out", "--reward_funcs", f"{tmp_path}/own.py:own", "--reward_weights", 1)
    assert main(words) == 0
    rated, records = (lines(tmp_path / "out/tiny" / name) for name in ("train.rated.jsonl", "completions.jsonl"))
    assert [row["pass_rate"] for row in rated] == [float(row["id"] != "train-4") for row in rated]
    assert [record["timed_out"] for record in records] == [GENERATIONS * (row["id"] == "train-4") for row in rated]
    # The row that raises may be the first of a rating that goes on.
    path = tmp_path / "out/tiny/completions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert main(words) == 0 and lines(path) == records


@pytest.mark.parametrize(
    "functions, name, expected",
    [
        (["format", "accuracy"], None, 1),
        (["a.py:f"], None, 0),
        (["format", "accuracy"], "format", 0),
        (["format", "iou"], None, "--pass_reward is not set.*format, iou"),
        (["format"], "accuracy", "--pass_reward: 'accuracy'"),
    ],
)
def test_which_reward_decides(functions, name, expected):
    if isinstance(expected, int):
        assert pass_reward_of(functions, name) == expected
    else:
        with pytest.raises(SettingError, match=expected):
            pass_reward_of(functions, name)


# The rated rows


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Where?", "solution": "[0, 0, 28, 28]", **columns}


def write(path: Path, *rates: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row(pass_rate=rate, id=i)) + "\n" for i, rate in enumerate(rates)))
    return path


def load(*names: Any, **options: Any) -> Any:
    return load_samples(names, [], question="{question}", check_images=False, **options)


def test_rows_of_several_files_and_formats(tmp_path, monkeypatch):
    """Each file gets its own; columns of an earlier rating are replaced; of tables too, whose types stay."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    one, two = write(tmp_path / "a" / "rows.jsonl", 0.1, 0.2), tmp_path / "rows.json"
    two.write_text(json.dumps([row(id="é"), row(id="skipped"), row(id="x")]))
    table = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([row(image={"bytes": b"\xff", "path": None}, mean_reward=9.0)]).to_parquet(table)
    samples = load(one, two, table)
    samples = samples.select([0, 1, 2, 4, 5])
    paths = write_rows(samples, tmp_path, {"pass_rate": [0.0, 1.0, 0.5, 0.25, 0.75], "mean_reward": [1.0] * 5})
    assert [path.name for path in paths] == ["rows.rated.jsonl", "rows-2.rated.jsonl", "rows.rated.parquet"]
    again = load(*paths)
    assert [each.columns["pass_rate"] for each in again] == [0.0, 1.0, 0.5, 0.25, 0.75]
    assert [each.columns.get("id") for each in again] == [0, 1, "é", "x", None]
    assert again[4].columns["mean_reward"] == 1.0 and again[4].images[0].data == b"\xff"


def test_a_part_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([row(id=i) for i in range(4)]).to_parquet(tmp_path / "rows.parquet")
    samples = load(tmp_path / "rows.parquet", mixture=Mixture(["end:2"]))
    (path,) = write_rows(samples, tmp_path, {"pass_rate": [0.25, 0.5]})
    assert [(each.columns["id"], each.columns["pass_rate"]) for each in load(path)] == [(2, 0.25), (3, 0.5)]


def test_a_pass_at_the_threshold_in_float32(tmp_path):
    """0.9 in float32 is below 0.9 in float64."""
    from vlmr1.evaluation.rate import RatedRow

    samples = load(write(tmp_path / "rows.jsonl", 0))
    reward = [[float(value)] for value in (0.8999999761581421, 0.8, 1.0)]
    record = RatedRow(0, "rows.jsonl:1", ["a", "b", "c"], ["stop", "stop", "length"], reward)
    scored, columns = rate_rows(samples, [record], [2.0], 0, 0.9)
    assert columns == {"pass_rate": [0.666667], "mean_reward": [1.8]}
    assert scored.metrics["truncated_share"].value == pytest.approx(1 / 3)


# Training on them


def settings(low: float | None, high: float | None) -> Any:
    words = [f"--{side}_pass_rate={rate}" for side, rate in (("min", low), ("max", high)) if rate is not None]
    return parse_config(["--use_cpu", "true", *words])


@pytest.mark.parametrize(
    "low, high, kept", [(0.01, 0.99, [1, 2, 4]), (0.5, None, [2, 3, 4]), (None, 0.0, [0]), (0.25, 0.5, [1, 2])]
)
def test_rows_out_of_bounds_are_left_out_counted_and_named(low, high, kept, tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", 0, 0.25, 0.5, 1, 0.875)
    samples = load(path)
    for given in (samples, list(samples)):
        caplog.clear()
        chosen, rates = within_pass_rates(given, settings(low, high))
        assert [each.columns["id"] for each in chosen] == kept and [each.index for each in chosen] == kept
        assert rates is not None and rates.rows == Counter([0.0, 0.25, 0.5, 1.0, 0.875])
        (message,) = [record.getMessage() for record in caplog.records]
        assert f"{5 - len(kept)} of 5 rows are left out" in message
        assert [f"{path}:{i + 1} (" in message for i in range(5)] == [i not in kept for i in range(5)]
    assert within_pass_rates(samples, settings(None, None)) == (samples, None)


@pytest.mark.parametrize("rate", [None, "0.5", True, 1.5, -0.1, float("nan")], ids=str)
def test_a_row_without_a_pass_rate_is_an_error(rate, tmp_path):
    path = write(tmp_path / "rows.jsonl", 0.5, rate)
    with pytest.raises(DataError, match=rf"^{path}:2: .*pass_rate"):
        within_pass_rates(load(path), settings(0.1, None))


def test_no_row_is_left(tmp_path):
    with pytest.raises(SettingError, match=r"min_pass_rate 0\.6, max_pass_rate 0\.9: none of the 2 rows"):
        within_pass_rates(load(write(tmp_path / "rows.jsonl", 0.5, 1)), settings(0.6, 0.9))


def test_a_run_on_rated_rows_and_its_report(whole, data, tmp_path):
    """The bounds apply to the rows that train, after the validation rows were taken from all."""
    rates = [own["pass_rate"] for own in lines(whole["native"] / "train.rated.jsonl")]
    low = sorted(set(rates))[1]
    more = ["--min_pass_rate", low, "--max_steps", 1, "--save_strategy", "no"]
    words = run_settings(data, whole["native"] / "train.rated.jsonl", tmp_path, *more)
    prepared = prepare(parse_config([*words, "--val_split_ratio", "0.3"]))
    assert prepared.validation is not None and prepared.pass_rates is not None
    assert len(prepared.validation) == 2 and prepared.pass_rates.rows.total() == ROWS - 2
    assert all(each.columns["pass_rate"] >= low for each in prepared.train)

    assert main(["train", *words, "--disable_tqdm", "true"]) == 0
    page = Page((tmp_path / "training.html").read_text(encoding="utf-8"))
    said = [word.strip() for word in page.words if word.strip()]
    bars = histogram(PassRates(low, None, Counter(rates)))
    cells = [str(cell) for bar in bars for cell in (bar.label, bar.rows, bar.kept)]
    start = said.index("within the bounds") + 1
    assert said[start : start + len(cells)] == cells
    assert sum(bar.rows for bar in bars) == ROWS and sum(bar.kept for bar in bars) == sum(r >= low for r in rates)


def test_the_histogram():
    rates = Counter({0.0: 3, 0.125: 4, 0.1: 2, 0.999: 1, 1.0: 6})
    bars = {bar.label: (bar.rows, bar.kept, bar.width) for bar in histogram(PassRates(0.11, 0.99, rates))}
    assert bars["0"] == (3, 0, 150) and bars["1"] == (6, 0, 300)
    assert bars["0.1 to 0.2"] == (6, 4, 300) and bars["0.9 to 1"] == (1, 0, 50)
    assert len(bars) == 12 and sum(rows for rows, _, _ in bars.values()) == 16
    assert histogram(None) == []
