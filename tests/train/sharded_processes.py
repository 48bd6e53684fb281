"""What processes with networks in parts compute: started by test_fsdp.py, on gloo. Process 0 tells it.

Every scenario is a step of DINOv2's recipe in fp64 unless it says otherwise, a part of the batch on each process.
"""

import json
import sys

import masked_steps
import torch

from fastdino.train import distributed
from fastdino.train.sharding import gather_into, local, shard

N_STEPS = {2: 5, 4: 3}  # by processes, which share two cores
SCENARIOS = {
    "center": {"centering": "center"},
    "sinkhorn": {"centering": "sinkhorn"},
    "dinov3": {"recipe": "dinov3"},
    "checkpointing": {"checkpointing": True},
    "gram": {"recipe": "dinov3", "gram": True},
}
ON_FOUR = "sinkhorn", "gram"  # what of them four processes do


def steps(options, processes, process=None):
    """A step after some iterations: in parts on a process, or in one piece that sees the parts of all, one by one."""
    options = {"dtype": torch.float64, "koleo": 0.0, **options}  # KoLeo is each process's own
    networks = masked_steps.make_networks(**options)
    networks[1].requires_grad_(False)
    if rope := networks[0].backbone.rope_embed:
        rope.eval()  # each process draws positions of its own
    for network in networks[:2] if process else ():
        shard(network.double(), process, None)
    step = masked_steps.make_step(**options, networks=networks, **({} if process else {"accumulate": processes}))
    if gram_teacher := step.loss.gram_teacher:
        gram_teacher.first_update, gram_teacher.update_every, gram_teacher.max_updates = 2, 2, 2
    for i in range(N_STEPS[processes]):
        views = masked_steps.make_views(i, n_parts=processes, dtype=torch.float64)
        metrics = step([view.chunk(processes)[process.rank] for view in views] if process else views, i)
    return step, metrics


def weights(step):
    """Of student, teacher and Gram teacher."""
    found = []
    for network in (step.student, step.teacher, *filter(None, [step.loss.gram_teacher])):
        whole = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in network.state_dict().items()}
        holder = torch.nn.Module()
        holder.state_dict = lambda whole=whole: whole
        gather_into(network, holder)
        found += [x.double().flatten() for x in whole.values()]
    return torch.cat(found)


def scenario(name, process):
    step, metrics = steps(SCENARIOS[name], process.world_size, process)
    params = list(step.student.parameters())
    share = sum(local(p).numel() for p in params) / sum(p.numel() for p in params)
    return {"weights": weights(step)[::97].tolist(), "grad_norm": float(metrics.grad_norm), "share": share}


def in_bf16(process):
    """Three steps on copies in bf16: what masters, features and gradients are."""
    networks = masked_steps.make_networks("dinov3")
    networks[1].requires_grad_(False)
    for network in networks[:2]:
        shard(network, process, torch.bfloat16)
    step = masked_steps.make_step("dinov3", networks=networks, koleo=0.0, amp_dtype=torch.bfloat16)
    kinds = {}
    evaluate = step.loss.evaluate

    def watched(learned, *others):
        kinds.update(cls=str(learned.cls.dtype), logits=str(learned.logits.dtype))
        return evaluate(learned, *others)

    step.loss.evaluate = watched
    views = [masked_steps.make_views(i, n_parts=process.world_size) for i in range(3)]
    losses = [float(step([v.chunk(process.world_size)[process.rank] for v in x], i).loss) for i, x in enumerate(views)]
    param = next(step.student.parameters())
    gathered = [sum(both) / len(both) for both in zip(*distributed.gather(losses))]
    return kinds | {"master": str(param.dtype), "grad": str(param.grad.dtype), "losses": gathered}


if __name__ == "__main__":
    torch.set_num_threads(1)
    process = distributed.start("cpu", sys.argv[1])
    on_two = process.world_size == 2
    seen = {name: scenario(name, process) for name in (SCENARIOS if on_two else ON_FOUR)}
    if on_two:
        seen["bf16"] = in_bf16(process)
    distributed.stop()
    if process.is_main:
        sys.stdout.write(json.dumps(seen) + "\n")
