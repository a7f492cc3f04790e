"""`vlmr1 plan` on the command line. Its remedies: in order of what they cost, as many as it takes, each accepted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.jobs import args_of
from tests.helpers.slow import mostly_slow
from vlmr1.cli import main
from vlmr1.errors import SettingError
from vlmr1.grpo.settings import ReferenceSettings
from vlmr1.models.optimizers import OPTIMIZERS
from vlmr1.planner.job import Job
from vlmr1.planner.known_models import config_named
from vlmr1.planner.plan import GIB, Plan, Planner
from vlmr1.planner.remedies import Advice, advise, gpus_needed, remedies
from vlmr1.planner.report import bytes_of
from vlmr1.tiny import CHECKPOINT

# A model of such a shape that weights count beside the framework's allowance; few layers, so that it is soon planned.
WIDE: dict[str, Any] = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 65536}
WIDE |= {"num_attention_heads": 48, "num_key_value_heads": 8, "layer_types": ["full_attention"] * 2}
TOWER = {"hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32, "depth": 2, "out_hidden_size": 1536}
SMALL = ["--model", "tiny", "--image_tokens", "16", "--text_tokens", "40", "--num_generations", "3"]
SMALL += ["--prompts_per_device", "2", "--max_completion_length", "16"]


def test_table_and_json_say_the_same(tmp_path: Path, capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "24GiB", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    peak = figures["peak"]
    assert peak["bytes"] == max(sum(causes.values()) for causes in figures["phases"].values())
    assert f"It fits: the peak is {peak['bytes'] / 2**30:.2f} GiB, in {peak['phase']}; there are 24.00." in said
    assert f"tiny: {figures['parameters'] / 1e9:.2f} billion parameters" in said
    assert figures["fits"] and figures["remedies"] == []
    assert figures["inputs"]["num_generations"] == 3


@pytest.mark.slow
def test_a_gpu_that_is_too_small(capsys: Any):
    assert main(["plan", *SMALL, "--gpu", "100MiB"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit: the peak is" in said
    assert "Nothing fits: it misses by" in said  # the allowance alone is larger


# What is printed is accepted


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"] |= WIDE
    config["vision_config"] |= TOWER
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Counts what several commands have in common once."""
    return Planner()


