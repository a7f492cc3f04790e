"""settings.json: the settings that a run was started with, which a resumed run must have too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import replace_text
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.lifecycle.renamed import current

SETTINGS = "settings.json"
# Settings that a resumed run may change: they have no effect on what is computed.
RESUMABLE_CHANGES = {
    *("output_dir", "resume_from_checkpoint", "save_steps", "save_strategy", "save_total_limit", "run_name"),
    *("logging_steps", "log_completions", "memory_by_phase", "write_report", "log_level", "report_to", "disable_tqdm"),
    *("rollout_logp_warn_threshold", "check_images", "ddp_timeout", "local_rank"),
    *("lora_merge_final", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"),
    *(f"dataloader_{name}" for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")),
    *(f"eval_{name}" for name in ("steps", "on_start", "limit", "data_file_paths", "image_folders")),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
}
# How a run is spread over processes, and which command trains, where its settings do not say.
LAUNCH = {"processes": 1, "launch": "ddp", "command": "train"}


def keep_settings(config: Any, launch: Mapping[str, Any], output_dir: Path) -> None:
    """Write the settings beside the checkpoints."""
    with guard_writes(SETTINGS, output_dir):
        replace_text(output_dir / SETTINGS, json.dumps(_settings_of(config, launch), indent=1))


def check_settings(config: Any, launch: Mapping[str, Any], resume: Path | None) -> None:
    """SettingError where the run that wrote a checkpoint had other settings, or was spread over processes in another
    way. A setting that it did not know yet had its default."""
    written = resume.parent / SETTINGS if resume is not None else None
    if written is None or not written.exists():
        return
    now = _settings_of(config, launch)
    before = {each.name: _default(each) for each in fields(config)} | LAUNCH | settings_of_run(written)
    changed = [name for name in now if name not in RESUMABLE_CHANGES and before[name] != now[name]]
    if changed:
        lines = (
            f"{name} is {now[name]!r}, but the run in {written.parent} was started with {before[name]!r}: "
            "give another output_dir, or the same settings"
            for name in changed
        )
        raise SettingError("\n".join(lines))


def _settings_of(config: Any, launch: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, and how the run is spread over processes."""
    now = json.loads(config.to_json_string())
    return {each.name: now.get(each.name) for each in fields(config)} | dict(launch)


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def settings_of_run(path: Path) -> dict[str, Any]:
    """Return the settings that a run has written, with today's names; {} where it has written none."""
    if not path.exists():
        return {}
    try:
        return current(json.loads(path.read_text(encoding="utf-8")), note=False)
    except ValueError as error:
        raise SettingError(f"{path} cannot be read ({error}): without it, settings are not compared") from error
