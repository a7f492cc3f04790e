"""Build the untrained tiny checkpoint: configuration, tokenizer, image processor, random weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmr1.tiny import digits
from vlmr1.tiny.texts import completion_text, jittered, prompt_text

VOCABULARY = 768
MARKS = ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end")
VISION_MARKS = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", *MARKS, *VISION_MARKS))
# Layers and widths, without the tokenizer's part; the benchmarks' shape "tiny" has them too.
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 192,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
}
# Numbers are separate words; other text may merge into long tokens, which keeps completions short.
WORDS = r" ?\p{N}{1,3}|[^\p{N}\n]+\n?|\n"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the task's texts, with Qwen's special tokens and chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for _ in range(2000):
        canvas = digits.draw(rng, "train")
        texts += [prompt_text(canvas.labels[0]), completion_text(canvas, 0, jittered(canvas, 0, rng))]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def config(tokens: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Return a Qwen2.5-VL of fewer than 3M parameters: windowed tower, GQA decoder with M-RoPE."""
    vocabulary = tokens.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL}
    return Qwen2_5_VLConfig(
        text_config=deepcopy(TEXT)
        | {
            "vocab_size": len(tokens),
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|endoftext|>"],
        },
        vision_config=deepcopy(VISION),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build(folder: Path, seed: int = 0) -> Path:
    """Write tokenizer, processor, configuration and random float32 weights in the Hugging Face layout."""
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256}).save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(tokens))
    model.generation_config.eos_token_id = [tokens.eos_token_id, tokens.pad_token_id]
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    return folder
