"""The embedded default: canvases, the data set, the built model, its tokenizer and processor, what is shipped."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmr1.data.images import open_image
from vlmr1.data.samples import load_samples
from vlmr1.rewards.answer import solution_box
from vlmr1.tiny import CHECKPOINT, build, digits, supervise
from vlmr1.tiny.texts import JITTER, STYLES, completion_text, jittered, prompt_text, sloppy

MIB = 2**20
SCANS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of scikit-learn's load_digits
QUESTION = prompt_text(0).replace(digits.question(0), "{question}")


@pytest.fixture(scope="module", params=["shipped", "built"])
def tokenizer(request, processor) -> Any:
    """That of the checkpoint, and the one that a fresh build trains."""
    return processor.tokenizer if request.param == "shipped" else build.tokenizer()


def drawn(count: int, split: digits.Split = "train", seed: int = 0) -> list[digits.Canvas]:
    rng = np.random.default_rng(seed)
    return [digits.draw(rng, split) for _ in range(count)]


def background(canvas: digits.Canvas) -> np.ndarray:
    """[H, W] bool: outside all boxes."""
    outside = np.ones(canvas.pixels.shape[:2], dtype=bool)
    for x1, y1, x2, y2 in canvas.boxes:
        outside[y1:y2, x1:x2] = False
    return outside


# Canvases


def test_canvases():
    sizes, counts = Counter(), Counter()
    for canvas in drawn(300):
        size = canvas.pixels.shape[0]
        assert canvas.pixels.shape == (size, size, 3) and canvas.pixels.dtype == np.uint8
        assert len(set(canvas.labels)) == len(canvas.labels) == len(canvas.boxes)
        covered = np.zeros((size, size), dtype=int)
        for x1, y1, x2, y2 in canvas.boxes:
            assert 0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size
            assert x2 - x1 == y2 - y1 and x2 - x1 in digits.DIGIT
            assert all(edge % digits.STEP == 0 for edge in (x1, y1, x2, y2))
            covered[y1:y2, x1:x2] += 1
        assert covered.max() == 1
        sizes[size] += 1
        counts[len(canvas.boxes)] += 1
    assert set(sizes) == set(digits.CANVAS) and min(digits.CANVAS) >= 112 and max(digits.CANVAS) <= 168
    assert set(counts) == {2, 3, 4}


def test_light_grows_red_to_the_right_and_green_to_the_bottom():
    for canvas in drawn(20):
        y, x = np.nonzero(background(canvas))
        red, green, _ = canvas.pixels[y, x].astype(float).T
        for channel, along, across in ((red, x, y), (green, y, x)):
            thirds = np.array_split(channel[np.argsort(along, kind="stable")], 3)
            assert thirds[0].mean() + 10 < thirds[1].mean() < thirds[2].mean() - 10
            slope = np.linalg.lstsq(np.stack([along, across, np.ones_like(x)], 1), channel, rcond=None)[0]
            assert slope[0] > 1 and abs(slope[1]) < 0.02  # grey levels a px


def read_scans() -> tuple[np.ndarray, np.ndarray]:
    with np.load(digits.SCANS) as file:
        return file["images"], file["labels"]


def test_the_scans_are_those_of_the_published_data_set():
    images, labels = read_scans()
    assert (images.shape, images.dtype, labels.shape) == ((1797, 8, 8), np.uint8, (1797,))
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == SCANS_SHA256


def test_every_scan_is_in_exactly_one_split():
    images, labels = read_scans()
    every = Counter((int(label), (scan / 16).tobytes()) for scan, label in zip(images, labels, strict=True))
    train, held_out = (
        Counter((label, scan.tobytes()) for label, of_class in digits.scans(split).items() for scan in of_class)
        for split in ("train", "held_out")
    )
    assert train.total() + held_out.total() == every.total() == 1797
    assert train + held_out == every and not train & held_out
    assert not {scan for _, scan in train} & {scan for _, scan in held_out}
    for split in ("train", "held_out"):
        assert sorted(digits.scans(split)) == list(range(10))
    assert all(len(of_class) >= 30 for of_class in digits.scans("held_out").values())


@pytest.mark.parametrize("split, other", [("train", "held_out"), ("held_out", "train")])
def test_a_canvas_shows_the_scans_of_its_split(split, other):
    """The blue of each box is nearest to a scan of its label, from its split, wherever they come from."""

    def distance(ink: np.ndarray, scans: np.ndarray) -> float:
        resized = [Image.fromarray(scan.astype(np.float32)).resize(ink.shape, 2) for scan in scans]
        return min(float(((ink - np.asarray(each)) ** 2).mean()) for each in resized)

    for canvas in drawn(4, split):
        for (x1, y1, x2, y2), label in zip(canvas.boxes, canvas.labels, strict=True):
            ink = (canvas.pixels[y1:y2, x1:x2, 2] / 255 - 0.1) / 0.8
            own = distance(ink, digits.scans(split)[label])
            assert own < 1e-3 < distance(ink, digits.scans(other)[label])


@pytest.mark.parametrize("seed", [0, 1])
def test_jittered_boxes(seed):
    """Inside the canvas, each edge at most one step off; edges away from the border move as JITTER says."""
    rng = np.random.default_rng(seed)
    moved: list[int] = []
    for canvas in drawn(400, seed=seed):
        size = canvas.pixels.shape[0]
        for which, true in enumerate(canvas.boxes):
            box = jittered(canvas, which, rng)
            assert 0 <= box[0] < box[2] <= size and 0 <= box[1] < box[3] <= size
            off = np.array(box) - np.array(true)
            assert set(np.abs(off)) <= {0, digits.STEP}
            moved += [int(o) // digits.STEP for o, edge in zip(off, true, strict=True) if 0 < edge < size]
    for step, share in JITTER.items():
        assert moved.count(step) / len(moved) == pytest.approx(share, abs=0.03)
    assert sum(JITTER.values()) == 1


def test_sloppy_boxes():
    """The styles have their shares; a loose box is a step outside on all sides as far as the canvas goes, a cut one a
    step inside on one side; the sides are equally frequent."""
    rng = np.random.default_rng(0)
    styles: Counter[str] = Counter()
    cut: Counter[int] = Counter()
    for canvas in drawn(800):
        size = canvas.pixels.shape[0]
        for which, (x1, y1, x2, y2) in enumerate(canvas.boxes):
            box = sloppy(canvas, which, rng)
            if box == (x1, y1, x2, y2):
                styles["exact"] += 1
            elif box == (max(x1 - 14, 0), max(y1 - 14, 0), min(x2 + 14, size), min(y2 + 14, size)):
                styles["loose"] += 1
            else:
                inside = [box[0] - x1, box[1] - y1, x2 - box[2], y2 - box[3]]
                assert sorted(inside) == [0, 0, 0, 14]
                styles["cut"] += 1
                cut[inside.index(14)] += 1
    count = styles.total()
    assert count > 2000 and sum(STYLES.values()) == 1
    assert {style: pytest.approx(n / count, abs=0.03) for style, n in styles.items()} == {
        "loose": 0.65,
        "cut": 0.10,
        "exact": 0.25,
    }
    assert all(n / cut.total() == pytest.approx(0.25, abs=0.08) for n in cut.values()) and len(cut) == 4


# The data set


def test_written_rows_come_back(tmp_path, monkeypatch):
    canvases: list[digits.Canvas] = []
    draw = digits.draw
    monkeypatch.setattr(digits, "draw", lambda *args: canvases.append(draw(*args)) or canvases[-1])
    path = digits.write(tmp_path, "held_out", 12, seed=3)
    samples = load_samples([path], [tmp_path / "images"], question=QUESTION, check_images=True)
    assert len(samples) == len(canvases) == 12
    for sample, canvas in zip(samples, canvases, strict=True):
        answer = json.loads(sample.solution.removeprefix("<answer>").removesuffix("</answer>"))
        which = canvas.labels.index(int(answer["label"]))
        assert solution_box(sample.solution) == tuple(answer["bbox_2d"]) == canvas.boxes[which]
        exact = completion_text(canvas, which, canvas.boxes[which])
        assert sample.columns["exact_response"] == exact
        labelled = solution_box(sample.columns["response"])
        moved = [abs(new - old) for new, old in zip(labelled, canvas.boxes[which], strict=True)]
        assert set(moved) <= {0, 14} and sample.columns["response"].split("[")[0] == exact.split("[")[0]
        text = prompt_text(canvas.labels[which])
        assert sample.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        assert np.array_equal(np.asarray(open_image(sample.images[0], "")), canvas.pixels)


def test_same_seed_same_bytes(tmp_path):
    def files(name: str, split: digits.Split, seed: int) -> list[bytes]:
        digits.write(tmp_path / name, split, 5, seed)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]

    first = files("first", "train", 4)
    assert len(first) == 6 and files("again", "train", 4) == first
    for name, split, seed in (("other", "train", 5), ("held", "held_out", 4)):
        assert not set(files(name, split, seed)) & set(first)
    again, original, held_out, other = (
        [json.loads(line)["conversations"][1] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("*/*.jsonl"))
    )
    assert again == original != other and original != held_out  # the splits differ in more than their scans


# The model, the tokenizer, the processor


def test_built_model(tokenizer):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(build.config(tokenizer))
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    text, vision = model.config.text_config, model.config.vision_config
    assert 1 <= len(vision.fullatt_block_indexes) < vision.depth  # the others are windowed
    assert vision.window_size < min(digits.CANVAS)
    assert text.num_key_value_heads < text.num_attention_heads
    assert 2 * sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads
    assert text.vocab_size == len(tokenizer)


TEXTS = {
    "task": prompt_text(7),
    "spaces": "  two \t tabs\t\n\n lines \r\n",
    "scripts": "Ünïcödé ñ 漢字 кириллица עברית ٣٤٥ ½",
    "emoji": "👩‍👩‍👧 🎉\u200b\ufeff",
    "numbers": "[0, 14,1234567] 3.14e-10 don't ' , .",
    "controls": "\x00\x01\x7f",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tokenizer_round_trip(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer):
    ids = {token: tokenizer(f"a{token}b").input_ids for token in build.SPECIAL}
    assert {len(each) for each in ids.values()} == {3}
    assert len({each[1] for each in ids.values()}) == len(build.SPECIAL) == 14
    assert tokenizer.decode([each[1] for each in ids.values()]) == "".join(build.SPECIAL)
    assert tokenizer.decode([each[1] for each in ids.values()], skip_special_tokens=True) == ""
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "A 7."},
]
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
USER = "<|im_start|>user\nSee <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n"
TURN = "<|im_start|>assistant\n"
RENDERED = {
    "whole": (CONVERSATION, False, SYSTEM.format("Be brief.") + USER + TURN + "A 7.<|im_end|>\n"),
    "prompt": (CONVERSATION, True, SYSTEM.format("Be brief.") + USER + TURN + "A 7.<|im_end|>\n" + TURN),
    "default": (CONVERSATION[1:2], True, SYSTEM.format("You are a helpful assistant.") + USER + TURN),
}


@pytest.mark.parametrize("messages, prompt, expected", RENDERED.values(), ids=RENDERED.keys())
def test_chat_template(messages, prompt, expected, processor):
    """As Qwen2.5-VL's own template renders them."""
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("size", digits.CANVAS)
def test_pixel_values_are_plain_patches(size, processor):
    """Patches of 14 px, four of a 28 px square adjacent, the frame given twice; no resizing."""
    canvas = next(canvas for canvas in drawn(50) if canvas.pixels.shape[0] == size)
    out = processor.image_processor([canvas.pixels], return_tensors="pt")
    mean, std = (np.array(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    image = ((canvas.pixels / 255 - mean) / std).transpose(2, 0, 1)  # [3, H, W]
    square, patch = range(0, size, 28), (0, 14)
    corners = [(y + dy, x + dx) for y in square for x in square for dy in patch for dx in patch]
    patches = [np.repeat(image[:, None, y : y + 14, x : x + 14], 2, axis=1).ravel() for y, x in corners]
    torch.testing.assert_close(out["pixel_values"].double(), torch.tensor(np.stack(patches)), rtol=0, atol=1e-5)
    assert out["image_grid_thw"].tolist() == [[1, size // 14, size // 14]]


def test_shipped_checkpoint():
    """bfloat16 safetensors, at most 8 MB in all, and no other weights."""
    files = [path for path in Path(CHECKPOINT).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    (weights,) = [path for path in files if path.stat().st_size > MIB]
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    names = {path.name for path in files}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= names


def test_shipped_checkpoint_is_what_build_describes(model, processor):
    expected = build.config(processor.tokenizer)
    for part in ("text_config", "vision_config"):
        ignored = {"dtype", "_attn_implementation_internal"}
        wanted, shipped = (getattr(config, part).to_dict().items() for config in (expected, model.config))
        assert {k: v for k, v in shipped if k not in ignored} == {k: v for k, v in wanted if k not in ignored}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ids


@pytest.mark.slow
def test_supervision_in_two_stages(tmp_path, monkeypatch):
    """From random weights in one command; the second stage is as if it was started from the first one's checkpoint."""
    stages = {name: replace(stage, steps=2, canvases=1, warm_up=1) for name, stage in supervise.STAGES.items()}
    monkeypatch.setattr(supervise, "STAGES", stages)
    supervise.main(["--out", str(tmp_path / "both")])
    supervise.main(["--out", str(tmp_path / "first"), "--stages", "jittered", "--seeds", "0"])
    more = ["--start", str(tmp_path / "first"), "--stages", "sloppy", "--seeds", "3"]
    supervise.main(["--out", str(tmp_path / "second"), *more])
    both, first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "first", "second"))
    assert both.keys() == second.keys() and all(torch.equal(both[name], second[name]) for name in both)
    assert all(tensor.dtype == torch.bfloat16 for tensor in both.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)
