"""What compiled implementations register with torch, and that they are there at all."""

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import decode_cases
from tests.helpers.attention import offsets
from tests.helpers.kernel_cases import DEVICE, OBJECTIVES, PER_ROW, Case, Target, on_device
from vlmr1_kernels import PrefixLayout, SamplingOptions, registry
from vlmr1_kernels.testing import HEAD, cast

pytestmark = on_device
NAMESPACE = "vlmr1_kernels"
LOSSES = ("linear_logprob", "group_advantages", "grpo_loss", "linear_grpo_loss")
ATTENTIONS = ("shared_prefix_attention", "varlen_attention")
DECODE = "shared_prefix_decode"
COMPILED = [*((op, "native") for op in LOSSES), *((op, "cpu") for op in ATTENTIONS), (DECODE, "reference")]
LAYOUTS = [PrefixLayout((4, 2), ((3, 2), (2, 2))), PrefixLayout((5, 1, 2), ((3,), (), (2, 2)))]
CASE = Case((5, 1, 7, 2), 20, 37, OBJECTIVES["gspo, k3, everything"], bias=True, softcap=8.0)
COLUMNS = (slice(16), slice(4, 12), slice(12, 20))  # of q with two heads, k, v
TABLES = ([0, 2, 3], [0, 9], [9, 4], [[4, 5], [5, 6], [7, 8]], [3, 0, 6])  # DecodeTables


def calls(op: str, inputs: dict[str, Tensor], run: Callable[..., Any]) -> Iterator[Tensor]:
    """Scalars of calls that differ in what they hand to the custom op; differentiable in the leaves where the op is."""
    if op == "linear_logprob":
        head = {name: inputs[name] for name in (*HEAD, "targets")}
        yield run(**head, temperature=0.7, softcap=CASE.softcap).sum()
        logp, entropy = run(**(head | {"bias": None}), entropy=True)
        yield (logp * entropy).sum()
    elif op == "group_advantages":
        for scale in ("group", "batch", "none"):
            yield run(inputs["advantages"], 2, scale=scale).sum()
    elif op == "grpo_loss":
        logp, per_row = inputs["hidden"].sum(1), {name: inputs[name] for name in ("seq_ids", *PER_ROW)}
        yield run(logp, **per_row, advantages=inputs["advantages"], settings=OBJECTIVES["gspo, k1"])[0]
        yield run(logp, inputs["seq_ids"], rewards=inputs["advantages"], num_generations=2, normalizer=3.0)[0]
    elif op == "sample_tokens":
        logits, draws = inputs["hidden"].detach(), inputs["hidden"].detach()[:, 0].double().sigmoid()
        yield torch.stack(run(logits, draws)[1:]).sum()
        options = SamplingOptions(0.8, min_p=0.1, repetition_penalty=1.2)
        yield torch.stack(run(logits, draws, inputs["targets"][:2] % 20, logits > 0, options=options)[1:]).sum()
    elif op == DECODE:
        keys = inputs["weight"].detach()[:, :16].unflatten(1, (2, 8)).transpose(0, 1)  # [2, 37, 8]
        tables = [torch.tensor(each, dtype=torch.int32, device=keys.device) for each in TABLES]
        out = run(inputs["hidden"].detach()[:3, :16].reshape(3, 2, 8), keys, keys, *tables, block=4, max_prefix=9)
        yield out.square().sum()
    elif op == "rope_kv_write":
        step = decode_cases.cast(
            decode_cases.RopeCase(norms=True).draw(), inputs["hidden"].dtype, inputs["hidden"].device
        )
        yield run(**step).sum()
    elif op in ATTENTIONS:
        hidden = inputs["hidden"]  # [15, 20]
        q, k, v = (hidden[:, columns].unflatten(1, (-1, 8)).transpose(0, 1)[None] for columns in COLUMNS)
        for layout in LAYOUTS:
            where = (
                (layout,)
                if op == "shared_prefix_attention"
                else (offsets((*layout.prompt_lengths, 15 - layout.prompt_total)), 9)
            )
            yield run(q, k, v, *where).square().sum()
    else:
        yield run(**inputs, softcap=CASE.softcap, settings=CASE.settings)[0]
        bare = {name: inputs[name] for name in ("hidden", "weight", "targets", "seq_ids")}
        yield run(**bare, rewards=inputs["advantages"], num_generations=2, normalizer=3.0)[0]
        active = torch.arange(6, device=inputs["hidden"].device)
        yield run(**bare, advantages=inputs["advantages"], active_rows=active)[0]


class _Record(TorchDispatchMode):
    """Keeps the calls of our custom ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
            self.calls.append((func, detached, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("native", torch.float32),
        ("cpu", torch.float32),
        ("reference", torch.float32),
        pytest.param("native", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_opcheck(impl: str, dtype: torch.dtype) -> None:
    device = DEVICE if impl == "triton" else "cpu"
    with _Record() as record:
        for op in (op for op in registry.ops() if impl in registry.implementations(op)):
            target = Target(op, impl, device)
            run, inputs = target.run(dtype), cast(CASE.draw(0, dtype), dtype, device)
            for value in calls(op, inputs, run):
                if value.requires_grad:
                    value.backward()
    checked = {func._schema.name for func, _, _ in record.calls}
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")]
    assert checked == {name for name in registered if f"_{impl}" in name}, "an op is registered and not checked"
    for func, args, kwargs in record.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("op", "impl"), COMPILED)
def test_compiles_and_agrees(op: str, impl: str) -> None:
    run = Target(op, impl, "cpu").run(torch.float32)

    def step(inputs: dict[str, Tensor]) -> Tensor:
        # The op stands among others: it is given an intermediate value, and its result is used.
        moved = inputs | {"hidden": inputs["hidden"] * 1.5}
        return torch.stack(list(calls(op, moved, run))).square().sum()

    def results(function: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor | None]:
        inputs = cast(CASE.draw(0, torch.float32), torch.float32)
        loss = function(inputs)
        if loss.requires_grad:
            loss.backward()
        return [loss.detach(), *(inputs[name].grad for name in HEAD)]

    results(step)  # loads the implementation, which no graph can hold
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled), results(step))


@pytest.mark.parametrize("op", LOSSES)
def test_native_and_triton_serve_wherever_they_can_be_built(op: str) -> None:
    needed = {"native": shutil.which("c++"), "triton": find_spec("triton")}
    there = [Target(op, impl, "cpu" if impl == "native" else DEVICE) for impl, tool in needed.items() if tool]
    assert [target.unsupported_reason(torch.float32) for target in there] == [None] * len(there)
