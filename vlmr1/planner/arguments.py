"""The options of `vlmr1 plan` beside the settings of `vlmr1 train`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub id of a known model, or a local directory (model_name_or_path)")
    parser.add_argument("--gpu", default="80GiB", help="memory of one GPU")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the job")
    parser.add_argument(
        "--zero", type=int, default=0, help="what they shard: 1 optimizer, 2 gradients, 3 weights (FSDP)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels are counted")
    parser.add_argument("--image_tokens", type=int, default=1024, help="of a prompt's image; 0: no image")
    parser.add_argument("--text_tokens", type=int, default=128, help="of a prompt beside its image")
    parser.add_argument("--recipe", help="a recipe shipped with the package")
    parser.add_argument("--config", type=Path, help="a YAML file of settings")
    parser.add_argument("--json", type=Path, help="write the figures to this file, in bytes")
