"""Means of gradients over data-parallel processes, sent while the backward pass still computes others (Li et al. 2020, PyTorch DDP).

DeepSpeed does so under ZeRO 1 to 3, and without ZeRO sends only when the pass is over; this is for there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.parallel.mesh import Axis

BUCKET, BUCKET_SHARE = 40_000_000, 1_000_000
"""Elements of gradients that are sent at once: BUCKET, and for many processes BUCKET_SHARE for each, lest messages become short. They are
Megatron-LM's own figures (distributed_data_parallel_config.py); one bucket of everything would leave nothing to send meanwhile."""
FLYING = 2
"""Buckets on their way at once, at most: each is a copy in fp32."""


def bucket_elements(processes: int) -> int:
    return max(BUCKET, BUCKET_SHARE * processes)


class Reduction:
    """Hooks on parameters that put the mean over `axis` in place of each gradient.

    Buckets of `elements` numbers at most (or one parameter) are filled from the last parameter on, as a backward pass does, and leave in
    this order on every process, whatever the order in which its gradients come. A gradient that does not come counts as zero. Sums are in
    fp32 or the gradient's own precision if that is higher. last(): whether the present pass is a step's last, whose gradients are sent.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis, elements: int, last: Callable[[], bool]) -> None:
        self.axis, self.last = axis, last
        self.buckets: list[list[nn.Parameter]] = []
        room = 0
        for p in reversed(list(parameters)):
            if not self.buckets or p.numel() > room or p.dtype != self.buckets[-1][-1].dtype:
                self.buckets.append([])
                room = elements
            self.buckets[-1].append(p)
            room -= p.numel()
        self.place = {p: index for index, bucket in enumerate(self.buckets) for p in bucket}
        self.flying: list[tuple[Any, Tensor, list[nn.Parameter]]] = []
        self._await()
        self.handles = [p.register_post_accumulate_grad_hook(self._come) for p in self.place] if axis.size > 1 else []

    def _await(self) -> None:
        self.missing, self.next = [len(bucket) for bucket in self.buckets], 0

    def _come(self, p: Tensor) -> None:
        if not self.last():
            return
        self.missing[self.place[p]] -= 1  # type: ignore[index]
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self._send()

    def _send(self) -> None:
        if len(self.flying) == FLYING:
            self._take()
        bucket = self.buckets[self.next]
        self.next += 1
        flat = torch.zeros(
            sum(p.numel() for p in bucket), dtype=torch.promote_types(bucket[0].dtype, torch.float32), device=bucket[0].device
        )
        for part, p in zip(flat.split([p.numel() for p in bucket]), bucket, strict=True):
            if p.grad is not None:
                part.view_as(p).copy_(p.grad)
        self.flying.append((dist.all_reduce(flat, group=self.axis.group, async_op=True), flat, bucket))

    def _take(self) -> None:
        work, flat, bucket = self.flying.pop(0)
        work.wait()
        flat /= self.axis.size
        for part, p in zip(flat.split([p.numel() for p in bucket]), bucket, strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.copy_(part.view_as(p))

    def finish(self) -> None:
        """Send what has not left and wait for all of it. Every process of the axis calls it after a step's last backward pass."""
        for p in self.place if self.axis.size == 1 else ():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        while self.axis.size > 1 and self.next < len(self.buckets):
            self._send()
        while self.flying:
            self._take()
        self._await()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
