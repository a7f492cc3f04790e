"""Images without a file on their way to a pack: the same tensors as from a file, encoded once."""

import pytest
import torch

from vlmr1.data.folder import ImageFolder
from vlmr1.data.rows import ListRows
from vlmr1.data.samples import Samples
from vlmr1.grpo.packing import make_pack
from vlmr1.models.features import FeatureCache, encode, unique_images
from vlmr1.types import ImageBytes


@pytest.fixture
def prompts(make, image_files):
    """For two rows with equal bytes, one with others, and one that names the file of the first."""
    data = {size: path.read_bytes() for size, path in image_files.items()}
    values = [data[56], {"bytes": data[56], "path": "b.png"}, data[84], image_files[56].name]
    rows = [{"prompt": "Where?", "image": value, "solution": "x"} for value in values]
    samples = Samples([(ListRows("rows", rows), ImageFolder(image_files[56].parent))], "{question}")
    return [make.builder(sample) for sample in samples]


def test_a_prompt_is_that_of_the_file(prompts):
    one, *_, filed = prompts
    assert torch.equal(one.input_ids, filed.input_ids)
    assert torch.equal(one.positions, filed.positions)
    assert torch.equal(one.images[0]["pixel_values"], filed.images[0]["pixel_values"])


def test_equal_bytes_are_encoded_once(prompts, make):
    images, keys, places = unique_images(prompts)
    assert places == (0, 0, 1, 2)
    assert [type(key) is ImageBytes for key in keys] == [True, True, False]
    cache = FeatureCache()
    pack = make_pack([make.group(prompt, (3, 4)) for prompt in prompts[:3]])
    features = encode(make.family, make.model, pack.image_refs, pack.images, cache)
    assert len(features) == len(cache.kept) == 2
    with torch.no_grad():
        direct = make.family.encode_images(make.model, [images[1]])[0]
    assert torch.allclose(
        encode(make.family, make.model, keys[1:2], images[1:2], cache)[0].rows, direct.rows, atol=1e-5
    )
