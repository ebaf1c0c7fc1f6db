"""Attention behind one adapter: `choose` says before a run which kernel it will have, `prepare` makes the function that the blocks call.

flash   flash-attn (Dao 2023), where it is installed, for half precision on a GPU; a run that trains so is sampled, distilled and
        evaluated from fp32 weights, where the same network takes sdpa
sdpa    torch.nn.functional.scaled_dot_product_attention
plain   softmax(q k^T / sqrt(d)) v written out: the oracle, and the form that has forward-mode derivatives

Which keys a query sees is the same for every block and head of a pass, so it is worked out once a pass: a boolean mask, or for flash the
borders of sequences. Where documents or rows of different length keep positions apart, flash has them end to end without padding, and
computes no score between two of them.

Scores are soft-capped by the kernel in flash. SDPA has no such option: there the form is written out for chunks of queries, whose scores
are computed again in the backward pass, so that no (L, K) tensor is kept. torch's flex_attention would fuse it, but holds all scores
unless it is compiled, and compiled it has no backward pass on a CPU and needs a compiler on every machine.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megaflow.errors import UserError
from megaflow.flow.channel import CHUNK_ELEMENTS

FLASH_HEAD_DIM = 256
"""Most dimensions of a head that flash-attn takes."""
FLASH_CAPABILITY = (8, 0)
"""Oldest GPUs that flash-attn runs on, by compute capability: Ampere."""


@functools.cache
def installed() -> bool:
    """Whether flash-attn is there, 2.7 or later. Asked of the package: that of flash-attn-4 has a folder of the same name, and not its
    functions."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 7)


@functools.cache
def capable(device: torch.device) -> bool:
    """Whether flash-attn has kernels for this GPU."""
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def choose(kernel: str, device: torch.device, half: bool, head_dim: int = FLASH_HEAD_DIM) -> str:
    """The kernel that `auto` stands for here, or the named one, for heads of so many dimensions.

    Raises UserError where flash was asked for and cannot run.
    """
    missing = None
    if not installed():
        missing = "needs the package flash-attn, 2.7 or later (pip install -e .[flash]), which is not here"
    elif not half or device.type != "cuda":
        missing = "needs a GPU with train.precision=bf16, which is not here"
    elif not capable(device):
        missing = "needs a GPU of compute capability 8.0 or later, which this one has not"
    elif head_dim > FLASH_HEAD_DIM:
        missing = f"takes heads of {FLASH_HEAD_DIM} dimensions at most, not model.hidden / model.heads = {head_dim}"
    if kernel == "flash" and missing:
        raise UserError(f"model.attention=flash {missing}; use auto or sdpa")
    if kernel == "auto":
        return "sdpa" if missing else "flash"
    return kernel


