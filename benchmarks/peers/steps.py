"""Peers of whole steps and of updates, each in a worker process: VLM-R1's step written anew, and TRL's GRPOTrainer.

    python -m benchmarks.peers.steps --peer vlm-r1-repaired --kind step --folder FOLDER --shape bench --prompts 1

A worker reads requests, a line each, from standard input, and answers each with a line of JSON:

    figures    {"loss", "grad_norm"} of one update; of a step there are none, since it draws its completions
    seconds    of one sample: an update (reference pass, policy pass, backward), or a step (rollout to optimizer)
    peak_mib   highest memory during one sample, above what was held before it
    phases     {phase: seconds} of one sample that is timed by phase, which waits for the device between them
    settings   {"attention", "gradient_checkpointing", "versions"} of this worker

All but the first and the last are of a warm peer: a sample is run before the first of them. Weights are those that
`FOLDER` holds, or where it holds none, those that `benchmarks.model.build` makes; groups and prompts are those of
`benchmarks.model`. Gradient checkpointing is on where the shape has it, as in the other arms, and always in "vlm-r1";
attention is flash-attention where it is installed and the weights are 16 bits wide, SDPA otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from benchmarks.harness import PeakMemory, timed, versions
from benchmarks.heap import returned_at_once
from benchmarks.peers.clock import PhaseClock

KINDS = ("step", "update")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = 0.04
VLM_R1 = "https://github.com/om-ai-lab/VLM-R1 at 0ae0aea10759412975b460f0f6dbed1a87b92e8a"
TRL = "https://github.com/huggingface/trl"


@dataclass(frozen=True)
class PeerInfo:
    """A peer: its label for people, how it is run, where it comes from, and why it cannot run on a device."""

    label: str
    note: str
    source: str
    why_not: Callable[[str], str | None]


def missing(*packages: str) -> str | None:
    """What is not installed of these."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def no_liger(device: str) -> str | None:
    """Liger's layers are Triton kernels, which need a GPU; its patch of Qwen2.5-VL must fit the installed library."""
    absent = missing("trl", "datasets", "liger_kernel")
    if absent is not None:
        return absent
    reasons = [] if device == "cuda" else [f"Liger's layers are Triton kernels, which do not run on {device}"]
    try:
        import_module("liger_kernel.transformers.model.qwen2_5_vl")  # what TRL's use_liger_kernel imports
    except ImportError as error:
        found = " and ".join(f"{name} {metadata.version(name)}" for name in ("liger-kernel", "transformers"))
        reasons.append(f"{found} do not fit each other on any device: {str(error).split(' (')[0]}")
    return "; ".join(reasons) or None


PEERS: dict[str, PeerInfo] = {
    "vlm-r1": PeerInfo(
        "VLM-R1 as published",
        "its step written anew: gradient checkpointing on at every shape, top_k 50, logits of every position, prompt "
        "and image G times in all passes; KV cache in the rollout, as it has with transformers 4.49.0",
        VLM_R1,
        lambda device: None,
    ),
    "vlm-r1-repaired": PeerInfo(
        "VLM-R1, repaired",
        "its step written anew: as published, but gradient checkpointing as in the other arms, and top_k off, so that "
        "it draws from the distribution whose log-probs it trains on",
        VLM_R1,
        lambda device: None,
    ),
    "trl": PeerInfo(
        "TRL",
        "its GRPOTrainer, whole, rollouts by transformers; loss_type grpo, KL without bias correction, micro-batches "
        "of one group, gradient checkpointing as in the other arms, bf16 on with bfloat16 weights",
        TRL,
        lambda device: missing("trl", "datasets"),
    ),
    "trl+liger": PeerInfo(
        "TRL with Liger",
        "as TRL, with use_liger_kernel, which in TRL 1.16 is Liger's layers in the policy: the loss is still that of "
        "TRL's own chunked head",
        TRL,
        no_liger,
    ),
}


def command(
    name: str,
    *,
    kind: Literal["step", "update"],
    folder: Path,
    shape_name: str,
    prompts: int,
    threads: int,
    dtype: str,
    python: str | None = None,
) -> list[str]:
    """The worker's command, to be run in the root of the repository. `python`: an interpreter with other packages, and
    with those that `vlmr1` imports."""
    words = ["--peer", name, "--kind", kind, "--folder", str(folder), "--shape", shape_name]
    words += ["--prompts", str(prompts), "--threads", str(threads), "--dtype", dtype]
    return [python or sys.executable, "-m", "benchmarks.peers.steps", *words]


