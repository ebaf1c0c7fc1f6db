"""The attention adapter: every kernel computes the written-out form, with every mask and cap, and a kernel that cannot run is refused.

What flash-attn is handed is checked on a CPU by its documented contract, written out here; its own kernels on a GPU.
"""

import importlib.metadata
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from megaflow.errors import UserError
from megaflow.model import attention
from megaflow.model.attention import attend, choose, pack, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = torch.tensor([5, 7, 1])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 4, 4, 5], [2, 2, 2, 2, 2, 2, 2]])
KEYS = torch.arange(7) < LENGTHS[:, None]
APART = {  # what keeps the positions of three rows of seven apart
    "nothing": (None, None),
    "lengths": (KEYS, None),
    "documents": (None, DOCUMENTS),
    "lengths and documents": (KEYS, DOCUMENTS),
}
every_mask = pytest.mark.parametrize("apart", APART)
every_order = pytest.mark.parametrize("causal", [False, True])


def inputs(queries: int = 7, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q (3, 2, queries, 4), k and v (3, 2, 7, 4); scores reach about 10."""
    generator = torch.Generator().manual_seed(0)
    return [(2.0 * torch.randn(3, 2, length, 4, generator=generator, dtype=torch.float64)).to(dtype) for length in (queries, 7, 7)]


def counted(apart: str, queries: int = 7) -> torch.Tensor:
    """(3, queries) bool: queries that are not padding. Out of (B, H, L, d_head) they are taken as x.transpose(1, 2)[counted]."""
    keys = APART[apart][0]
    return torch.ones(3, queries, dtype=torch.bool) if keys is None else keys[:, 7 - queries :]


def by_loops(q, k, v, causal=False, keys=None, documents=None, cap=0.0):
    """One query at a time, over the keys that it may see; zeros for padding."""
    out, past = torch.zeros_like(q), k.shape[2] - q.shape[2]
    for row in range(q.shape[0]):
        for i in range(past, k.shape[2]):
            if keys is not None and not keys[row, i]:
                continue
            seen = torch.ones(k.shape[2], dtype=torch.bool) if keys is None else keys[row].clone()
            if documents is not None:
                seen &= documents[row] == documents[row, i]
            if causal:
                seen[i + 1 :] = False
            score = torch.einsum("hd,hkd->hk", q[row, :, i - past], k[row][:, seen]) / math.sqrt(q.shape[-1])
            score = cap * torch.tanh(score / cap) if cap else score
            out[row, :, i - past] = torch.einsum("hk,hkd->hd", torch.softmax(score, -1), v[row][:, seen])
    return out


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
@every_order
@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_kernels_agree_with_loops_over_queries(kernel, causal, apart, cap, queries):
    """Fewer queries than keys: the queries are the last positions, as in decoding with a cache."""
    q, k, v = inputs(queries)
    out, expected, real = (
        attend(kernel, q, k, v, causal, *APART[apart], cap),
        by_loops(q, k, v, causal, *APART[apart], cap),
        counted(apart, queries),
    )
    torch.testing.assert_close(out.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert out.isfinite().all()


def test_a_cap_bounds_what_a_score_can_do():
    q, k, v = inputs()
    free, loose, tight = (attend("plain", q, k, v, cap=cap) for cap in (0.0, 1e4, 1e-9))
    torch.testing.assert_close(loose, free, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tight, v.mean(2, keepdim=True).expand_as(v))
    assert (attend("plain", q, k, v, cap=3.0) - free).abs().max() > 0.1


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
@every_order
@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_gradients_agree_and_padding_gets_none(kernel, causal, apart, cap):
    arguments, real = [x.requires_grad_() for x in inputs()], counted(apart)

    def f(q, k, v):
        return attend(kernel, q, k, v, causal, *APART[apart], cap).transpose(1, 2)[real]

    assert torch.autograd.gradcheck(f, arguments, fast_mode=True)
    f(*arguments).square().sum().backward()
    for x in arguments:
        assert x.grad.transpose(1, 2)[~real].eq(0).all()
        assert x.grad.isfinite().all()


@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_plain_kernel_has_forward_mode_derivatives_and_their_gradient(apart, cap):
    x, tangent = inputs()[:2]

    def f(x):
        return attend("plain", x, x, x, True, *APART[apart], cap)

    _, slope = torch.func.jvp(f, (x,), (tangent,))
    torch.testing.assert_close(slope, (f(x + 1e-6 * tangent) - f(x - 1e-6 * tangent)) / 2e-6, rtol=1e-6, atol=1e-6)

    def size_of_slope(x):
        return torch.func.jvp(f, (x,), (tangent,))[1].square().sum()

    along = (torch.func.grad(size_of_slope)(x) * tangent).sum()
    ahead, behind = size_of_slope(x + 1e-5 * tangent), size_of_slope(x - 1e-5 * tangent)
    torch.testing.assert_close(along, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


@every_order
@every_mask
def test_capped_scores_are_taken_in_chunks_and_none_is_kept(monkeypatch, causal, apart):
    """Four queries a chunk, then three: as many as go into the budget of scores. What stays for the backward pass is no score."""
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", 4 * 7 * 6)
    sizes, kept, written_out = [], [], attention._written_out

    def measured(q, k, v, seen, cap):
        sizes.append((q.shape[2], k.shape[2]))
        return written_out(q, k, v, seen, cap)

    monkeypatch.setattr(attention, "_written_out", measured)
    q, k, v = (x.requires_grad_() for x in inputs())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend("sdpa", q, k, v, causal, *APART[apart], cap=3.0)
    assert sizes == ([(4, 4), (3, 7)] if causal and apart == "nothing" else [(4, 7), (3, 7)])
    assert not any(x.is_floating_point() and x.shape[-1] == 7 for x in kept)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    whole = torch.autograd.grad(attend("plain", q, k, v, causal, *APART[apart], cap=3.0).square().sum(), (q, k, v))
    torch.testing.assert_close(grads, whole)


def test_half_precision_caps_scores_of_full_precision():
    """A score rounded to bf16 before the cap would be off by a hundredth."""
    q, k, v = inputs(dtype=torch.bfloat16)
    out = attend("sdpa", q, k, v, cap=3.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend("plain", q.float(), k.float(), v.float(), cap=3.0).bfloat16())


@every_order
def test_without_masks_and_caps_it_is_one_call_of_sdpa(causal):
    q, k, v = inputs(dtype=torch.float32)
    assert torch.equal(attend("sdpa", q, k, v, causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def test_a_prepared_function_serves_any_number_of_heads():
    """Each process of a tensor-parallel group has some of them."""
    q, k, v = inputs()
    f = prepare("sdpa", torch.empty(3, 7, 8, dtype=torch.float64), 4, True, *APART["lengths and documents"], 3.0)
    whole = f(q, k, v)
    torch.testing.assert_close(torch.cat([f(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(2)], 1), whole)


class FlashAttention:
    """The contract of flash_attn 2.7 for the arguments that are used here, from its docstrings, in any precision."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        """q: (batch_size, seqlen, nheads, headdim); k, v likewise."""
        self.calls.append("full")
        return by_loops(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, cap=softcap).transpose(1, 2)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        """q: (total_q, nheads, headdim); k, v: (total_k, nheads, headdim); cu_seqlens: (batch_size + 1,) int32; max_seqlen: int.

        "If causal=True, the causal mask is aligned to the bottom right corner of the attention matrix." """
        self.calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_k.shape
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        query, key = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert query[0] == key[0] == 0 and query[-1] == len(q) and key[-1] == len(k) == len(v)
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        parts = []
        for i in range(len(query) - 1):
            some = q[query[i] : query[i + 1]], k[key[i] : key[i + 1]], v[key[i] : key[i + 1]]
            assert len(some[1]) > 0
            parts.append(by_loops(*(x.transpose(0, 1)[None] for x in some), causal=causal, cap=softcap)[0].transpose(0, 1))
        return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    """Flash is chosen, and is the contract above."""
    contract = FlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", contract)
    monkeypatch.setattr(attention, "choose", lambda *_: "flash")
    return contract


@every_order
@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_flash_has_the_right_positions_in_the_right_places(flash, causal, apart, cap, queries):
    (q, k, v), real = (x.requires_grad_() for x in inputs(queries)), counted(apart, queries)
    found, expected = (attend(kernel, q, k, v, causal, *APART[apart], cap) for kernel in ("flash", "plain"))
    assert flash.calls == ["full" if apart == "nothing" else "varlen"]
    torch.testing.assert_close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert found.transpose(1, 2)[~real].eq(0).all()
    grads, whole = (torch.autograd.grad(out.transpose(1, 2)[real].square().sum(), (q, k, v)) for out in (found, expected))
    torch.testing.assert_close(grads, whole)


def test_packed_sequences_are_documents_without_their_padding():
    packed = pack(3, 7, 0, KEYS, DOCUMENTS)
    assert packed.key_ends.tolist() == [0, 2, 5, 6, 9, 11, 12, 13]
    assert packed.keys.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]
    assert packed.longest_key == packed.longest_query == 3
    assert packed.queries.tolist() == packed.keys.tolist() and packed.query_ends.tolist() == packed.key_ends.tolist()


def test_rows_without_padding_are_packed_as_they_lie():
    packed = pack(3, 7, 0, None, DOCUMENTS)
    assert packed.queries is None and packed.keys is None
    assert packed.key_ends.tolist() == [0, 2, 5, 7, 8, 11, 13, 14, 21] and packed.longest_key == 7


def test_packed_queries_are_the_last_positions():
    packed = pack(3, 7, 4, KEYS, None)
    assert packed.key_ends.tolist() == [0, 5, 12, 13] and packed.query_ends.tolist() == [0, 1, 4, 4]
    assert packed.queries.tolist() == [0, 3, 4, 5] and (packed.longest_query, packed.longest_key) == (3, 7)


def test_auto_chooses_what_can_run(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda: False)
    assert choose("auto", GPU, half=True) == "sdpa"
    monkeypatch.setattr(attention, "installed", lambda: True)
    monkeypatch.setattr(attention, "capable", lambda device: True)
    assert choose("auto", GPU, half=True) == choose("auto", GPU, half=True, head_dim=256) == "flash"
    assert choose("auto", GPU, half=False) == choose("auto", CPU, half=True) == choose("auto", GPU, half=True, head_dim=264) == "sdpa"
    monkeypatch.setattr(attention, "capable", lambda device: False)
    assert choose("auto", GPU, half=True) == "sdpa"


@pytest.mark.parametrize("kernel", ["auto", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_flash_does_not_take_go_to_sdpa(monkeypatch, kernel, dtype):
    """A run that trained on flash is sampled from fp32 weights, and evaluated where there is no GPU."""
    monkeypatch.setattr(attention, "installed", lambda: True)
    q, k, v = inputs(dtype=dtype)
    assert torch.equal(attend(kernel, q, k, v, causal=True), attend("sdpa", q, k, v, causal=True))


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_a_named_kernel_is_kept(kernel):
    assert choose(kernel, CPU, half=False) == kernel


def test_flash_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda: False)
    with pytest.raises(UserError, match=r"model.attention=flash needs the package flash-attn, 2.7 or later .*use auto or sdpa"):
        choose("flash", GPU, half=True)
    monkeypatch.setattr(attention, "installed", lambda: True)
    for device, half in ((CPU, True), (GPU, False)):
        with pytest.raises(UserError, match="needs a GPU with train.precision=bf16"):
            choose("flash", device, half)
    monkeypatch.setattr(attention, "capable", lambda device: False)
    with pytest.raises(UserError, match="compute capability 8.0"):
        choose("flash", GPU, half=True)
    monkeypatch.setattr(attention, "capable", lambda device: True)
    with pytest.raises(UserError, match="256 dimensions at most, not model.hidden / model.heads = 320"):
        choose("flash", GPU, half=True, head_dim=320)
    assert choose("flash", GPU, half=True) == "flash"


@pytest.mark.parametrize(("version", "usable"), [("2.7.4.post1", True), ("2.8.0", True), ("2.5.9", False), (None, False)])
def test_flash_attn_of_the_right_version_counts(monkeypatch, version, usable):
    def find(name: str) -> str:
        if name != "flash-attn" or version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    attention.installed.cache_clear()
    try:
        assert attention.installed() == usable
    finally:
        attention.installed.cache_clear()


def test_old_gpus_have_no_kernels(monkeypatch):
    for capability, able in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_capability=lambda device, found=capability: found))
        assert attention.capable.__wrapped__(GPU) == able


def on_gpu(kernel: str, dtype: torch.dtype, causal: bool, apart: str, cap: float, queries: int = 200) -> list[torch.Tensor]:
    """Result of three rows of 200 positions in heads of 64, and gradients by q, k and v, without those of padding; in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, length, 64, generator=generator).bfloat16().to(GPU, dtype) for length in (queries, 200, 200))
    q, k, v = ((2.0 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_())
    lengths = torch.tensor([130, 200, 1])
    keys = (torch.arange(200) < lengths[:, None]).to(GPU) if "lengths" in apart else None
    documents = torch.searchsorted(torch.tensor([17, 64, 131]), torch.arange(200), right=True).expand(3, -1).to(GPU)
    out = attend(kernel, q, k, v, causal, keys, documents if "documents" in apart else None, cap)
    assert out.isfinite().all()
    real = torch.ones(3, queries, dtype=torch.bool, device=GPU) if keys is None else keys[:, 200 - queries :]
    out = out.transpose(1, 2)[real]
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    return [x.detach().float().cpu() for x in (out, *grads)]


def close_in_bf16(found: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """A hundredth of the largest value: three bits more than what bf16 rounds to."""
    for x, y in zip(found, exact, strict=True):
        assert (x - y).abs().max() <= 0.01 * y.abs().max() + 1e-6


@pytest.mark.cuda
@every_order
@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("queries", [200, 3])
def test_flash_on_a_gpu_is_the_written_out_form(causal, apart, cap, queries):
    pytest.importorskip("flash_attn", reason="needs flash-attn (pip install -e .[flash])")
    assert choose("auto", GPU, half=True, head_dim=64) == "flash"
    exact = on_gpu("plain", torch.float32, causal, apart, cap, queries)
    close_in_bf16(on_gpu("flash", torch.bfloat16, causal, apart, cap, queries), exact)


@pytest.mark.cuda
@every_order
@every_mask
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_sdpa_on_a_gpu_is_the_written_out_form(causal, apart, cap):
    exact = on_gpu("plain", torch.float32, causal, apart, cap)
    close_in_bf16(on_gpu("sdpa", torch.bfloat16, causal, apart, cap), exact)
