"""A sequence classifier as a reward: its logit of the conversation's text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen2Config

from tests.helpers.families import FAMILIES, TEXT, tokenizer
from tests.helpers.rewards import group, sample
from vlmr1.errors import SettingError
from vlmr1.rewards.groups import score_groups
from vlmr1.rewards.registry import get_reward

TOKENS = tokenizer(FAMILIES["qwen2_5_vl"])


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "judge"
    sizes = TEXT | {"vocab_size": len(TOKENS), "pad_token_id": TOKENS.pad_token_id, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    TOKENS.save_pretrained(folder)
    return folder


def test_the_score_is_the_logit_of_each_conversation_alone(judge: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(judge)
    groups = [group(sample(1), "yes", "no, it is a longer answer"), group(sample(2), "maybe", "")]
    expected = []
    for each in groups:
        for completion in each.completions:
            turns = [*each.prompt.sample.messages, {"role": "assistant", "content": completion.text}]
            inputs = TOKENS(TOKENS.apply_chat_template(turns, tokenize=False), return_tensors="pt")
            expected.append(model(**inputs).logits.item())
    for source in (str(judge), model):
        found = torch.cat([each.rewards for each in score_groups(groups, [source])])  # type: ignore[misc]
        assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-6) and get_reward(source).name == "judge"
    assert len(set(expected)) == 4


@pytest.mark.parametrize("what", ["empty", "no/such-model", "no template"])
@pytest.mark.slow
def test_what_is_no_reward_model_is_refused(what: str, judge: Path, tmp_path: Path) -> None:
    source = what
    if what == "empty":
        (tmp_path / "config.json").write_text("{}")
        source = str(tmp_path)
    if what == "no template":
        tokens = tokenizer(FAMILIES["qwen2_5_vl"])
        tokens.chat_template = None
        AutoModelForSequenceClassification.from_pretrained(judge).save_pretrained(tmp_path)
        tokens.save_pretrained(tmp_path)
        source = str(tmp_path)
    with pytest.raises(SettingError, match=f"reward_funcs.*{'chat template' if what == 'no template' else source}"):
        get_reward(source)
