import pytest

from vlmr1_kernels import PrefixLayout


def test_offsets_follow_the_packed_order() -> None:
    layout = PrefixLayout((3, 1, 2), ((2, 0, 4), (), (5,)))
    assert layout.prompt_offsets == (0, 3, 4)
    assert layout.prompt_total == 6
    assert layout.group_offsets == (6, 12, 12)
    assert layout.branch_offsets == ((6, 8, 8), (), (12,))
    assert layout.total_length == 17


def test_equal_layouts_are_one_key() -> None:
    assert {PrefixLayout((3,), ((1, 2),)): 1}[PrefixLayout([3], [[1, 2]])] == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "branches", "message"),
    [
        ((), (), "prompt_lengths is empty"),
        ((2, 3), ((1,),), "prompt_lengths has 2 groups, branch_lengths has 1"),
        ((2, 0), ((1,), (1,)), r"prompt_lengths\[1\] is 0"),
        ((2,), ((1, -1),), r"branch_lengths\[0\] is \(1, -1\)"),
    ],
    ids=["empty", "groups", "prompt", "branch"],
)
def test_bad_layout_is_named(prompts: tuple[int, ...], branches: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLayout(prompts, branches)
