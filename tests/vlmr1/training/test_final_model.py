"""The model directory that a finished run leaves in its output directory, and its upload."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.helpers import tiny_runs
from tests.helpers.digit_runs import command
from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from vlmr1.cli import main
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.training import hub
from vlmr1.training.final_model import FINAL

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8", "--learning_rate", "3e-3"]
KINDS = {
    "full": [],
    "lora": LORA,
    "merged": [*LORA, "--lora_merge_final", "true"],
    "unsaved": ["--save_strategy", "no"],
    "unsaved lora": [*LORA, "--save_strategy", "no"],
}
LAST = "checkpoint-2"


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output directory of a run of each kind, made when it is looked up."""

    class Runs(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            assert main(run(data, self[kind], *KINDS[kind])) == 0
            return self[kind]

    return Runs()


def run(data: Path, output: Path, *settings: str) -> list[str]:
    return command(data, output, "--max_steps", "2", *settings)


def files(output: Path) -> set[str]:
    return set(json.loads((output / FINAL).read_text())["files"])


def logprobs(model: Any, processor: Any, image_files: Any) -> torch.Tensor:
    make = Maker(model, processor, image_files)
    pack = make_pack([make.group(make.prompt("Locate the digit 7.", (112,)), (9, 14))])
    return PackedPolicy(model, family_of(model), temperature=1.0).logprobs(pack)


@pytest.mark.parametrize("kind", mostly_slow([*KINDS], "full"))
def test_transformers_reads_it_and_it_is_the_trained_model(kind, runs, image_files):
    """By class and directory alone; of an adapter with its base."""
    output = runs[kind]
    model, loading = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    trained = load_model(runs["lora" if "lora" in kind or kind == "merged" else "full"] / LAST)
    processor = load_processor(output)
    expected = logprobs(trained, processor, image_files)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "merged" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logprobs(model, processor, image_files), expected, **tolerance)
    assert (output / "adapter_config.json").exists() == ("lora" in kind)


@pytest.mark.slow
def test_it_has_the_files_that_the_trainer_saves(runs):
    """`save_model` made those of the runs without checkpoints; all are there, and nothing of the trainer's state."""
    for saved, unsaved in (("full", "unsaved"), ("lora", "unsaved lora")):
        assert files(runs[saved]) == files(runs[unsaved])
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < files(runs["full"])
    assert files(runs["merged"]) == files(runs["full"])
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"} < files(runs["lora"])
    for output in map(runs.__getitem__, KINDS):
        found = {path.name for path in output.iterdir() if path.is_file()}
        assert found - files(output) == {FINAL, "settings.json", "metrics.jsonl", "completions.jsonl"}


@pytest.mark.slow
def test_weights_are_links_and_other_files_copies(runs, data, tmp_path, monkeypatch):
    output = runs["full"]
    assert (output / "model.safetensors").samefile(output / LAST / "model.safetensors")
    assert not (output / "config.json").samefile(output / LAST / "config.json")
    shutil.copytree(output / LAST, tmp_path / LAST)

    def no_links(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    assert main(run(data, tmp_path)) == 0
    assert not (tmp_path / "model.safetensors").samefile(tmp_path / LAST / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert files(tmp_path) == files(output)


@pytest.mark.slow
def test_a_finished_folder_is_left_alone_or_completed(runs, data, tmp_path, capsys):
    """Run the command again; a file that is missing; another form of the model, which takes the place of the first."""
    shutil.copytree(runs["lora"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").write_text("mine")
    before = {path: path.stat() for path in tmp_path.rglob("*") if path.name != "settings.json"}
    assert main(run(data, tmp_path, *KINDS["lora"])) == 0
    assert "all 2 updates are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == {p: s.st_mtime_ns for p, s in before.items()}
    (tmp_path / "adapter_model.safetensors").unlink()
    assert main(run(data, tmp_path, *KINDS["lora"])) == 0
    assert (tmp_path / "adapter_model.safetensors").samefile(tmp_path / LAST / "adapter_model.safetensors")
    assert main(run(data, tmp_path, *KINDS["merged"])) == 0
    assert files(tmp_path) == files(runs["merged"]) and not (tmp_path / "adapter_config.json").exists()
    merged = load_file(runs["merged"] / "model.safetensors")
    assert all(torch.equal(merged[name], each) for name, each in load_file(tmp_path / "model.safetensors").items())
    assert (tmp_path / "README.md").read_text() == "mine" and not list(tmp_path.glob(".staging*"))


@pytest.mark.slow
def test_a_new_run_in_the_folder_replaces_it(runs, data, tmp_path):
    """Models of one step, after the checkpoints were removed by hand."""
    shutil.copytree(runs["full"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / LAST)
    assert main(run(data, tmp_path, "--learning_rate", "3e-3")) == 0
    assert (tmp_path / "model.safetensors").samefile(tmp_path / LAST / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() != (runs["full"] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_was_stopped_leaves_none_and_goes_on(tmp_path):
    data = tiny_runs.write_data(tmp_path)
    tiny_runs.during(data, 3, "os.kill(os.getpid(), signal.SIGTERM)")
    words = tiny_runs.command(data, tmp_path / "run")
    assert main(words) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / FINAL).exists() and not (tmp_path / "run" / "config.json").exists()
    assert main(words) == 0
    last = tmp_path / "run" / f"checkpoint-{tiny_runs.STEPS}"
    assert (tmp_path / "run" / "model.safetensors").samefile(last / "model.safetensors")


# The Hub


class StubApi:
    """Keeps what would be uploaded; `fails` is raised instead."""

    uploads: list[dict[str, Any]] = []  # noqa: RUF012 - of the class, which the code constructs
    fails: Exception | None = None

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        repository = type("Url", (str,), {"repo_id": name if "/" in name else f"me/{name}"})
        return repository(f"hub:{repository.repo_id} private={private}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> None:
        if StubApi.fails is not None:
            raise StubApi.fails
        found = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        names = set(filter_repo_objects(found, allow_patterns=allow_patterns))
        StubApi.uploads.append(options | {"files": names})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[StubApi]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub, "HfApi", StubApi)
    StubApi.uploads, StubApi.fails = [], None
    return StubApi


PUSH = ["--push_to_hub", "true"]


def test_the_model_files_are_pushed_when_the_run_has_finished(api, data, tmp_path, capsys):
    output = tmp_path / "rec"
    assert main(run(data, output, *PUSH, "--hub_private_repo", "true", "--save_steps", "1")) == 0
    (pushed,) = api.uploads
    assert pushed == {
        "files": files(output),
        "repo_id": "me/rec",
        "revision": None,
        "commit_message": "End of training",
    }
    assert "hub:me/rec private=True" in capsys.readouterr().out
    assert "hf_secret" not in (output / "settings.json").read_text()


@pytest.mark.slow
def test_a_failed_push_is_made_again_by_the_same_command(api, data, tmp_path, capsys):
    api.fails = ConnectionError("no route to the hub\nmore")
    words = run(data, tmp_path / "rec", *PUSH, "--hub_model_id", "us/name", "--hub_revision", "v1")
    assert main(words) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "push_to_hub" in message and "us/name" in message and "no route to the hub" in message
    assert files(tmp_path / "rec")
    api.fails = None
    assert main(words) == 0
    assert "all 2 updates are done" in capsys.readouterr().out
    assert [(each["repo_id"], each["revision"]) for each in api.uploads] == [("us/name", "v1")]
