import logging

import pytest
import torch

from vlmr1_kernels import ImplementationError, PrefixLayout, group_advantages, registry, use
from vlmr1_kernels.implementations import Request
from vlmr1_kernels.native import library
from vlmr1_kernels.registry import explain, explain_all, parse_choices, resolve

ATTENTION = "shared_prefix_attention"
CPU32 = Request(torch.device("cpu"), torch.float32, (4, 2, 9, 16))
CPU64 = CPU32._replace(dtype=torch.float64)


def chosen(impl: str = "auto", request: Request = CPU32) -> str:
    return resolve(ATTENTION, impl, request).__module__.split(".")[1]


def test_authority_argument_block_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMR1_KERNELS", f"grpo_loss=reference, {ATTENTION}=reference")
    assert chosen() == "reference"
    with use(f"{ATTENTION}=cpu"):
        assert chosen() == "cpu"
        assert chosen("reference") == "reference"
        with use(shared_prefix_attention="reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
    with use(shared_prefix_attention="auto"):
        assert chosen() == "cpu", "a block that says auto outranks the environment"
    monkeypatch.delenv("VLMR1_KERNELS")
    assert chosen() == "cpu"


def test_block_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), use(shared_prefix_attention="reference"):
        raise KeyError
    assert chosen() == "cpu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_op=cpu", "unknown op 'no_such_op'; known: linear_logprob, group_advantages"),
        (
            f"{ATTENTION}=fast",
            f"{ATTENTION} has no implementation 'fast'; known: auto, cpu, flash3, flash4, flash, flex, reference",
        ),
        (ATTENTION, "expected op=impl"),
        (f"{ATTENTION}=", "expected op=impl"),
        ("grpo_loss=reference,grpo_loss=auto", "grpo_loss is given twice"),
    ],
    ids=["op", "implementation", "no equals", "no name", "twice"],
)
def test_bad_choices_are_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImplementationError, match=message):
        parse_choices(text)
    with pytest.raises(ImplementationError, match=message), use(text):
        pass
    monkeypatch.setenv("VLMR1_KERNELS", text)
    with pytest.raises(ImplementationError, match=message):
        group_advantages(torch.ones(2), 2)


def test_choices_are_parsed() -> None:
    assert parse_choices(" grpo_loss = reference ,, linear_logprob=auto ") == {
        "grpo_loss": "reference",
        "linear_logprob": "auto",
    }
    assert parse_choices("") == {}


def test_auto_leaves_the_interpreter_to_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(library, "unavailable_reason", lambda: "the native library is not built")
    found = explain("grpo_loss", CPU32)
    assert found.chosen == "reference"
    assert found.others["triton"] == "usable by name; Triton's interpreter is for tests"
    assert resolve("grpo_loss", "triton", CPU32).__module__.startswith("vlmr1_kernels")


def test_a_compiled_graph_can_hold_the_selection() -> None:
    request = CPU32._replace(device=torch.device("cuda"), dtype=torch.bfloat16)

    def numbered(x: torch.Tensor) -> torch.Tensor:
        return x + list(registry.implementations(ATTENTION)).index(registry.select(ATTENTION, request).name)

    expected = numbered(torch.zeros(2))  # which looks for the packages
    assert torch.equal(torch.compile(numbered, backend="eager", fullgraph=True)(torch.zeros(2)), expected)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_logged", set())
    with caplog.at_level(logging.INFO, logger="vlmr1_kernels"):
        for request in (CPU32, CPU32, CPU32._replace(shape=(4, 2, 11, 16)), CPU64):
            resolve(ATTENTION, "auto", request)
        resolve(ATTENTION, "reference", CPU32)
    assert [record.getMessage() for record in caplog.records] == [
        f"{ATTENTION} on cpu in torch.float32: cpu",
        f"{ATTENTION} on cpu in torch.float64: reference",
    ]


def test_doctor_explains_every_op() -> None:
    explanations = {explanation.op: explanation for explanation in explain_all("cpu", torch.float32)}
    assert tuple(explanations) == registry.ops()
    assert explanations[ATTENTION].chosen == "cpu"
    assert explanations[ATTENTION].others["reference"] == "usable by name; auto prefers cpu"
    assert explanations[ATTENTION].others["flash"] == "runs on cuda, the tensors are on cpu"
    on_meta = explain(ATTENTION, CPU32._replace(device=torch.device("meta")))
    assert on_meta.chosen == "reference"
    assert on_meta.others["cpu"] == "runs on cpu, the tensors are on meta"


def test_offsets_of_a_layout_follow_the_packed_order_and_equal_layouts_are_one_key() -> None:
    layout = PrefixLayout((3, 1, 2), ((2, 0, 4), (), (5,)))
    assert (layout.prompt_offsets, layout.prompt_total, layout.total_length) == ((0, 3, 4), 6, 17)
    assert (layout.group_offsets, layout.branch_offsets) == ((6, 12, 12), ((6, 8, 8), (), (12,)))
    assert {PrefixLayout((3,), ((1, 2),)): 1}[PrefixLayout([3], [[1, 2]])] == 1  # type: ignore[arg-type]