def attention(dtype: torch.dtype) -> str:
    """flash_attention_2, which VLM-R1's script asks for, where it is installed and has the dtype; sdpa otherwise."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if dtype != torch.float32 and is_flash_attn_2_available() else "sdpa"


class Peer:
    """One peer and what it answers."""

    def __init__(self, name: str, kind: str, folder: Path, shape_name: str, prompts: int, dtype: torch.dtype):
        from benchmarks import model as bench_model

        self.shape = bench_model.SHAPES[shape_name]
        self.checkpointing = name == "vlm-r1" or self.shape.checkpointing
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.processor = weights(folder, self.shape, device, dtype)
        made = self._vlm_r1 if name.startswith("vlm-r1") else self._trl
        self.arm: Any = made(name, kind, folder, prompts)
        self.sample: Callable[..., Any] = self.arm.update if kind == "update" else self.arm.run
        self.kind, self.warm = kind, False

    def _vlm_r1(self, name: str, kind: str, folder: Path, prompts: int) -> Any:
        from benchmarks import model as bench_model
        from benchmarks.peers.vlm_r1 import Form, VLMR1Step, VLMR1Update

        form = Form() if name == "vlm-r1" else Form(checkpointing=self.checkpointing, top_k=0)
        if kind == "update":
            return VLMR1Update(self.model, self._groups(folder, prompts), BETA, form)
        reward = bench_model.spread
        return VLMR1Step(folder, self.model, self.processor, prompts, BETA, reward, form, self.shape)

    def _trl(self, name: str, kind: str, folder: Path, prompts: int) -> Any:
        from benchmarks import model as bench_model
        from benchmarks.peers.trl import TRLArm, TRLStep

        options: dict[str, Any] = {"checkpointing": self.checkpointing, "liger": name == "trl+liger"}
        if kind == "update":
            groups = self._groups(folder, prompts)
            return TRLArm(self.model, self.processor, groups, BETA, folder / "output" / name, **options)
        made = (self.model, self.processor)
        return TRLStep(folder, prompts, BETA, bench_model.spread, shape=self.shape, weights=made, **options)

    def _groups(self, folder: Path, prompts: int) -> Any:
        from benchmarks import model as bench_model

        return bench_model.groups(folder, self.model, self.processor, prompts, self.shape)

    def figures(self) -> dict[str, float]:
        """Loss and gradient norm of one update, which are those of the other arms."""
        if self.kind != "update":
            raise SystemExit("figures: a step draws its completions, so that its loss is no other arm's")
        self.model.zero_grad(set_to_none=True)
        loss = float(self.arm.update())
        norms = [parameter.grad.float().norm() for parameter in self.model.parameters() if parameter.grad is not None]
        return {"loss": loss, "grad_norm": float(torch.stack(norms).norm())}

    def seconds(self) -> float:
        self._ready()
        return timed(self.sample)()

    def peak_mib(self) -> float:
        self._ready()
        with returned_at_once():
            peak = PeakMemory()
            self.sample()
            return peak.mib()

    def phases(self) -> dict[str, float]:
        self._ready()
        clock = PhaseClock()
        self.sample(clock)
        return clock.seconds

    def settings(self) -> dict[str, Any]:
        implementation = self.model.config._attn_implementation
        return {
            "attention": implementation,
            "gradient_checkpointing": self.checkpointing,
            "versions": versions(),
        }

    def _ready(self) -> None:
        """Warm, and without gradients."""
        if not self.warm:
            self.sample()
            self.warm = True
            gc.collect()
            gc.freeze()  # as in the suite's own process
        self.model.zero_grad(set_to_none=True)
        gc.collect()

    def answer(self, request: str) -> Any:
        """SystemExit for a request that is none."""
        answers = {
            "figures": self.figures,
            "seconds": self.seconds,
            "peak_mib": self.peak_mib,
            "phases": self.phases,
            "settings": self.settings,
        }
        if request not in answers:
            raise SystemExit(f"{request!r} is none of {', '.join(answers)}")
        return answers[request]()


def weights(folder: Path, shape: Any, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, processor): what the folder holds, or what the other arms build there from the same seed."""
    from benchmarks import model as bench_model
    from vlmr1.models import load_model, load_processor

    if any(folder.glob("*.safetensors")):
        model: Any = load_model(folder, dtype=dtype, attn_implementation=attention(dtype))
        return model.to(device), load_processor(folder)
    model, processor = bench_model.build(folder, shape, device=device, dtype=dtype)
    model.set_attn_implementation(attention(dtype))
    return model, processor


def serve(peer: Peer, requests: TextIO, answers: TextIO) -> None:
    """Answer each line of `requests` until they end."""
    for line in requests:
        print(json.dumps(peer.answer(line.strip())), file=answers, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.steps", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="weights, tokenizer and images of the benchmark")
    parser.add_argument("--shape", required=True, help="one of benchmarks.model.SHAPES")
    parser.add_argument("--prompts", type=int, default=1, help="groups a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if find_spec("vlmr1_kernels") is None:  # another interpreter, where this project is not installed
        sys.path.append(str(Path(__file__).parents[2] / "kernels"))
    reason = PEERS[options.peer].why_not("cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        raise SystemExit(f"{options.peer}: {reason}")
    dtype = DTYPES[options.dtype]
    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # what libraries print is no answer
        peer = Peer(options.peer, options.kind, options.folder, options.shape, options.prompts, dtype)
        serve(peer, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
