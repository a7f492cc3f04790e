"""Which rows of several files are taken."""

import pytest
import yaml

from tests.helpers.rows import SIZES, numbered_files
from vlmr1.data.mixture import Mixture, Sampling
from vlmr1.data.samples import load_samples
from vlmr1.data.sources import split_names
from vlmr1.errors import SettingError


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [path.name for path in numbered_files(tmp_path)]


def taken(files, sampling=(), weights=(), seed=42):
    """The solutions of the rows that are taken, by file."""
    mixture = Mixture(sampling, weights, seed)
    samples = load_samples(files, [], question="{question}", check_images=False, mixture=mixture)
    assert [sample.index for sample in samples] == list(range(len(samples)))
    found = {name: [s.solution for s in samples if s.solution[0] == name] for name in SIZES}
    for sample in samples:  # the line is that of the file
        assert sample.source == f"{sample.solution[0]}.jsonl:{int(sample.solution[1:]) + 1}"
    return found


def counts(*arguments, **options):
    return {name: len(rows) for name, rows in taken(*arguments, **options).items()}


STRATEGIES = {  # of b, with 40 rows
    "all": range(40),
    "first:3": range(3),
    "end:3": range(37, 40),
    "first:10%": range(4),
    "end:1%": range(39, 40),  # 0.4 rows, rounded up
    "first:99.9%": range(40),
    "end:1000": range(40),  # as many as there are
}


@pytest.mark.parametrize(("strategy", "expected"), STRATEGIES.items())
@pytest.mark.slow
def test_strategies(strategy, expected, files):
    assert taken(files[1:2], [strategy])["b"] == [f"b{i}" for i in expected]


@pytest.mark.parametrize("strategy", ["random:8", "random:20%"])
def test_drawn_rows_are_of_the_seed(strategy, files):
    one = taken(files, ["all", strategy, "all"])["b"]
    assert one == taken(files, ["all", strategy, "all"])["b"] == sorted(one, key=lambda name: int(name[1:]))
    assert len(set(one)) == 8 and one != [f"b{i}" for i in range(8)]
    assert taken(files, ["all", strategy, "all"], seed=1)["b"] != one


def test_one_strategy_for_all_files(files):
    assert counts(files, ["first:50%"]) == {"a": 5, "b": 20, "c": 4}


WEIGHTS = {  # strategies, weights, rows of each file
    "equal": ([], [1, 1, 1], (7, 7, 7)),
    "shares": ([], [0.5, 0.4, 0.1], (10, 8, 2)),
    "of what is taken": (["first:2", "all", "all"], [1, 4, 2], (2, 8, 4)),
    "by size": ([], [10, 40, 7], (10, 40, 7)),
    "at least one": ([], [1000, 1, 1], (10, 1, 1)),
}


@pytest.mark.parametrize(("sampling", "weights", "expected"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights(sampling, weights, expected, files):
    assert tuple(counts(files, sampling, weights).values()) == expected


def listing(*entries, **more):
    with open("list.yaml", "w") as file:
        yaml.safe_dump({"datasets": list(entries)} | more, file)
    return ["list.yaml"]


def entry(name, strategy=None, **more):
    return {"json_path": f"{name}.jsonl"} | ({"sampling_strategy": strategy} if strategy else {}) | more


def test_a_list_in_the_format_of_vlm_r1(files):
    names = listing(entry("a", "first:3"), entry("b", "random:25%"), entry("c"))
    assert counts(names) == {"a": 3, "b": 10, "c": 7}
    assert split_names(names) == files  # one accuracy method for each
    assert counts(listing(entry("a", weight=1), entry("b", weight=2))) == {"a": 10, "b": 20, "c": 0}
    assert counts([*listing(entry("a", "end:2")), "c.jsonl"]) == {"a": 2, "b": 0, "c": 7}


def test_a_list_with_image_folders(files, tmp_path):
    (tmp_path / "pictures").mkdir()
    names = listing(entry("a", image_folder="pictures"), entry("b"))
    samples = load_samples(names, [], question="{question}", check_images=False)
    assert [folder.folder and folder.folder.name for _, folder in samples.sources] == ["pictures", None]
    with pytest.raises(SettingError, match="image_folders: nowhere is not a directory"):
        load_samples(listing(entry("a", image_folder="nowhere")), [], question="{question}", check_images=False)


def refused(names, *arguments):
    with pytest.raises(SettingError) as caught:
        Mixture(*arguments).files(names)
    return str(caught.value)


@pytest.mark.parametrize("text", ["first", "first:0", "last:3", "random:101%", "first:2.5", "end:-1", "First:3", ""])
def test_strategies_that_are_refused(text, files):
    assert refused(files, [text]).startswith(f"sampling_strategy is {text!r}: it must be all, first:N")


def test_what_does_not_fit_is_refused(files):
    assert refused(files, ["all", "all"]) == "sampling_strategy has 2 values for 3 data files: give one for each"
    assert refused(files, [], [1.0]) == "data_weights has 1 values for 3 data files: give one for each"
    assert "the weight of b.jsonl is 0" in refused(files, [], [1, 0, 1])
    assert refused(listing(entry("a", "all")), ["all"]).startswith("sampling_strategy is given, and a list of data_")
    assert "b.jsonl has no weight" in refused(listing(entry("a", weight=1), entry("b")))


def test_every_fault_of_a_list_is_named(files):
    bad = [{"path": "a.jsonl"}, entry("a") | {"strategy": 1}, entry("b", weight="2"), "c.jsonl"]
    assert refused(listing(*bad, seed=1)).splitlines() == [
        "data_file_paths: list.yaml: entry 1 has no json_path",
        "data_file_paths: list.yaml: entry 2 has an unknown key 'strategy'; known: "
        "json_path, sampling_strategy, weight, image_folder",
        "data_file_paths: list.yaml: entry 3: weight is '2', not a number",
        "data_file_paths: list.yaml: entry 4 has no json_path",
        "data_file_paths: list.yaml: it has seed beside datasets",
    ]
    with open("list.yaml", "w") as file:
        file.write("[1]")
    assert "has no list `datasets`" in refused(["list.yaml"])
    assert "none.yaml cannot be read" in refused(["none.yaml"])


def test_a_share_is_exact():
    assert [Sampling.of("first:7%").count(rows) for rows in (100, 200, 1)] == [7, 14, 1]
    assert str(Sampling.of("random:12.5%")) == "random:12.5%"
