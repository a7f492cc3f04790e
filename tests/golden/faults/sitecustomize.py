"""Faults put into a run from outside: this folder on PYTHONPATH, and GOLDEN_FAULTS as a JSON object {fault: calls}.

Only public hooks of torch are used, so that the same faults meet every version of the product. `calls` counts from 1:

- `kill`: the process ends before these optimizer steps.
- `reference`: memory runs out in these decoder forwards of a model without trainable parameters.
- `forward`: memory runs out in these decoder forwards with gradient.
- `backward`: memory runs out in these backward passes, after their gradients were computed."""

import json
import os

DECODERS = ("Qwen2_5_VLTextModel",)


def install(faults: dict[str, list[int]]) -> None:
    """Register the hooks."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    calls = dict.fromkeys(("kill", "reference", "forward", "backward"), 0)

    def is_due(fault: str) -> bool:
        calls[fault] += 1
        return calls[fault] in faults.get(fault, ())

    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def before_step(*_: object) -> None:
        if is_due("kill"):
            os._exit(9)

    def before_forward(module: torch.nn.Module, _: object) -> None:
        if type(module).__name__ not in DECODERS:
            return
        if torch.is_grad_enabled():
            if is_due("forward"):
                run_out()
        elif not any(parameter.requires_grad for parameter in module.parameters()) and is_due("reference"):
            run_out()

    backward = torch.Tensor.backward

    def failing_backward(*arguments: object, **options: object) -> None:
        backward(*arguments, **options)  # type: ignore[arg-type]
        if is_due("backward"):
            run_out()

    register_optimizer_step_pre_hook(before_step)
    register_module_forward_pre_hook(before_forward)
    torch.Tensor.backward = failing_backward  # type: ignore[method-assign]


if "GOLDEN_FAULTS" in os.environ:
    install(json.loads(os.environ["GOLDEN_FAULTS"]))
