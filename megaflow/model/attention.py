"""Attention behind one adapter: `choose` says before a run which kernel it will have, `attend` calls it.

flash   flash-attn, where it is installed and the tensors are half precision on a GPU; a run that trains so is sampled, distilled and
        evaluated from fp32 weights, where the same network takes sdpa
sdpa    torch.nn.functional.scaled_dot_product_attention
plain   softmax(q k^T / sqrt(d)) v written out: the oracle, and the form that has forward-mode derivatives
"""

import functools
import importlib.util
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.errors import UserError


@functools.cache
def installed() -> bool:
    """Whether flash-attn is there."""
    return importlib.util.find_spec("flash_attn") is not None


def choose(kernel: str, device: torch.device, half: bool) -> str:
    """The kernel that `auto` stands for here, or the named one. Raises UserError where flash was asked for and cannot run."""
    usable = installed() and device.type == "cuda" and half
    if kernel == "flash" and not usable:
        missing = "package flash-attn (pip install -e .[flash])" if not installed() else "GPU with train.precision=bf16"
        raise UserError(f"model.attention=flash needs a {missing}, which is not here; use auto or sdpa")
    if kernel == "auto":
        return "flash" if usable else "sdpa"
    return kernel


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, keys: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d_head)) v.

    q: (B, H, L, d_head); k, v: (B, H, K, d_head), K >= L; causal aligns the last query with the last key. keys: (B, K) bool, True
    where a key may be seen. Returns (B, H, L, d_head). kernel: 'auto' and 'flash' are flash-attn for tensors that it takes (half
    precision, on a GPU, no `keys`), else sdpa.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    if kernel in ("auto", "flash") and keys is None and q.is_cuda and half and installed():
        from flash_attn import flash_attn_func

        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return out.transpose(1, 2)
    mask = None if keys is None else keys[:, None, None, :]
    if causal and (keys is not None or q.shape[2] != k.shape[2]):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mask, causal = seen if mask is None else seen & mask, False
    if kernel != "plain":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1) @ v
