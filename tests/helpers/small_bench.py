"""A very small shape, and step results made by hand."""

from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

from benchmarks import model as bench_model
from benchmarks.harness import LAYOUT

TEXT = bench_model.TINY_TEXT | {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 96}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = bench_model.tiny.VISION | {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 96}
SMALL = replace(
    bench_model.SHAPES["tiny"],
    text=TEXT | {"rope_parameters": ROPE},
    vision=VISION,
    image_px=56,
    num_generations=3,
    completion_length=5,
)
SIZES = {"prompts": 2, "num_generations": 3, "image_tokens": 4, "completion_tokens": 5, "prompt_tokens": 20}


def row(seconds: list[float], base: str = "naive", **more: Any) -> dict[str, Any]:
    about = {"label": "an arm", "base": base, "group": "arm", "settings": {}, "note": "", "tokens": 30}
    return {**about, "seconds": seconds, **more}


def result(**arms: dict[str, Any]) -> dict[str, Any]:
    """A whole result of the step benchmark with these arms."""
    about = {"kind": "step", "layout": LAYOUT, "machine": "a machine", "commit": "abc1234", "command": "python -m x"}
    about |= {"versions": {"torch": "2.1", "transformers": "5.2", "trl": "1.16"}, "date": "2026-01-01"}
    about |= {"device": "cpu", "threads": 2, "dtype": "float32", "shape": "bench", "rounds": 5, "rollout": False}
    about |= {"quick": False, "complete": True, "sizes": SIZES | {"parameters": 16_000_000}, "grid": [], "skipped": {}}
    return about | {"arms": arms, "wall_seconds": 60.0, "tree_peak_mib": 2048.0}


def gone(pid: int) -> bool:
    """Whether it ends soon; a zombie that nobody has waited for counts."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        sleep(0.05)
    return False