@pytest.fixture
def planned(wide: Path, planner: Planner, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Any:
    """Runs `vlmr1 plan` on the wide model: what it prints, and its figures."""
    monkeypatch.setattr("vlmr1.commands.plan.Planner", lambda: planner)
    small = ["--image_tokens", "64", "--text_tokens", "1500", "--num_generations", "2", "--prompts_per_device", "2"]
    small += ["--max_completion_length", "600"]

    def plan(*words: str, gpu: str = "1000GiB") -> tuple[str, dict[str, Any]]:
        path = tmp_path / "plan.json"
        given = [*small, *words]
        last = dict(zip(given[::2], given[1::2], strict=True))  # a remedy may change what one before it has set
        settings = [word for pair in last.items() for word in pair]
        status = main(["plan", "--model", str(wide), *settings, "--gpu", gpu, "--json", str(path)])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out, json.loads(path.read_text())

    return plan


# Settings to begin with, and the share of their peak that the GPU has.
STARTS: dict[str, tuple[list[str], float]] = {
    "three quarters": ([], 0.75),
    "half": ([], 0.5),
    "defaults": ([], 0),
    "KL in the reward": (["--kl_in_reward", "true"], 0),
    "paged": (["--optim", "paged_adamw_32bit", "--activation_checkpointing", "true"], 0),
    "stochastic": (["--model_dtype", "bfloat16", "--stochastic_rounding", "true", "--optim", "adamw_torch_8bit"], 0),
    "LoRA": (["--use_peft", "true", "--lora_merge_rollout", "true"], 0),
    "a trained projector": (["--freeze_vision", "true", "--freeze_merger", "false"], 0),
}


@pytest.mark.parametrize(("start", "share"), mostly_slow(STARTS, "half", "LoRA"))
@pytest.mark.slow
def test_every_remedy_that_is_printed_is_accepted_and_lowers_the_peak(start, share, planned):
    """Each with those before it, and all of them have the peak that was promised."""
    gpu = max(1, round(planned(*start)[1]["peak"]["bytes"] * share / 2**20))
    said, figures = planned(*start, gpu=f"{gpu}MiB")
    printed = [line.split("  saves ")[0].split() for line in said.splitlines() if line.startswith("  --")]
    assert len(printed) == len(figures["remedies"]) > 0
    peak, words = figures["peak"]["bytes"], list(start)
    for flags, remedy in zip(printed, figures["remedies"], strict=True):
        words += flags
        # What is kept depends on the GPU: on one of 1 MiB it is nothing. A large one asks for no advice, which is slow.
        after = planned(*words, gpu=f"{gpu}MiB") if share else planned(*words, "--rollout_keep_cache", "false")
        after = after[1]["peak"]["bytes"]
        assert peak - after == remedy["saves"]
        peak = after
    assert peak == figures["with_remedies"]["peak"] < figures["peak"]["bytes"]


@pytest.mark.slow
def test_every_remedy_is_accepted_alone(wide, planned):
    """On the job of the other tests, which reads the settings through the same command."""
    config = config_named(str(wide))
    args = args_of(num_generations=2, prompts_per_device=2, max_completion_length=600, tokens_per_pack=16384)
    for remedy in remedies(Job(args, config, image_tokens=64, text_tokens=1500)):
        planned(*str(remedy).split())


@pytest.mark.parametrize("name", mostly_slow([*OPTIMIZERS], "sgd", "adamw_torch", "paged_adamw_8bit"))
def test_every_optimizer_of_train_is_planned(name, planned):
    said, figures = planned("--optim", name)
    assert "It fits" in said
    states = figures["phases"]["update"]["optimizer"]
    assert (states > 0) == (name != "sgd")


# Remedies


DEFAULTS = {"num_generations": 4, "max_completion_length": 1, "tokens_per_pack": 16384, "prompts_per_device": 8}
ARGS = args_of(**DEFAULTS)


class Unchecked(SimpleNamespace):
    """Settings that nothing checks."""

    reference_kind = ReferenceSettings.reference_kind


def changed(settings: Mapping[str, Any]) -> Any:
    return Unchecked(**{**vars(ARGS), **settings})


def job_with(**settings: Any) -> Job:
    return Job(changed(settings), None)


JOB = job_with()


class Sums:
    """A planner whose peak is a sum of what each setting still costs, in GiB."""

    def __init__(self, **costs: Any):
        self.costs = costs

    def plan(self, job: Job) -> Plan:
        peak = 10.0
        for name, (value, cost) in self.costs.items():
            found = job.reference if name == "reference" else getattr(job.args, name)
            peak += cost if found == value else 0
        peak = 10 + (peak - 10) / (job.gpus if job.zero == 3 else 1)
        causes = {"weights": round(peak * GIB), "framework": 0}
        return Plan(job, {"policy": causes}, {}, 1, 1)


def advice_for(planner: Any, room: int, change: Any = changed) -> Advice:
    return advise(planner, JOB, room * GIB, change)


COSTS = {
    "tokens_per_pack": (16384, 4),
    "activation_checkpointing": (False, 30),
    "freeze_vision": (False, 8),
    "reference": ("copy", 14),
    "use_peft": (False, 40),
}
ROOMS = {
    "all of it": (106, [], 0),
    "packs": (102, ["tokens_per_pack"], 0),
    "reference to the host, packs not needed": (94, ["reference"], 0),
    "those, and packs": (88, ["tokens_per_pack", "reference"], 0),
    "checkpointing alone": (76, ["activation_checkpointing"], 0),
    "checkpointing and the reference": (63, ["reference", "activation_checkpointing"], 0),
    "frozen": (50, ["tokens_per_pack", "reference", "activation_checkpointing", "freeze_vision"], 0),
    "nothing": (9, ["tokens_per_pack", "reference", "activation_checkpointing", "freeze_vision", "use_peft"], 1),
}


@pytest.mark.parametrize(("room", "expected", "missing"), ROOMS.values(), ids=ROOMS.keys())
def test_the_cheapest_that_suffice(room, expected, missing):
    advice = advice_for(Sums(**COSTS), room)
    assert [next(iter(each.remedy.settings)) for each in advice.applied] == expected
    assert advice.missing == missing * GIB
    assert advice.plan.peak == 106 * GIB - sum(each.saved for each in advice.applied)


def test_each_says_what_it_saves_after_those_before_it():
    assert [each.saved // GIB for each in advice_for(Sums(**COSTS), 63).applied] == [14, 30]


def test_what_the_settings_refuse_is_not_offered():
    def change(settings: Mapping[str, Any]) -> Any:
        if "reference" in settings or "use_peft" in settings:
            raise SettingError("not here")
        return changed(settings)

    advice = advice_for(Sums(**COSTS), 9, change)
    kept = [next(iter(each.remedy.settings)) for each in advice.applied]
    assert kept == ["tokens_per_pack", "activation_checkpointing", "freeze_vision", "beta"]


def names_of(job: Job) -> list[str]:
    return [" ".join(remedy.settings) for remedy in remedies(job)]


def test_the_order_is_of_what_the_user_loses():
    assert names_of(JOB) == [
        "rollout_keep_cache",
        "tokens_per_pack",
        "rollout_kv_mib",
        "optim",
        "optim",
        "reference",
        "activation_checkpointing",
        "activation_checkpointing activation_offload",
        "model_dtype stochastic_rounding optim reference",
        "freeze_vision",
        "beta",
        "use_peft",
        "use_peft model_dtype",
        "use_peft model_dtype load_in_4bit",
        "prompts_per_device",
    ]


def test_what_is_done_already_is_not_offered():
    done: dict[str, Any] = {"activation_checkpointing": True, "activation_offload": True, "use_peft": True, "beta": 0}
    done |= {"load_in_4bit": True, "model_dtype": "bfloat16", "optim": "paged_adamw_8bit", "rollout_keep_cache": False}
    assert names_of(job_with(**done, tokens_per_pack=1280, rollout_kv_mib=100.0)) == ["prompts_per_device"]


def test_a_cpu_is_offered_nothing_that_needs_a_gpu():
    names = " ".join(names_of(replace(JOB, device="cpu")))
    assert not {"optim", "reference", "activation_offload", "stochastic_rounding"} & set(names.split())


def test_optimizers_other_than_adamw_are_kept():
    assert not any("optim" in name for name in names_of(job_with(optim="lion_32bit")))
    assert "model_dtype stochastic_rounding optim reference" in names_of(job_with(optim="paged_adamw_32bit"))


def test_adapters_take_back_what_they_exclude():
    """Stochastic rounding, and a reference other than the policy without its adapter."""
    narrow = job_with(model_dtype="bfloat16", stochastic_rounding=True, optim="adamw_torch_8bit", reference="offload")
    lora = next(remedy for remedy in remedies(narrow) if "use_peft" in remedy.settings)
    assert lora.settings == {"use_peft": True, "stochastic_rounding": False, "reference": "auto"}
    no_reference = next(remedy for remedy in remedies(narrow) if "beta" in remedy.settings)
    assert no_reference.settings == {"beta": 0, "reference": "auto"}


@pytest.mark.parametrize(("room", "expected"), [(60, 2), (42, 3), (30, 5), (11, 96), (10, None)])
def test_gpus_with_zero_3(room, expected):
    """10 GiB that are not shared, and 96 that are."""
    assert gpus_needed(Sums(**COSTS), JOB, room * GIB) == expected  # type: ignore[arg-type]


SIZES = {"80GiB": 80 * 2**30, "24 GB": 24 * 10**9, "512mib": 512 * 2**20, "1.5TiB": 1.5 * 2**40}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["80", "0GiB", "many GiB", "-1GiB"])
def test_what_is_no_size(text):
    with pytest.raises(SettingError, match=r"gpu is .*80GiB"):
        bytes_of(text)
