"""The attention adapter: every kernel computes the written-out form, with every mask, and a kernel that cannot run is refused."""

import math

import pytest
import torch

from megaflow.errors import UserError
from megaflow.model import attention
from megaflow.model.attention import attend, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, keys: torch.Tensor | None) -> torch.Tensor:
    """One query at a time, over the keys that it may see."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = torch.ones(k.shape[2], dtype=torch.bool) if keys is None else keys[row].clone()
            if causal:
                seen[k.shape[2] - q.shape[2] + i + 1 :] = False
            score = torch.einsum("hd,hkd->hk", q[row, :, i], k[row][:, seen]) / math.sqrt(q.shape[-1])
            out[row, :, i] = torch.einsum("hk,hkd->hd", torch.softmax(score, -1), v[row][:, seen])
    return out


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_kernels_agree_with_loops_over_queries(kernel, causal, masked, queries):
    """Fewer queries than keys: the queries are the last positions, as in decoding with a cache."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 7, 4, generator=generator, dtype=torch.float64)
    keys = torch.arange(7) < torch.tensor([[5], [7]]) if masked else None
    torch.testing.assert_close(attend(kernel, q, k, v, causal, keys), by_loops(q, k, v, causal, keys))


@pytest.mark.parametrize("kernel", ["plain", "sdpa"])
def test_gradients_agree(kernel):
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    keys = torch.tensor([[True, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda q, k, v: attend(kernel, q, k, v, False, keys), (q, k, v), fast_mode=True)


def test_the_plain_kernel_has_forward_mode_derivatives():
    generator = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 1, 2, 5, 4, generator=generator, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda x: attend("plain", x, x, x, causal=True), (x,), (tangent,))
    ahead, behind = (attend("plain", x + h * tangent, x + h * tangent, x + h * tangent, causal=True) for h in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_auto_chooses_what_can_run(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda: False)
    assert choose("auto", GPU, half=True) == "sdpa"
    monkeypatch.setattr(attention, "installed", lambda: True)
    assert choose("auto", GPU, half=True) == "flash"
    assert choose("auto", GPU, half=False) == choose("auto", CPU, half=True) == "sdpa"


@pytest.mark.parametrize("kernel", ["auto", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_flash_does_not_take_go_to_sdpa(monkeypatch, kernel, dtype):
    """A run that trained on flash is sampled from fp32 weights, and evaluated where there is no GPU."""
    monkeypatch.setattr(attention, "installed", lambda: True)
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(attend(kernel, x, x, x, causal=True), attend("sdpa", x, x, x, causal=True))


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_a_named_kernel_is_kept(kernel):
    assert choose(kernel, CPU, half=False) == kernel


def test_flash_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda: False)
    with pytest.raises(UserError, match=r"model.attention=flash needs a package flash-attn .*use auto or sdpa"):
        choose("flash", GPU, half=True)
    monkeypatch.setattr(attention, "installed", lambda: True)
    for device, half in ((CPU, True), (GPU, False)):
        with pytest.raises(UserError, match="needs a GPU with train.precision=bf16"):
            choose("flash", device, half)
    assert choose("flash", GPU, half=True) == "flash"
