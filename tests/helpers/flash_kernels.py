"""The flash kernels written out in plain torch, and what they demand of their arguments."""

import torch
from torch import Tensor


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) -> tuple[Tensor, Tensor]:
    _check(q, k, v, cu_q, cu_k, max_q, max_k, causal)
    out = torch.full_like(q, torch.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for rows, keys in _spans(cu_q, cu_k):
        scores = _scores(q[rows], k[keys], causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _repeated(v[keys], q))
    return out, lse


def varlen_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    """From p = exp(s - lse): d_s = p * (d_out v^T - rowsum(d_out * out))."""
    _check(q, k, v, cu_q, cu_k, max_q, max_k, causal)
    assert out.shape == d_out.shape == q.shape and d_out.stride(-1) == 1
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    d_q, d_k, d_v = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys in _spans(cu_q, cu_k):
        p = (_scores(q[rows], k[keys], causal, scale) - lse[:, rows, None]).exp()  # [H, n, m]
        d_p = torch.einsum("qhd,khd->hqk", d_out[rows], _repeated(v[keys], q))
        d_s = scale * p * (d_p - (d_out[rows] * out[rows]).sum(-1).T[..., None])
        d_q[rows] = torch.einsum("hqk,khd->qhd", d_s, _repeated(k[keys], q))
        d_k[keys] = _summed(torch.einsum("hqk,qhd->khd", d_s, q[rows]), k)
        d_v[keys] = _summed(torch.einsum("hqk,qhd->khd", p, d_out[rows]), v)
    return d_q, d_k, d_v


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = scale * torch.einsum("qhd,khd->hqk", q, _repeated(k, q))
    return scores + torch.full_like(scores[0], -torch.inf).triu(1) if causal else scores


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(1, (like.shape[1], -1)).sum(2)


def _spans(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    queries, keys = cu_q.tolist(), cu_k.tolist()
    return [(slice(*queries[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(queries) - 1)]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> None:
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert cu_q.shape == cu_k.shape and len(cu_q) > 1
    for cu, longest, rows in ((cu_q, max_q, q.shape[0]), (cu_k, max_k, k.shape[0])):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == rows
        assert cu.diff().min() > 0 and cu.diff().max() == longest
    assert not causal or torch.equal(cu_q, cu_k)
    for x in (q, k, v):
        offsets = (*x.stride()[:-1], x.storage_offset())
        assert x.stride(-1) == 1 and all(offset % 8 == 0 for offset in offsets), "16 bytes at a time"
