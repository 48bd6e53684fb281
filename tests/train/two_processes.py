"""What two processes do together, one line of JSON from each: started by test_two_processes.py, on gloo.

Every scenario runs on both processes at once and returns what its process saw. Process 1 is the one with the trouble.
"""

import json
import os
import sys
import time
from datetime import timedelta
from unittest import mock

import masked_steps
import torch
import torch.distributed as dist
from train_steps import make_crops, make_step

from fastdino.errors import TrainingError
from fastdino.train import averaging, distributed


def weights(step):
    return torch.cat([p.detach().flatten() for network in (step.student, step.teacher) for p in network.parameters()])


def are_equal(x):
    """Whether a tensor has the same bits on both processes."""
    return bool(torch.equal(*distributed.gather(x)))


def fp16_with_an_infinity_on_one(rank):
    """The scaler skips the optimizer on both or on none."""
    step = make_step(amp_dtype=torch.float16, freeze_last_layer=0)
    scale = step.update.scaler.get_scale()
    before = torch.cat([p.detach().flatten() for p in step.student.parameters()])
    crops = make_crops(rank)
    if rank == 1:
        crops[0][0, 0, 0, 0] = float("inf")
    step(crops, 0)
    skipped = torch.equal(before, torch.cat([p.detach().flatten() for p in step.student.parameters()]))
    halved = step.update.scaler.get_scale() == scale / 2
    step.loss.center.zero_()  # the infinite logits went there
    for i in range(1, 12):  # until the scale is small enough for a gradient without overflow
        step(make_crops(10 * i + rank), i)
    return {
        "skipped": skipped,
        "halved": halved,
        "moved": not torch.equal(before, torch.cat([p.detach().flatten() for p in step.student.parameters()])),
        "equal": are_equal(weights(step)),
        "finite": bool(weights(step).isfinite().all()),
    }


def masked(centering, rank=None):
    """Some weights after six steps of DINOv2's recipe: a half of the batch on each process, or both on one."""
    options = {"dtype": torch.float64, "centering": centering, "koleo": 0.0}
    step = masked_steps.make_step(**options, **({"accumulate": 2} if rank is None else {}))
    for i in range(6):
        views = masked_steps.make_views(i, n_parts=2, dtype=torch.float64)
        step(views if rank is None else [view.chunk(2)[rank] for view in views], i)
    return weights(step)[::97].tolist()


def sinkhorn_over_both(rank):
    """KoLeo is each process's own, and left out."""
    return masked("sinkhorn", rank)


def centers_over_both(rank):
    return masked("center", rank)


def compile_that_fails_on(rank, error):
    def compile_(function, **_):
        def run(*args):
            if rank == 1:
                raise error
            return function(*args)

        return run

    return mock.patch.object(torch, "compile", compile_)


def compiler_missing_on_one(rank):
    """Both go on in eager, and both know why."""
    said = []
    with compile_that_fails_on(rank, RuntimeError("no compiler here")):
        step = make_step(mode="compiled", say=said.append)
        for i in range(3):
            step(make_crops(10 * rank + i), i)
    return {"mode": step.mode, "said": said, "equal": are_equal(weights(step))}


def memory_short_on_one(rank):
    """Both end, each with an error of its own; neither waits for the other."""
    with compile_that_fails_on(rank, torch.OutOfMemoryError("CUDA out of memory.")):
        step = make_step(mode="compiled", say=lambda _: None)
        try:
            step(make_crops(rank), 0)
        except (torch.OutOfMemoryError, TrainingError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def reductions_during_backward(rank):
    """What happens in which order, with buckets of one kilobyte."""
    events = []
    reduce, finish = averaging._Bucket.reduce, averaging.GradientAverager.finish

    def watched_reduce(self, op):
        events.append("reduce")
        return reduce(self, op)

    def watched_finish(self):
        events.append("finish")
        finish(self)

    with (
        mock.patch.object(averaging, "BUCKET_BYTES", 1024),
        mock.patch.object(averaging._Bucket, "reduce", watched_reduce),
        mock.patch.object(averaging.GradientAverager, "finish", watched_finish),
    ):
        step = make_step()
        first = next(iter(step.student.parameters()))  # its gradient comes last
        first.register_post_accumulate_grad_hook(lambda _: events.append("last gradient"))
        step(make_crops(rank), 0)
        equal = are_equal(weights(step))
    grads = [p.grad for p in step.student.parameters() if p.grad is not None]
    return {
        "before the last gradient": events.index("last gradient"),
        "all": events.count("reduce"),
        "equal": equal,
        "aligned": all(grad.data_ptr() % 16 == 0 for grad in grads),
    }


def a_long_evaluation(rank):
    """The others wait for rank 0 longer than a collective may take."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    if rank == 0:
        time.sleep(3)
    distributed.barrier()
    return {"waited": True}


SCENARIOS = [
    fp16_with_an_infinity_on_one,
    compiler_missing_on_one,
    memory_short_on_one,
    reductions_during_backward,
    sinkhorn_over_both,
    centers_over_both,
    a_long_evaluation,
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    process = distributed.start("cpu", sys.argv[1])
    seen = {scenario.__name__: scenario(process.rank) for scenario in SCENARIOS}
    distributed.stop()
    sys.stdout.write(json.dumps({"rank": process.rank, **seen}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # not a word from the interpreter's end between two lines of JSON