def prepare(
    kernel: str,
    x: Tensor,
    head_dim: int,
    causal: bool = False,
    keys: Tensor | None = None,
    documents: Tensor | None = None,
    cap: float = 0.0,
    past: int = 0,
    length: int | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function (q, k, v) -> softmax(q k^T / sqrt(d_head)) v, made once for all blocks of a forward pass.

    q: (B, H, L, d_head); k, v: (B, H, K, d_head); the result (B, H, L, d_head). H is any number of heads.

    x: what enters the blocks, (B, L, …), of the type and on the device that q, k and v will have; length: L, where x has only some of the
    positions (sequence parallelism). past: K - L, positions before the
    queries (decoding with a cache). causal: no query sees a later position. keys: (B, K) bool, False for padding, which no query sees;
    a row has one True at least. documents: (B, K) integers, ascending within a row, equal where two positions may see each other.
    cap: scores are cap tanh(score / cap); 0 leaves them as they are. kernel: 'auto' and 'flash' are flash-attn for tensors that it
    takes (half precision, on a GPU, heads of at most 256 dimensions), else sdpa.

    Queries of padding give finite values that mean nothing.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    length = x.shape[1] if length is None else length
    if kernel in ("auto", "flash"):
        kernel = choose("auto", x.device, half, head_dim)
    if kernel == "flash":
        if keys is None and documents is None:
            return functools.partial(_flash, causal=causal, cap=cap)
        return functools.partial(_flash_packed, causal=causal, cap=cap, packed=pack(len(x), length + past, past, keys, documents))
    if kernel == "plain":
        return functools.partial(_written_out, seen=mask(length, causal, keys, documents, past, x.device), cap=cap)
    square = causal and keys is None and documents is None and past == 0  # SDPA knows this mask by itself
    seen = None if square else mask(length, causal, keys, documents, past, x.device)
    if cap:
        return functools.partial(_in_chunks, seen=seen, causal=square, cap=cap)
    return functools.partial(F.scaled_dot_product_attention, attn_mask=seen, is_causal=square)


def attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    keys: Tensor | None = None,
    documents: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """`prepare` and its function at once, for a single use; the queries are the last positions of the keys."""
    past = k.shape[2] - q.shape[2]
    return prepare(kernel, q.transpose(1, 2), q.shape[-1], causal, keys, documents, cap, past)(q, k, v)


def mask(length: int, causal: bool, keys: Tensor | None, documents: Tensor | None, past: int, device: torch.device) -> Tensor | None:
    """True where one of `length` queries sees a key, broadcast over (B, H, L, K); None where all are seen. The rest as in `prepare`."""
    seen = _behind(length, past, device) if causal else None
    if documents is not None:
        same = (documents[:, past:, None] == documents[:, None, :])[:, None]
        seen = same if seen is None else same & seen
    if keys is None:
        return seen
    if seen is None:
        return keys[:, None, None, :]
    itself = torch.eye(length + past, dtype=torch.bool, device=device)[past:]
    return seen & keys[:, None, None, :] | itself  # padding might see nothing else, and a softmax over nothing is NaN


def _behind(length: int, past: int, device: torch.device) -> Tensor:
    """(L, K) bool, True where a key is not later than the query."""
    return torch.ones(length, length + past, dtype=torch.bool, device=device).tril(past)


def _written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, cap: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1) @ v


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, cap: float) -> Tensor:
    """The written-out form for some queries after others, in fp32 at least, as the kernels of SDPA have their scores.

    A chunk's scores are not kept for the backward pass. With `causal` and no mask a chunk reads no key after its last query.
    """
    wide = torch.promote_types(q.dtype, torch.float32)

    def some(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        return _written_out(q.to(wide), k.to(wide), v.to(wide), seen, cap).to(v.dtype)

    length = q.shape[2]
    size = max(1, CHUNK_ELEMENTS[q.device.type] // (q.shape[0] * q.shape[1] * k.shape[2]))
    done = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = stop if causal else k.shape[2]
        part = _behind(stop - start, start, q.device) if causal else seen
        if not causal and seen is not None and seen.shape[-2] > 1:
            part = seen[..., start:stop, :]
        at = q[:, :, start:stop], k[:, :, :last], v[:, :, :last], part
        done.append(checkpoint(some, *at, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(done, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, cap: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal, softcap=cap).transpose(1, 2)


class Packed(NamedTuple):
    """Sequences end to end, as flash_attn_varlen_func takes them; each is what of a document in a row is not padding.

    queries, keys: which of the (B L) queries and (B K) keys are there, in order, None where all are; query_ends, key_ends:
    (sequences + 1,) int32, 0 and where each sequence ends; longest_query, longest_key: positions of the longest.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def pack(rows: int, length: int, past: int, keys: Tensor | None, documents: Tensor | None) -> Packed:
    """Sequences of `rows` rows of `length` = K keys, whose queries are those after the first `past`; keys and documents as in `prepare`.

    Waits for the device: how many sequences there are is a number of this process. flash-attn aligns the last query of a sequence
    with its last key, and so do the sequences here.
    """
    given = keys if keys is not None else documents
    assert given is not None
    every = torch.arange(rows * length, device=given.device)
    there = every if keys is None else keys.flatten().nonzero()[:, 0]
    row, place = there // length, there % length
    begins = torch.ones_like(there, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    if documents is not None:
        document = documents.flatten()[there]
        begins[1:] |= document[1:] != document[:-1]
    key_ends = F.pad(begins.nonzero()[:, 0], (0, 1), value=len(there))
    asks = place >= past
    query_ends = F.pad(asks.cumsum(0), (1, 0))[key_ends]
    longest_query, longest_key = torch.stack([query_ends.diff().max(), key_ends.diff().max()]).tolist()
    queries = None if keys is None else (row * (length - past) + place - past)[asks]
    return Packed(queries, None if keys is None else there, query_ends.int(), key_ends.int(), longest_query, longest_key)


def _flash_packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, cap: float, packed: Packed) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    def flat(x: Tensor, places: Tensor | None) -> Tensor:
        """(B, H, L, d_head) to (positions, H, d_head). index_select: the backward pass of x[places] would sort them."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if places is None else x.index_select(0, places)

    batch, heads, length, _ = q.shape
    ends = packed.query_ends, packed.key_ends, packed.longest_query, packed.longest_key
    some = flat(q, packed.queries), flat(k, packed.keys), flat(v, packed.keys)
    out = flash_attn_varlen_func(*some, *ends, causal=causal, softcap=cap)
    if packed.queries is not None:
        out = out.new_zeros(batch * length, heads, out.shape[-1]).index_copy(0, packed.queries, out)
    return out.view(batch, length, heads, -1).transpose(1, 2)
