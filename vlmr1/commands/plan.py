"""`vlmr1 plan`: peak memory and predicted time of a training job, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmr1.commands.arguments import add_sources, parse_config
from vlmr1.errors import SettingError
from vlmr1.planner.job import Job
from vlmr1.planner.known_models import config_named
from vlmr1.planner.plan import Planner
from vlmr1.planner.remedies import advise, gpus_needed
from vlmr1.planner.report import as_json, bytes_of, card_named, report, time_as_json, time_report
from vlmr1.planner.time import count_work
from vlmr1.tiny import model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub id of a known model, or a local directory (model_name_or_path)")
    parser.add_argument("--gpu", default="80GiB", help="memory of one GPU, as 80GiB, or a GPU: a100, h100 or h200")
    parser.add_argument(
        "--time", action="store_true", help="predict milliseconds of a step, too; needs --gpu a100, ..."
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the job")
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage: 1 optimizer, 2 gradients, 3 weights (FSDP)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels are counted")
    parser.add_argument("--image_tokens", type=int, default=1024, help="tokens of a prompt's image; 0: no image")
    parser.add_argument("--text_tokens", type=int, default=128, help="tokens of a prompt beside its image")
    add_sources(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file, in bytes")


def run(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Print the plan; `settings` are those of `vlmr1 train`."""
    room = bytes_of(options.gpu)
    if options.time:
        card_named(options.gpu, options.device)
    own = ["--use_cpu", "true"]  # the planning machine need not have the job's device
    if options.model is not None:
        own += ["--model_name_or_path", options.model]

    def change(changed: Mapping[str, Any]) -> Any:
        more = own + [word for name, value in changed.items() for word in (f"--{name}", str(value))]
        return parse_config(settings, recipe=options.recipe, config=options.config, changes=more)

    args = change({})
    if not args.model_name_or_path:
        raise SettingError("--model is not set: a hub id of a known model, or a local directory")
    config = config_named(model_path(args.model_name_or_path))
    names = ("device", "gpus", "zero", "image_tokens", "text_tokens")
    job = Job(args, config, **{name: getattr(options, name) for name in names}, device_bytes=room)
    logging.getLogger("vlmr1_kernels").setLevel(logging.ERROR)
    planner = Planner()
    plan = planner.plan(job)
    advice = advise(planner, job, room, change)
    needed = gpus_needed(planner, job, room) if plan.peak > room and options.device == "cuda" else None
    print(report(plan, advice, args.model_name_or_path, room, needed))
    work = count_work(job) if options.time else None
    if work is not None:
        print(f"\n{time_report(work, options.gpu)}")
    if options.json is not None:
        figures = as_json(plan, advice, args.model_name_or_path, room, needed)
        if work is not None:
            figures["time"] = time_as_json(work, options.gpu)
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")
