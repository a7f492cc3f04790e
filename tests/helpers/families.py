"""A tiny randomly initialized checkpoint of each model family, in the ordinary Hugging Face layout.

Stock configuration class, stock image processor, a tokenizer with the family's special tokens, a chat template in the
family's format. Everything follows from a seed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Glm4vConfig,
    Idefics3Config,
    InternVLConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.helpers.slow import mostly_slow
from vlmr1.models.processor import PROCESSOR_MAPPING, image_only, save_processor
from vlmr1.tiny.build import CHAT_TEMPLATE as QWEN2_TEMPLATE

HIDDEN = 64
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,  # a multiple of the blocks of 4-bit weights
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
PARTS = (
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% elif 'text' in part %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + PARTS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    + PARTS
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    + PARTS
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def with_parts(template: str, image: str) -> str:
    return template.replace(PARTS, PARTS.format(image=image))


@dataclass(frozen=True)
class Family:
    """`special`: the first is the padding, the second ends a turn."""

    kind: Callable[..., Any]  # class of the configuration
    special: tuple[str, ...]
    tokens: dict[str, str]  # fields of the configuration that hold the id of a token
    template: str
    image_processor: Callable[[], Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # further fields of the configuration
    named: dict[str, str] | None = None  # tokens that the tokenizer knows by a name
    settings: dict[str, int] | None = None  # of the processor

    def config(self, ids: dict[str, int]) -> Any:
        """The configuration for a vocabulary."""
        padding, end = (ids[token] for token in self.special[:2])
        known = {"vocab_size": len(ids), "pad_token_id": padding, "bos_token_id": padding, "eos_token_id": end}
        given = {name: ids[token] for name, token in self.tokens.items()} | self.options
        return self.kind(text_config=TEXT | known | self.text, vision_config=dict(self.vision), **given)


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True) for token in family.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["Locate the digit 7. Where, if anywhere on this canvas, is it? user assistant"] * 8, trainer
    )
    padding, end = family.special[:2]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=padding,
        eos_token=end,
        padding_side="left",
        chat_template=family.template,
        extra_special_tokens=family.named or {},
    )


def build(name: str | Family, folder: Path, seed: int = 0) -> Path:
    """Write the family's tiny checkpoint: random float32 weights, three times as wide as usual, so that attention is
    far from uniform."""
    family = FAMILIES[name] if isinstance(name, str) else name
    tokens = tokenizer(family)
    config = family.config(tokens.get_vocab())
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    model.generation_config.eos_token_id = [tokens.eos_token_id, tokens.pad_token_id]
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    make = image_only(PROCESSOR_MAPPING[type(config)])
    processor = make(family.image_processor(), tokens, chat_template=family.template, **(family.settings or {}))
    save_processor(processor, folder)
    return folder


def checkpoints(*names: str) -> Any:
    """A fixture `checkpoint` for a module: the tiny checkpoint of each of these families, of all if none is named.

    Three of all, whose code others have too, are left to `make test`."""

    @pytest.fixture(scope="session", params=names or mostly_slow([*FAMILIES], *QUICK))
    def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(request.param, tmp_path_factory.mktemp("families") / request.param)

    return checkpoint


QUICK = ("qwen2_5_vl", "qwen3_vl", "internvl", "glm4v")


def one_family(name: str = "qwen2_5_vl") -> pytest.MarkDecorator:
    """Only this family's checkpoint in a test of a module that has those of all."""
    return pytest.mark.parametrize("checkpoint", [name], indirect=True)


def config_of(name: str) -> Any:
    """The configuration of a family's tiny checkpoint."""
    return FAMILIES[name].config(tokenizer(FAMILIES[name]).get_vocab())


def outputs(processor: Any) -> dict[str, torch.Tensor]:
    """What a processor makes of a question about an image."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.linear_gradient("L").convert("RGB").resize((112, 56))]
    return dict(processor(text=[text], images=images, return_tensors="pt"))


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other) and one.chat_template == other.chat_template
    first, second = outputs(one), outputs(other)
    assert first.keys() == second.keys() and len(first) >= 3
    assert all(torch.equal(first[name], second[name]) for name in first)


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
TILED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_TOKENS = {
    "image_token_id": "<|image|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_token_id": "<|video|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GRIDS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}
QWEN = Family(
    Qwen2VLConfig,
    ("<|endoftext|>", "<|im_end|>", "<|im_start|>", *QWEN_TOKENS.values()),
    QWEN_TOKENS,
    QWEN2_TEMPLATE,
    lambda: Qwen2VLImageProcessorPil(size=GRIDS),
    vision={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
    text=mrope(4, 2, 2),
    options={"tie_word_embeddings": True},
)
ROWS_AND_COLUMNS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
SPLIT = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
IDEFICS3 = Family(
    Idefics3Config,
    (
        *("<|endoftext|>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<image>"),
        *("<global-img>", *ROWS_AND_COLUMNS),
    ),
    {"image_token_id": "<image>"},
    with_parts(IDEFICS, "<image>"),
    lambda: Idefics3ImageProcessorPil(**SPLIT),
    vision=TILED | {"image_size": 56, "patch_size": 14},
    text={"model_type": "llama"},
    options={"scale_factor": 2},
    settings={"image_seq_len": 4},
)
FAMILIES = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": replace(
        QWEN, kind=Qwen2_5_VLConfig, vision=VISION | {"window_size": 56, "fullatt_block_indexes": [1]}, options={}
    ),
    "qwen3_vl": replace(
        QWEN,
        kind=Qwen3VLConfig,
        template=with_parts(CHATML, "<|vision_start|><|image_pad|><|vision_end|>"),
        vision=VISION
        | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 14},
        text={"num_hidden_layers": 3, **mrope(4, 2, 2, mrope_interleaved=True)},
    ),
    "glm4v": Family(
        Glm4vConfig,
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", *GLM_TOKENS.values()),
        GLM_TOKENS,
        with_parts(GLM, "<|begin_of_image|><|image|><|end_of_image|>"),
        lambda: Glm4vImageProcessorPil(size={"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 28 * 28 * 64}),
        vision=VISION | {"image_size": 84},
        text=mrope(2, 1, 1, partial_rotary_factor=0.5),
    ),
    "internvl": Family(
        InternVLConfig,
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>", *INTERNVL_NAMES.values()),
        {"image_token_id": "<IMG_CONTEXT>"},
        with_parts(CHATML, "<IMG_CONTEXT>\n"),
        lambda: GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4, crop_to_patches=True),
        vision=TILED | {"image_size": [56, 56]},
        text={"model_type": "qwen2"},
        options={"image_seq_length": 4, "tie_word_embeddings": False},
        named=INTERNVL_NAMES,
        settings={"image_seq_length": 4},
    ),
    "idefics3": IDEFICS3,
    "smolvlm": replace(IDEFICS3, kind=SmolVLMConfig, image_processor=lambda: SmolVLMImageProcessorPil(**SPLIT)),
}
