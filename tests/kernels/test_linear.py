import pytest
import torch

from vlmr1_kernels.linear import chunk_rows


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "chunk_mib", "expected"),
    [
        (4096, 8192, torch.float32, None, 512),
        (4096, 8192, torch.bfloat16, None, 512),
        (256, 8192, torch.float32, None, 128),
        (512, 500, torch.float32, None, 2098),
        (0, 8192, torch.float32, None, 128),
        (10**6, 151_936, torch.float32, None, 883),
        (4096, 8192, torch.float32, 1.0, 32),
        (4096, 8192, torch.float64, 1.0, 16),
        (4096, 8192, torch.float32, 1e-6, 1),
    ],
    ids=["eighth", "wide logits", "at least 4 MiB", "small", "none", "bounded", "MiB", "float64", "one row"],
)
def test_chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, chunk_mib: float | None, expected: int) -> None:
    assert chunk_rows(rows, torch.empty(vocabulary, 1, dtype=dtype), chunk_mib) == expected
