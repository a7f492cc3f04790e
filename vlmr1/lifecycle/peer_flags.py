"""Settings of TRL and VLM-R1 that have another form here: read as ours where they have one meaning, else refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmr1.lifecycle.renamed import note_spelling as note

# Settings that GRPOConfig does not have, by type.
PEER_FLAGS: dict[str, type] = {
    "dataset_name": str,
    "ds3_gather_for_generation": bool,
    "is_reward_customized_from_vlm_module": bool,
    "lora_task_type": str,
    "task_type": str,
    "use_vllm": bool,
}
# Of a later source of settings, these replace those of an earlier one.
REPLACES = {
    "per_device_train_batch_size": ("prompts_per_device",),
    "gradient_accumulation_steps": ("prompts_per_device",),
    "prompts_per_device": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "task_type": ("question_template",),
    "question_template": ("task_type",),
}
TASKS = {"gui_defect": "default"} | {name: name for name in ("rec", "ic", "odLength", "gui", "default")}
MODULES = ("internvl", "glm", "qwen")  # of VLM-R1, which it chooses by the model's name
LISTS = ("reward_funcs", "accu_reward_method", "lora_target_modules", "lora_modules_to_save", "report_to")
# What to use in place of settings that have no counterpart, by their beginning.
INSTEAD = {
    "arrow_cache_dir": "data files are read in place",
    "bnb_4bit": "load_in_4bit uses nf4",
    "cache_implementation": "rollout_kv_mib limits the cache of rollouts",
    "dataset_": "data_file_paths takes OWNER/NAME@SPLIT",
    "generation_batch_size": "use prompts_per_device and steps_per_generation",
    "generation_kwargs": "use temperature, top_k, top_p, min_p, repetition_penalty and stop_strings",
    "load_in_8bit": "use load_in_4bit",
    "model_init_kwargs": "use model_dtype, attn_implementation and model_revision",
    "num_completions_to_print": "use log_completions",
    "use_bnb_nested_quant": "load_in_4bit uses nf4",
    "vllm_": "rollout_engine=native generates without vLLM",
}


def from_peers(given: Mapping[str, Any], sequences_of_prompt: int = 8) -> tuple[dict[str, Any], list[str]]:
    """Return settings of this project for given ones, and the faults of those that cannot be read as such.
    `sequences_of_prompt`: the default of num_generations; 1 where rows are trained on."""
    settings = dict(given)
    faults = list(_batch(settings, sequences_of_prompt))
    faults += [fault for rule in (_switches, _data, _rewards, _lists) for fault in rule(settings)]
    return settings, faults


def instead_of(name: str) -> str | None:
    """Return what to use in place of a setting of another trainer that has no counterpart."""
    return next((text for start, text in INSTEAD.items() if name.startswith(start)), None)


def _batch(settings: dict[str, Any], sequences_of_prompt: int) -> Iterator[str]:
    """Sequences of a device and update -> its prompts."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = {name: settings.pop(name) for name in names if name in settings}
    if not given or given == {names[1]: 1}:
        return
    words = " x ".join(f"{name} {value}" for name, value in given.items())
    if "prompts_per_device" in settings:
        yield f"{words} and prompts_per_device are both given: give prompts_per_device alone"
        return
    sequences = given.get(names[0], 8) * given.get(names[1], 1)  # 8 and 1 are the defaults of transformers
    group = settings.get("num_generations", sequences_of_prompt)
    if min(given.values()) < 1:
        yield f"{words}: both must be at least 1"
    elif group > 1 and sequences % group:
        yield (
            f"{words} = {sequences} completions of a device in an update, which is no multiple of num_generations, "
            f"{group}. A device works on whole prompts: give prompts_per_device"
        )
    elif group > 1:
        settings["prompts_per_device"] = sequences // group
        note(words, f"prompts_per_device {sequences // group}, with num_generations {group}")
    elif sequences_of_prompt == 1:
        settings["prompts_per_device"] = sequences
        note(words, f"prompts_per_device {sequences}")


def _switches(settings: dict[str, Any]) -> Iterator[str]:
    """Settings of which one value is what happens here in any case."""
    if settings.pop("use_vllm", False):
        yield f"use_vllm is true: {INSTEAD['vllm_']}"
    if not settings.pop("ds3_gather_for_generation", True):
        yield "ds3_gather_for_generation is false: weights are always gathered for a rollout"
    task = settings.pop("lora_task_type", "CAUSAL_LM")
    if task != "CAUSAL_LM":
        yield f"lora_task_type is {task!r}: only CAUSAL_LM is trained"
    if settings.get("eval_strategy") == "steps" and settings.get("eval_steps"):
        del settings["eval_strategy"]
    resume = settings.get("resume_from_checkpoint")
    if str(resume).lower() in ("true", "none"):
        settings["resume_from_checkpoint"] = None  # the last checkpoint of output_dir, if there is one
    elif str(resume).lower() == "false":
        settings["resume_from_checkpoint"] = False


def _data(settings: dict[str, Any]) -> Iterator[str]:
    """TRL's name of a data set, which VLM-R1's trainer asks for and does not read."""
    for name in ("data_file_paths", "image_folders"):
        if name in settings:
            settings[name] = [each for each in settings[name] if each]
    name = settings.pop("dataset_name", None)
    if name is not None and settings.get("data_file_paths"):
        note(f"dataset_name {name}", "not used: data_file_paths names the data")
    elif name is not None:
        settings["data_file_paths"] = [name]
        note(f"dataset_name {name}", f"data_file_paths {name}")
    yield from ()


def _rewards(settings: dict[str, Any]) -> Iterator[str]:
    """VLM-R1's task and its choice between general rewards and those of a family's module."""
    task, customized = settings.pop("task_type", None), settings.pop("is_reward_customized_from_vlm_module", None)
    if task is None and customized is None:
        return
    if task is not None and "question_template" in settings:
        yield f"task_type {task} and question_template are both given: give question_template alone"
    elif task is not None and task not in TASKS:
        yield f"task_type is {task!r}: known are {', '.join(sorted(TASKS))}; for others give question_template=default"
    elif task is not None:
        settings["question_template"] = TASKS[task]
        note(f"task_type {task}", f"question_template {TASKS[task]}")
    if not customized:
        if "accu_reward_method" not in settings:
            settings["accu_reward_method"] = ["default"]
            note("rewards of VLM-R1 without accu_reward_method", "accu_reward_method default")
        return
    yield from _module_rewards(settings, task)


def _module_rewards(settings: dict[str, Any], task: str | None) -> Iterator[str]:
    given = list(settings.get("reward_funcs", ["accuracy", "format"]))
    model = str(settings.get("model_name_or_path")).lower()
    module = next((name for name in MODULES if name in model), "qwen")
    rewards = {"accuracy": f"iou_{module}", "format": f"format_rec_{module}"}
    if task != "rec":
        yield f"is_reward_customized_from_vlm_module needs task_type rec, it is {task}: name rewards in reward_funcs"
    elif set(given) - set(rewards):
        yield f"is_reward_customized_from_vlm_module has no reward {', '.join(sorted(set(given) - set(rewards)))}"
    else:
        settings["reward_funcs"] = [rewards[name] for name in given]
        note(f"reward_funcs {' '.join(given)} of a VLM module", f"reward_funcs {' '.join(settings['reward_funcs'])}")


def _lists(settings: dict[str, Any]) -> Iterator[str]:
    """Lists that are separated by commas."""
    for name in LISTS:
        value = settings.get(name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "," in each:
                yield f"{name}: {each!r} has a comma, but the list takes spaces: --{name} {' '.join(each.split(','))}"
