"""A step of a tiny network with DINOv2's or DINOv3's recipe, for tests of it."""

import numpy as np
import torch
from train_steps import recreated

from fastdino import DINOHead, VisionTransformer
from fastdino.data.masks import BatchMasks, BlockMasks
from fastdino.model import MaskedMultiCrop
from fastdino.model.archs import recipe_options
from fastdino.objectives import DINOv2Loss, DINOv2Weights, GramTeacher
from fastdino.train.iteration_schedules import IterationSchedules
from fastdino.train.step import TrainStep
from fastdino.train.tuning import dinov2_tuning

N_LOCAL, NITER = 2, 4
SIDE, PATCH = 32, 8
MASKS = BlockMasks(height=SIDE // PATCH, width=SIDE // PATCH, max_patches=8, min_patches=2)


def make_network(recipe="dinov2", registers=0, **options):
    backbone = VisionTransformer(
        [SIDE], PATCH, embed_dim=32, depth=2, num_heads=2, **recipe_options(recipe, registers, 0.1, "mlp"), **options
    )
    heads = [DINOHead(32, k, hidden_dim=24, bottleneck_dim=16, weight_norm=recipe == "dinov2") for k in (48, 40)]
    return MaskedMultiCrop(backbone, *heads)


def make_networks(recipe="dinov2", drop_path_rate=0.0, drop_path_mode="sample", checkpointing=False, **_):
    """Student, teacher, and a network whose backbone is the Gram teacher."""
    torch.manual_seed(0)
    of_student = {"drop_path_rate": drop_path_rate, "drop_path_mode": drop_path_mode, "checkpointing": checkpointing}
    student, teacher, anchor = (make_network(recipe, 2, **kw) for kw in (of_student, {}, {}))
    teacher.load_state_dict(student.state_dict())
    return student, teacher, anchor


def make_step(
    recipe="dinov2", device="cpu", networks=None, dtype=torch.float32, centering="sinkhorn", koleo=0.1, gram=False,
    gram_from=0, **options,
):  # fmt: skip
    """gram_from: the first iteration in which Gram anchoring counts."""
    student, teacher, anchor = networks or make_networks(recipe, **options)
    options = {k: v for k, v in options.items() if k not in ("drop_path_rate", "drop_path_mode", "checkpointing")}
    loss = DINOv2Loss(
        ncrops=2 + N_LOCAL,
        out_dim=48,
        patch_out_dim=40,
        centering=centering,
        weights=DINOv2Weights(koleo=koleo),
        gram=GramTeacher(anchor.backbone) if gram else None,
        gram_weight=(np.arange(4 * NITER) >= gram_from).astype(float) if gram else None,
    )
    teacher.requires_grad_(False).backbone.eval()
    modules = student, teacher, loss
    if device != "cpu":
        for module in modules:
            recreated(module, device)
            for part in module.modules():
                for name, x in part._buffers.items():
                    part._buffers[name] = None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device)
    if dtype == torch.float64:
        student, teacher, loss = (module.double() for module in modules)
    schedules = IterationSchedules.from_settings(
        epochs=4, epoch_length=NITER, lr=0.01, min_lr=1e-6, warmup_epochs=1, weight_decay=0.04, weight_decay_end=0.4,
        momentum_teacher=0.9, final_momentum_teacher=1.0, warmup_teacher_temp=0.04, teacher_temp=0.07,
        warmup_teacher_temp_epochs=2, freeze_last_layer_epochs=1,
    )  # fmt: skip
    return TrainStep(
        student=student, teacher=teacher, loss=loss, optimizer="adamw", schedules=schedules, niter_per_ep=NITER,
        clip_grad=3.0, tuning=dinov2_tuning(2, 0.9, 0.2), **options,
    )  # fmt: skip


def make_views(iteration=0, batch=8, n_parts=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(iteration)
    sizes = [SIDE, SIDE] + [SIDE // 2] * N_LOCAL
    crops = [torch.randn(batch, 3, size, size, generator=generator, dtype=dtype) for size in sizes]
    masks = BatchMasks(MASKS, 0.5, (0.1, 0.5), n_parts).draw(batch, iteration)
    return [*crops, *masks]
