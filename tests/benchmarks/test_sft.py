"""The benchmark of supervised updates: its arms agree on the same rows, are sampled, and its table goes to its page."""

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import readme, sft
from benchmarks.harness import read_result
from tests.helpers.small_bench import SMALL, result, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a CPU's shapes")
@pytest.mark.slow
def test_arms_agree_and_the_page_quotes_them(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.setitem(sft.SHAPES, "tiny", SMALL)
    path = tmp_path / readme.SFT_RESULT
    assert command.main(["sft", "--quick", "--answers", "1", "3", "--rounds", "2", "--out", str(path)]) == 0
    found = read_result(path, "sft")["answers"]
    assert found["1"]["answer_tokens"] * 2 < found["3"]["answer_tokens"]
    for each in found.values():
        assert each["arms"].keys() == sft.LABELS.keys()
        assert all(len(arm["seconds"]) == 2 and arm["check"]["grad_norm"] > 0 for arm in each["arms"].values())
    printed = capsys.readouterr().out
    assert printed.count("a prompt: vlmr1 ") == 2 and "3 a prompt: TRL" in printed

    monkeypatch.setattr(readme, "quoted", lambda result: "a table")
    monkeypatch.setattr(readme, "read", lambda path: result(all=row([1.0])))
    for name in ("README.md", "docs/sft.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.main(["--check"], tmp_path) == 1
    assert readme.main([], tmp_path) == 0 and "3 a prompt: TRL" in (tmp_path / "docs/sft.md").read_text()
    assert readme.main(["--check"], tmp_path) == 0
