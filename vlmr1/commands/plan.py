"""`vlmr1 plan`: will it fit?"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence

from vlmr1.commands.arguments import parse_config
from vlmr1.errors import SettingError
from vlmr1.planner.report import as_json, bytes_of, report


def plan_command(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Print the plan; `settings` are those of `vlmr1 train`."""
    from vlmr1.planner.inputs import inputs_of
    from vlmr1.planner.models import config_named
    from vlmr1.planner.plan import Planner
    from vlmr1.planner.remedies import advise, gpus_needed
    from vlmr1.tiny import model_path

    room = bytes_of(options.gpu)
    # What the planning machine can do has no part in it.
    words = [*settings, "--use_cpu", "true"]
    if options.model is not None:
        words += ["--model_name_or_path", options.model]
    config = parse_config(words, recipe=options.recipe, config=options.config)
    if not config.model_name_or_path:
        raise SettingError("--model is not set: a hub id of a known model, or a local directory")
    model = config_named(model_path(config.model_name_or_path))
    job = {name: getattr(options, name) for name in ("device", "gpus", "zero", "image_tokens", "text_tokens")}
    inputs = inputs_of(config, model, **job)
    logging.getLogger("vlmr1_kernels").setLevel(logging.ERROR)
    planner = Planner()
    plan = planner.plan(inputs)
    advice = advise(planner, inputs, room)
    needed = gpus_needed(planner, inputs, room) if plan.peak > room and options.device == "cuda" else None
    print(report(plan, advice, config.model_name_or_path, room, needed))
    if options.json is not None:
        figures = as_json(plan, advice, config.model_name_or_path, room, needed)
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")
