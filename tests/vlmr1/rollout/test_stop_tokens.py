"""Which tokens end a completion, wherever a checkpoint names them; and which tokens its text leaves out."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.helpers.rollouts import GREEDY, changed_logits, engine
from vlmr1.errors import SettingError
from vlmr1.evaluation.decode import Decoder
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, TransformersEngine
from vlmr1.rollout.stop_tokens import decode, stop_token_ids

END, PADDING, START, BOX = "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|box_end|>"
TURNS = "{% for m in messages %}" + START + "{{ m['role'] }}\n{{ m['content'][0]['text'] }}{END}\n{% endfor %}"
TEMPLATES = {
    "chatml": TURNS.replace("{END}", END),
    "the next turn's start": TURNS.replace("{END}", ""),
    "texts only": "{% for m in messages %}{{ m['content'] + '" + END + "' }}{% endfor %}",
    "no special token": "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}\n{% endfor %}",
    "refuses": "{{ raise_exception('no') }}",
}


def made(processor, generation=None, config=None, text=None, eos=None, template=None):
    """A model and a tokenizer that name end tokens here and nowhere else."""
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    ids = [each and tokenizer.convert_tokens_to_ids(each) for each in (generation, config, text)]
    of = [SimpleNamespace(eos_token_id=each) for each in ids]
    of[1].get_text_config = lambda decoder: of[2]
    return SimpleNamespace(generation_config=of[0], config=of[1]), tokenizer


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"generation": END}, [END]),
        ({"generation": [END, PADDING]}, [END, PADDING]),
        ({"config": END}, [END]),
        ({"text": [END, BOX]}, [END, BOX]),
        ({"generation": PADDING, "config": BOX, "text": BOX}, [PADDING]),  # the config is for want of another
        ({"eos": END}, [END]),
        ({"generation": PADDING, "eos": END}, [PADDING, END]),
        ({"template": "chatml"}, [END]),
        ({"template": "texts only"}, [END]),
        ({"template": "the next turn's start"}, [START]),
        ({"generation": PADDING, "template": "chatml"}, [PADDING, END]),
        ({"eos": END, "template": "refuses"}, [END]),
        ({"eos": END, "template": "no special token"}, [END]),
    ],
)
def test_all_that_a_checkpoint_names_end_a_completion(given, expected, processor):
    given = given | ({"template": TEMPLATES[given["template"]]} if "template" in given else {})
    model, tokenizer = made(processor, **given)
    expected = set(tokenizer.convert_tokens_to_ids(expected))
    assert stop_token_ids(model, tokenizer) == expected
    template, tokenizer.chat_template = tokenizer.chat_template, None
    assert stop_token_ids(model, tokenizer, template) == expected  # of the processor alone


@pytest.mark.parametrize("template", [None, "no special token", "refuses"])
def test_none_at_all_is_an_error(template, processor):
    with pytest.raises(SettingError, match=r"no token ends a completion: .* set eos_token in tokenizer_config\.json"):
        stop_token_ids(*made(processor, template=template and TEMPLATES[template]))


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_evaluation_stops_where_only_the_tokenizer_knows_the_end(kind, make, model, processor):
    end = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    model.config.get_text_config().eos_token_id = None
    decoder = Decoder(model, processor, max_completion_length=6, engine=kind)

    def stop(call, logits):
        logits[..., end] = 80 if call == 2 else -50

    with changed_logits(model, stop):
        (group,) = decoder.groups([make.prompt("Where?", (56,)).sample])
    assert len(group.completions[0].token_ids) == 3 and group.completions[0].finish_reason == "stop"
    with changed_logits(model, stop):
        decoder.engine.ignore_eos = True
        (group,) = decoder.groups([make.prompt("Where?", (56,)).sample])
    assert len(group.completions[0].token_ids) == 6 and group.completions[0].finish_reason == "length"


@pytest.mark.parametrize("kind", [NativeEngine, TransformersEngine])
def test_tags_that_are_special_tokens_stay_in_the_text(kind, make, model, processor):
    """Some tokenizers hold <answer>, or the box tokens, as special tokens."""
    special = [processor.tokenizer.convert_tokens_to_ids(f"<|box_{name}|>") for name in ("start", "end")]
    end = processor.tokenizer.eos_token_id

    def say(call, logits):
        logits[..., [*special, end][min(call, 2)]] = 80

    with changed_logits(model, say):
        (group,) = engine(model, processor, kind).generate([make.prompt("Where?", (56,))], 2, replace(GREEDY))
    for completion in group.completions:
        assert completion.token_ids.tolist() == [*special, end]
        assert completion.text == "<|box_start|><|box_end|>"


def test_end_and_padding_leave_the_text(processor):
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    ids = tokenizer("<answer>7</answer>")["input_ids"]
    end, padding, start = tokenizer.convert_tokens_to_ids([END, PADDING, START])
    for tail in ([end], [end, padding, padding], [padding], []):
        assert decode(tokenizer, [*ids, *tail], frozenset([end])) == "<answer>7</answer>"
    assert decode(tokenizer, [*ids, start], frozenset([start])) == "<answer>7</answer>"
    assert decode(tokenizer, [*ids, start], frozenset([end])) == "<answer>7</answer><|im_start|>"


def test_an_engine_asks_the_model_it_has(model, processor):
    native = NativeEngine(model, family_of(model), processor.tokenizer)
    assert native.stop_ids() == set(model.generation_config.eos_token_id)
