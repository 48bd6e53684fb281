"""The article's interface: its own calls run, and train_dino is the paper's algorithm."""

import copy

import pytest
import torch
from PIL import Image

from fastdino import (
    DINO,
    DINOHead,
    DINOLoss,
    MultiCropWrapper,
    VisionTransformer,
    distillation_loss,
    global_augment,
    multiple_local_augments,
    train_dino,
    vit_base,
    vit_large,
)


def small():
    backbone = VisionTransformer(img_size=[224], patch_size=32, embed_dim=24, depth=1, num_heads=2)
    return MultiCropWrapper(backbone, DINOHead(24, 40, hidden_dim=16, bottleneck_dim=8))


def images(kind, photos):
    if kind == "pil":
        return [Image.fromarray(photo) for photo in photos[:3]]
    return torch.stack([torch.tensor(photo[:120, :160]).permute(2, 0, 1) for photo in photos[:3]])


@pytest.mark.parametrize("kind", ["pil", "uint8"])
def test_the_articles_loop_of_calls_runs(photos, kind):
    torch.manual_seed(0)
    device = torch.device("cpu")
    dino = DINO(small, small, device)
    optimizer = torch.optim.AdamW(dino.student.parameters(), lr=1e-3)
    tps, tpt, beta, m = 0.9, 0.04, 0.9, 0.9
    teacher_before = copy.deepcopy(dino.teacher.state_dict())
    for x in [images(kind, photos)] * 2:
        x1, x2 = global_augment(x), multiple_local_augments(x)
        student_output1, student_output2 = dino.student(x1.to(device)), dino.student(x2.to(device))
        with torch.no_grad():
            teacher_output1, teacher_output2 = dino.teacher(x1.to(device)), dino.teacher(x2.to(device))
        loss = (
            dino.distillation_loss(teacher_output1, student_output2, dino.center, tps, tpt)
            + dino.distillation_loss(student_output1, teacher_output2, dino.center, tps, tpt)
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dino.teacher_update(beta)
        with torch.no_grad():
            dino.center = m * dino.center + (1 - m) * torch.cat([teacher_output1, teacher_output2]).mean(0)
    assert torch.isfinite(loss)
    assert dino.center.shape == (1, 40)
    assert any(not torch.equal(value, teacher_before[key]) for key, value in dino.teacher.state_dict().items())


def test_distillation_loss_is_the_mean_cross_entropy_of_rows(rel):
    torch.manual_seed(1)
    student, teacher = (
        torch.randn(12, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 7, dtype=torch.float64),
    )
    center = torch.randn(1, 7, dtype=torch.float64)
    loss = distillation_loss(student, teacher, center, 0.1, 0.04)
    q = ((teacher - center) / 0.04).softmax(-1).repeat(3, 1)
    expected = -(q * (student / 0.1).log_softmax(-1)).sum(-1).mean()
    assert rel(loss, expected) < 1e-12
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert rel(gradient, expected_gradient) < 1e-12
    with pytest.raises(ValueError, match="row count to divide the other, got 12 and 5"):
        distillation_loss(student, torch.randn(5, 7), center, 0.1, 0.04)
    with pytest.raises(ValueError, match=r"got \(12, 7\) and \(4, 6\)"):
        distillation_loss(student, torch.randn(4, 6), center, 0.1, 0.04)


@pytest.mark.parametrize("pair", [False, True], ids=["images", "images-and-labels"])
def test_train_dino_runs_the_papers_algorithm(photos, rel, pair):
    """One batch, step by step with DINOLoss, AdamW and a plain EMA."""
    batch = images("uint8", photos)
    loader = [(batch, torch.zeros(3))] if pair else [batch]
    torch.manual_seed(0)
    dino = DINO(small, small, "cpu")
    student, teacher = copy.deepcopy(dino.student), copy.deepcopy(dino.teacher)
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(dino.student.parameters(), lr=0.5)
    (loss,) = train_dino(dino, loader, optimizer, "cpu", 1, tps=0.2, tpt=0.05, beta=0.7, m=0.6)

    torch.manual_seed(7)
    crops = [global_augment(batch), global_augment(batch), *multiple_local_augments(batch).unflatten(0, (6, 3))]
    dino_loss = DINOLoss(40, 8, 0.05, 0.05, 0, 1, student_temp=0.2, center_momentum=0.6)
    expected = dino_loss(student(crops), teacher(crops[:2]), 0)
    expected.backward()
    torch.optim.SGD(student.parameters(), lr=0.5).step()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert rel(dino.center, dino_loss.center) < 1e-5
    for ours, moved, old in zip(dino.teacher.parameters(), student.parameters(), teacher.parameters(), strict=True):
        assert rel(ours, 0.7 * old + 0.3 * moved) < 1e-4


@pytest.mark.parametrize(("arch", "params"), [(vit_base, 85.8e6), (vit_large, 303.3e6)], ids=["ViT-B/16", "ViT-L/16"])
def test_large_backbones_can_be_built(arch, params):
    with torch.device("meta"):
        backbone = arch()
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(params, rel=1e-3)


def test_an_arch_may_be_a_name_or_a_backbone():
    dino = DINO("vit_nano", "vit_nano")
    assert dino.center.shape == (1, 65536)
    assert not any(p.requires_grad for p in dino.teacher.parameters())
    with pytest.raises(ValueError, match="arch: expected one of vit_nano"):
        DINO("vit_huge", "vit_huge")
    with pytest.raises(ValueError, match="integer output_dim, got Linear"):
        DINO(lambda: torch.nn.Linear(2, 2), small)
    with pytest.raises(ValueError, match="teacher_arch: expected the student's parameters"):
        DINO(small, "vit_nano")
    with pytest.raises(ValueError, match=r"momentum: expected a value in \[0, 1\], got 2"):
        DINO(small, small).teacher_update(2)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "data_loader: expected at least one batch, got none"),
        ([torch.zeros(0, 3, 64, 64)], "images: expected at least one, got none"),
        ([[]], "images: expected at least one, got none"),
        ([([], torch.zeros(0))], "images: expected at least one, got none"),
    ],
    ids=["no batch", "tensor of no images", "list of no images", "no images and no labels"],
)
def test_train_dino_refuses_nothing_to_train_on(loader, message):
    dino = DINO(small, small)
    with pytest.raises(ValueError, match=f"^{message}$"):
        train_dino(dino, loader, torch.optim.SGD(dino.student.parameters(), lr=0.1), "cpu", 1)
