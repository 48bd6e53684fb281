"""DINO in two names, for a training loop of your own: `DINO` holds student, teacher and center; `train_dino` runs them.

The interface is that of a widely read article; the algorithm is the paper's (arXiv:2104.14294, algorithm 1). Where the
two differ, and the article is at fault, the docstrings say so. Axes: V views, B images, K prototypes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdino.data.augment import global_augment, multiple_local_augments
from fastdino.model import ARCHITECTURES, DINOHead, MultiCropWrapper, VisionTransformer
from fastdino_kernels import center_update_, dino_loss, ema_update_

Arch = str | Callable[[], nn.Module]


def distillation_loss(
    student_output: Tensor, teacher_output: Tensor, center: Tensor, tau_s: float, tau_t: float
) -> Tensor:
    """Mean cross-entropy H(softmax((teacher - center) / tau_t), softmax(student / tau_s)) over rows, () fp32.

    student_output, teacher_output: (n, K) and (m, K) logits; where the numbers of rows differ, one is a multiple of
    the other and the shorter repeats (crop-major: row v * B + b is view v of image b). center: (K,) or (1, K).
    No gradient reaches the teacher. Row i is compared with row i: pairs of the same crop are the caller's to avoid.
    Raises ValueError where the shapes do not fit. Source: DINO (arXiv:2104.14294), equations 1 to 4.
    """
    n, m = len(student_output), len(teacher_output)
    if student_output.ndim != 2 or teacher_output.ndim != 2 or student_output.shape[1:] != teacher_output.shape[1:]:
        raise ValueError(
            f"student_output, teacher_output: expected (n, K) and (m, K), "
            f"got {tuple(student_output.shape)} and {tuple(teacher_output.shape)}"
        )
    if not min(n, m) or max(n, m) % min(n, m):
        raise ValueError(f"student_output, teacher_output: expected one row count to divide the other, got {n} and {m}")
    rows = max(n, m)
    student = student_output.repeat(rows // n, 1)
    teacher = teacher_output.repeat(rows // m, 1)
    # The op never compares views of equal index, so the student goes second, behind a view that nobody looks at.
    return dino_loss(torch.stack([student.detach(), student]), teacher[None], center.view(-1), tau_s, tau_t)


def _network(arch: Arch) -> nn.Module:
    """A module from images to logits. Names and bare Vision Transformers get DINO's head with 65536 prototypes."""
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        arch = ARCHITECTURES[arch]
    network = arch()
    if isinstance(network, VisionTransformer):
        network = MultiCropWrapper(network, DINOHead(network.embed_dim, 65536))
    _output_dim(network)
    return network


def _output_dim(network: nn.Module) -> int:
    dim = getattr(network, "output_dim", None)
    if not isinstance(dim, int):
        raise ValueError(f"arch: expected a module with an integer output_dim, got {type(network).__name__}")
    return dim


class DINO(nn.Module):
    """A student, its teacher, and the center.

    student_arch, teacher_arch: a name (`"vit_base"`), or a callable that makes a module: a Vision Transformer, which
    gets DINO's head, or anything with an `output_dim` that maps images (n, 3, H, W) to logits (n, output_dim). A
    module that maps a list of crops as well (`MultiCropWrapper`) is given all crops at once.
    Attributes: student, teacher (starts equal, frozen), center (1, K).
    Raises ValueError where the two differ in names or shapes.
    """

    center: Tensor

    def __init__(self, student_arch: Arch, teacher_arch: Arch, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.student = _network(student_arch)
        self.teacher = _network(teacher_arch)
        try:
            self.teacher.load_state_dict(self.student.state_dict())
        except RuntimeError as error:
            raise ValueError(f"teacher_arch: expected the student's parameters, got others: {error}") from error
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, _output_dim(self.student)))
        self.to(device)

    distillation_loss = staticmethod(distillation_loss)

    def teacher_update(self, beta: float) -> None:
        """Teacher <- beta * teacher + (1 - beta) * student. Raises ValueError unless beta is in [0, 1]."""
        ema_update_(
            [p.detach() for p in self.teacher.parameters()], [p.detach() for p in self.student.parameters()], beta
        )


def _logits(network: nn.Module, crops: list[Tensor]) -> Tensor:
    """V crops (B, 3, H, W) -> (V, B, K)."""
    if isinstance(network, MultiCropWrapper):
        return network(crops).unflatten(0, (len(crops), -1))
    return torch.stack([network(crop) for crop in crops])


def train_dino(
    dino: DINO,
    data_loader: Iterable[Any],
    optimizer: Optimizer,
    device: torch.device | str,
    num_epochs: int,
    tps: float = 0.9,
    tpt: float = 0.04,
    beta: float = 0.9,
    m: float = 0.9,
) -> list[float]:
    """Train `dino` for num_epochs with constant temperatures and momenta; the mean loss of each epoch.

    data_loader yields batches: PIL images or tensors (as `global_augment` takes them), alone or first in a tuple.
    tps, tpt: student and teacher temperature (the paper: 0.1 and 0.04). beta: the teacher's EMA momentum (the paper:
    0.996 rising to 1). m: the center's.

    What differs from the article, whose loop cannot run as printed: two global crops and six local ones per image
    instead of one and one; the teacher sees the globals only; the loss is taken over all pairs of different views with
    student and teacher in their own places (the article swaps them); gradients are cleared; the center moves by the
    teacher's globals only; `num_epochs` is a number, not something with a length.
    Raises ValueError for a temperature that is not positive, a momentum outside [0, 1], images of another kind, a
    loader without a batch or a batch without an image.
    """
    losses = []
    dino.train()
    for _ in range(num_epochs):
        total, n_batches = torch.zeros((), device=device), 0
        for batch in data_loader:
            images = _images(batch)
            globals_ = [global_augment(images).to(device) for _ in range(2)]
            locals_ = multiple_local_augments(images).to(device)
            with torch.no_grad():
                teacher = _logits(dino.teacher, globals_)
            student = _logits(dino.student, globals_ + list(locals_.unflatten(0, (-1, len(images))).unbind(0)))
            loss = dino_loss(student, teacher, dino.center[0], tps, tpt)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            dino.teacher_update(beta)
            center_update_(dino.center[0], teacher, m)
            total += loss.detach()
            n_batches += 1
        if not n_batches:
            raise ValueError("data_loader: expected at least one batch, got none")
        losses.append(float(total) / n_batches)
    return losses


def _images(batch: Any) -> Sequence[Image.Image] | Tensor:
    """A batch as a loader yields it: images, or (images, labels)."""
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    first = batch[0]
    is_image = isinstance(first, Image.Image) or (isinstance(first, Tensor) and first.ndim < 4)
    return batch if is_image else first
