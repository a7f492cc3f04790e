"""A TRL script of every feature, unchanged but for its import: `TRAINER=trl pytest` runs it with TRL."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from tests.vlmr1.api.suite import MAIN, OURS, folder_of, rows_of, table

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("every_feature.py")
IMPORT = "from trl import GRPOConfig, GRPOTrainer\n"
PEFT = "--use_peft --lora_r 4 --lora_alpha 8 --lora_target_modules q_proj v_proj"
SIZE = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 2 --max_completion_length 6"
RUN = "--max_steps 4 --save_steps 2 --save_total_limit 2 --eval_strategy steps --eval_steps 2 --logging_steps 1"
RUN += " --lr_scheduler_type constant --per_device_eval_batch_size 4 --use_cpu true --bf16 false --report_to none"
GRPO = "--beta 0.05 --num_iterations 2 --scale_rewards batch --mask_truncated_completions true --epsilon_high 0.28"
GRPO += " --reward_weights 1.0 0.5 0.2 0.1 --log_completions --num_completions_to_print 1 --temperature 0.9 --top_k 50"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of the script: its names, what it has pushed, and its directory."""
    pytest.importorskip("trl")
    folder, pushed = tmp_path_factory.mktemp("features"), []
    rows_of(count=8, solution=str).to_parquet(folder / "rows.parquet")
    text = SCRIPT.read_text()
    assert text.count(IMPORT) == 1
    script = folder / "script.py"
    script.write_text(text.replace(IMPORT, IMPORT.replace("trl", "vlmr1")) if OURS else text)
    words = f"--output_dir {folder / 'run'} --model_name_or_path {folder_of(MAIN)} --reward_model {folder_of('judge')} "
    words += f"--dataset_name {folder / 'rows.parquet'} --push_to_hub --hub_model_id me/mine --hub_strategy end "
    words += " ".join((PEFT, SIZE, RUN, GRPO))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_none")
        patch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
        patch.setattr(HfApi, "upload_folder", lambda self, **given: pushed.append(given))
        patch.setattr(sys, "argv", ["script.py", *words.split(), "--chat_template_kwargs", json.dumps({"short": True})])
        names = runpy.run_path(str(script), run_name="__main__")
    return SimpleNamespace(**{"names": names, "pushed": pushed, "output": folder / "run"})


def test_the_script_runs_to_its_end_with_a_resume_between(done: Any) -> None:
    state = done.names["trainer"].state
    assert state.global_step == 6 and done.names["Steps"].seen == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in done.output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    updates = [line for line in done.names["history"] if "loss" in line]
    assert [line["step"] for line in updates] == [1, 2, 3, 4, 5, 6]


def test_every_reward_counts_by_its_weight(done: Any) -> None:
    updates = [line for line in done.names["history"] if "loss" in line]
    rewards = ("accuracy", "length", "judge")
    assert all(f"rewards/{name}/{kind}" in updates[0] for name in rewards for kind in ("mean", "std"))
    assert all(math.isfinite(updates[0][name]) for name in ("reward", "reward_std", "kl", "grad_norm", "longest"))
    assert updates[0]["completions/mean_length"] < 6 and all(line["grad_norm"] > 0 for line in updates)
    rows = table(done.output)
    assert {row["step_seen"] for row in rows} >= {0, 2, 4}
    assert {"completion", "advantage"} <= rows[0].keys()


def test_evaluations_have_the_names_of_training(done: Any) -> None:
    names = {"eval_loss", "eval_reward", "eval_rewards/length/mean", "eval_completions/mean_length", "eval_kl"}
    assert names <= done.names["evaluated"].keys()
    assert [line["step"] for line in done.names["history"] if "eval_reward" in line] == [2, 4, 6, 6]


def test_adapter_card_and_upload(done: Any) -> None:
    assert (done.output / "adapter_model.safetensors").exists() and not (done.output / "model.safetensors").exists()
    card = ModelCard.load(done.output / "README.md")
    assert "grpo" in card.data.tags
    assert done.pushed[-1]["repo_id"] == "me/mine" and Path(done.pushed[-1]["folder_path"]) == done.output
