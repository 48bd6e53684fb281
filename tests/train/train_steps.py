"""A step of a tiny network, for tests of the step."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino import DINOHead, DINOLoss, MultiCropWrapper, VisionTransformer
from fastdino.train.config import TrainConfig
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

N_LOCAL, BATCH, NITER = 3, 4, 4


class CountOps(TorchDispatchMode):
    """How many operations reach the device."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def make_networks(drop_path_rate=0.0, use_bn=False, checkpointing=False, drop_path_mode="sample", **_):
    backbone = VisionTransformer(
        [32], 8, embed_dim=32, depth=2, num_heads=2, drop_path_rate=drop_path_rate, checkpointing=checkpointing,
        drop_path_mode=drop_path_mode,
    )  # fmt: skip
    return MultiCropWrapper(backbone, DINOHead(32, 48, use_bn=use_bn, hidden_dim=24, bottleneck_dim=16))


def recreated(network, device):
    """The network with new tensors on the device, which has no values to copy from."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
    return network


def make_step(device="cpu", networks=None, **options):
    torch.manual_seed(0)
    if networks is None:
        student = make_networks(**options)
        teacher = make_networks(use_bn=options.get("use_bn", False)).requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        student, teacher = student.to(device), teacher.to(device)
    else:
        student, teacher = (recreated(network, device) for network in networks)
    config = TrainConfig(
        epochs=4, warmup_epochs=1, batch_size_per_gpu=BATCH, data_path="x", warmup_teacher_temp_epochs=3
    )
    of_step = {
        k: v for k, v in options.items() if k not in ("drop_path_rate", "use_bn", "checkpointing", "drop_path_mode")
    }
    loss = DINOLoss(48, 2 + N_LOCAL, 0.03, 0.06, 3, 4)
    loss.center = torch.zeros(1, 48, device=device)
    return TrainStep(
        student=student,
        teacher=teacher,
        loss=loss,
        schedules=Schedules.of(config, NITER, 1),
        niter_per_ep=NITER,
        **{"optimizer": "adamw", "clip_grad": 3.0, "freeze_last_layer": 1, **of_step},
    )


def make_crops(iteration=0, device="cpu"):
    if device == "cpu":
        torch.manual_seed(iteration)
    sizes = [32, 32] + [16] * N_LOCAL
    return [torch.randn(BATCH, 3, size, size, device=device) for size in sizes]
