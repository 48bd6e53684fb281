"""Gradients averaged over processes while the backward pass still goes on.

Each bucket is one flat tensor. When the gradients of its parameters are there, they are copied into it, become views of
it, and are reduced by one collective; the optimizer reads them where they lie. All of it can be captured in a CUDA
graph.

Not DistributedDataParallel: its reducer belongs to the forward pass of a wrapped module, and here half of the
parameters are copies that an optimizer owns. A backward pass that is compiled as one graph gives all gradients at its
end, so then the buckets overlap with each other only.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastdino.train.sharding import is_in_parts

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's
ALIGNMENT = 16  # bytes: each gradient begins where the optimizer's kernel can load 128 bits


class _Bucket:
    """Parameters of one dtype whose gradients lie in one flat tensor."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        per_step = ALIGNMENT // params[0].element_size()
        sizes = [-(-p.numel() // per_step) * per_step for p in params]
        self.flat = torch.zeros(sum(sizes), dtype=params[0].dtype, device=params[0].device)
        self.views = [part[: p.numel()].view_as(p) for p, part in zip(params, self.flat.split(sizes))]
        self.n_ready = 0

    def reduce(self, op: dist.ReduceOp.RedOpType) -> dist.Work:
        """Collect the gradients and begin to reduce them. A parameter without one takes part with zeros."""
        missing, filled, grads = [], [], []
        for p, view in zip(self.params, self.views):
            if p.grad is None:
                missing.append(view)
            else:
                filled.append(view)
                grads.append(p.grad)
                p.grad = view
        if missing:
            torch._foreach_zero_(missing)
        if filled:
            torch._foreach_copy_(filled, grads)
        return dist.all_reduce(self.flat, op=op, async_op=True)


class GradientAverager:
    """Means over all processes of the gradients of `params`, in place.

    Where there is one process it does nothing. overlap: reduce a bucket as soon as a backward pass has filled it; for
    gradients that several backward passes add up to, False.
    """

    def __init__(self, params: Iterable[Tensor], overlap: bool = True) -> None:
        self.buckets: list[_Bucket] = []
        self._overlaps = overlap
        self._works: list[dist.Work] = []  # of the buckets that are being reduced: on all processes the first ones
        self._hooks: list[RemovableHandle] = []
        if not dist.is_initialized():
            return
        # NCCL divides as it adds; gloo cannot.
        self._divides = dist.get_backend() != "nccl"
        self._op = dist.ReduceOp.SUM if self._divides else dist.ReduceOp.AVG
        pending: dict[torch.dtype, list[Tensor]] = {}
        # FSDP averages those of networks in parts. Reversed, because that is about the order in which gradients come.
        for p in reversed([p for p in params if p.requires_grad and not is_in_parts(p)]):
            group = pending.setdefault(p.dtype, [])
            group.append(p)
            if sum(x.numel() * x.element_size() for x in group) >= BUCKET_BYTES:
                self.buckets.append(_Bucket(pending.pop(p.dtype)))
        self.buckets += [_Bucket(group) for group in pending.values()]
        for bucket in self.buckets if overlap else ():
            for p in bucket.params:
                self._hooks.append(p.register_post_accumulate_grad_hook(lambda _, b=bucket: self._arrived(b)))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a backward pass starts no collective: what it leaves is reduced by `finish`."""
        overlaps, self._overlaps = self._overlaps, False
        try:
            yield
        finally:
            self._overlaps = overlaps

    def _arrived(self, bucket: _Bucket) -> None:
        if not self._overlaps:
            return
        bucket.n_ready += 1
        for following in self.buckets[len(self._works) :]:
            if following.n_ready < len(following.params):
                return
            self._works.append(following.reduce(self._op))

    def finish(self) -> None:
        """Reduce what is left; afterwards every gradient is the mean. The host does not wait for a GPU."""
        self._works += [bucket.reduce(self._op) for bucket in self.buckets[len(self._works) :]]
        for bucket, work in zip(self.buckets, self._works):
            work.wait()
            bucket.n_ready = 0
            if self._divides:
                bucket.flat /= dist.get_world_size()
        self._works.clear()

    def close(self) -> None:
        """Leave the parameters alone from here on."""
        for hook in self._hooks:
            hook.remove()
