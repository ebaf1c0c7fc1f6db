"""Means of gradients over real processes: exact, sent while others are still computed, the same whatever is missing."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megaflow.parallel import mesh as meshes
from megaflow.parallel.recorder import Recorder
from megaflow.parallel.reduction import BUCKET, FLYING, Reduction, bucket_elements

WIDTH, LAYERS = 8, 6


def tower(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS)))


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def loss_of(network: nn.Module, rank: int) -> torch.Tensor:
    inputs = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return network(inputs).square().sum()


def largest_error(elements: int) -> float:
    """Of two steps, against the gradients of every process's rows computed here."""
    with meshes.join() as mesh:
        network, alone = tower(), tower()
        reduction = Reduction(network.parameters(), mesh.data, elements, lambda: True)
        worst = 0.0
        for _ in range(2):
            network.zero_grad()
            alone.zero_grad()
            loss_of(network, mesh.world.rank).backward()
            reduction.finish()
            (sum(loss_of(alone, rank) for rank in range(mesh.world.size)) / mesh.world.size).backward()
            worst = max(worst, *((a - b).abs().max().item() for a, b in zip(gradients(network), gradients(alone), strict=True)))
        return worst


@pytest.mark.parametrize("elements", [1, 100, 10**6])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_process_has_the_mean(ranks, size, elements):
    assert max(ranks(size, largest_error, elements)) < 1e-12


def progress(elements: int) -> tuple[int, int, int]:
    """(buckets, how many have left when the first layer's gradient comes, the last of all, and most that were on their way at once)."""
    with meshes.join() as mesh:
        network, left, flying = tower(), [], []
        network[0].weight.register_post_accumulate_grad_hook(lambda p: left.append(reduction.next))
        for p in network.parameters():
            p.register_post_accumulate_grad_hook(lambda p: flying.append(len(reduction.flying)))
        reduction = Reduction(network.parameters(), mesh.data, elements, lambda: True)
        loss_of(network, mesh.world.rank).backward()
        reduction.finish()
        return len(reduction.buckets), left[0], max(flying)


def test_buckets_leave_while_other_gradients_are_computed(ranks):
    layer = WIDTH * WIDTH + WIDTH
    for found in ranks(2, progress, layer):
        assert found == (LAYERS, LAYERS - 1, FLYING)


def unlike() -> tuple[list[list[float]], bool]:
    """Gradients where each process uses one of two parameters, in two steps, the second the other way round, and a third nobody uses."""
    with meshes.join() as mesh:
        first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
        reduction, found = Reduction([first, second, third], mesh.data, 1, lambda: True), []
        for step in range(2):
            for p in (first, second, third):
                p.grad = None
            own = (first, second)[(mesh.world.rank + step) % 2]
            (own * (4.0 + step)).sum().backward()
            reduction.finish()
            found.append([p.grad[0].item() for p in (first, second, third)])
        return found, not reduction.flying


def test_what_does_not_come_counts_as_zero_and_nobody_waits_for_it(ranks):
    assert ranks(2, unlike) == [([[2.0, 2.0, 0.0], [2.5, 2.5, 0.0]], True)] * 2


def alone_without_use() -> float:
    with meshes.gather() as mesh:
        p = nn.Parameter(torch.ones(2))
        Reduction([p], mesh.data, 10, lambda: True).finish()
        return p.grad.abs().sum().item()


def test_so_it_does_on_one_process():
    """Whose optimizer would leave a parameter without a gradient as it is, where those of several processes decay it."""
    assert alone_without_use() == 0.0


def passes() -> tuple[list[int], float]:
    """How many collectives there have been after each pass of three, of which the last is a step's last; the gradient in the end."""
    with meshes.join() as mesh, Recorder(mesh) as recorder:
        p, last, counts = nn.Parameter(torch.ones(1)), [False], []
        reduction = Reduction([p], mesh.data, 10, lambda: last[0])
        for index in range(3):
            last[0] = index == 2
            (p * (mesh.world.rank + index)).sum().backward()
            counts.append(len(recorder.sent))
        reduction.finish()
        return counts, p.grad.item()


def test_only_a_steps_last_pass_sends(ranks):
    assert ranks(2, passes) == [([0, 0, 1], 0.5 * (0 + 1 + 2 + 1 + 2 + 3))] * 2


def half() -> tuple[float, int]:
    with meshes.join() as mesh, Recorder(mesh) as recorder:
        p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        reduction = Reduction([p], mesh.data, 10, lambda: True)
        (p * (256.0 if mesh.world.rank == 0 else 1.0)).sum().backward()
        reduction.finish()
        return p.grad.item(), recorder.sent[0].size


def test_half_precision_is_summed_in_full(ranks):
    """256 + 1 + 1 + 1 is 256 in bf16, and its mean were 64."""
    assert ranks(4, half) == [(65.0, 4)] * 4


def closed() -> int:
    with meshes.join() as mesh:
        p = nn.Parameter(torch.ones(1))
        reduction = Reduction([p], mesh.data, 10, lambda: True)
        reduction.close()
        p.sum().backward()
        dist.barrier()
        return len(reduction.flying)


def test_closed_it_sends_nothing(ranks):
    assert ranks(2, closed) == [0, 0]


def test_many_processes_send_larger_buckets():
    assert bucket_elements(2) == BUCKET and bucket_elements(512) == 512_000_000
