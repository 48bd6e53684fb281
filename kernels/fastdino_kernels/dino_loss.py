"""Centered-softmax cross-entropy over all pairs of different views.

    q[t, b] = softmax((teacher[t, b] - center) / teacher_temp)      p[v, b] = softmax(student[v, b] / student_temp)
    loss    = mean over b and over pairs v != t of  H(q[t, b], p[v, b])

DINO (arXiv:2104.14294), equations 1 to 4. Axes: V student views, T teacher views, B images, K prototypes; view v of
the student and view v of the teacher are the same crop, and are not compared.
Dtypes: logits in fp32, bf16 or fp16 give an fp32 loss, computed in fp32; fp64 stays fp64.
"""

from typing import NamedTuple

from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape, check_temperature


class DINOLossStats(NamedTuple):
    """The loss and what a training log wants beside it; everything stays on the device.

    loss: () differentiable in the student. teacher_entropy: () mean entropy of q, in nats; ln K means collapse to
    uniform, 0 to one prototype. kl: () mean KL(q || p) over the pairs, loss - teacher_entropy. per_image: (B,) losses.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    per_image: Tensor


def _check(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> None:
    check_floating("student", student)
    check_floating("teacher", teacher)
    check_floating("center", center)
    check_shape("student", student, ("V", "B", "K"))
    check_shape("teacher", teacher, ("T", *student.shape[1:]))
    check_shape("center", center, student.shape[2:])
    check_same_device(student=student, teacher=teacher, center=center)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    if student.shape[0] < 2 or teacher.shape[0] < 1:
        raise ValueError(
            f"student, teacher: expected at least 2 student views and 1 teacher view, "
            f"got {student.shape[0]} and {teacher.shape[0]}"
        )


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> Tensor:
    """DINO's loss over all pairs of a teacher view with a different student view.

    student: (V, B, K) logits, differentiable. teacher: (T, B, K) logits, never differentiated. center: (K,).
    student_temp, teacher_temp: floats, or 0-D tensors on the same device.
    Returns the mean over images and pairs, () fp32 (fp64 for fp64 logits).
    Raises ValueError where shapes, dtypes or devices do not fit, or a temperature given as a float is not positive.
    Source: DINO (arXiv:2104.14294), equations 1 to 4.
    """
    _check(student, teacher, center, student_temp, teacher_temp)
    return reference.dino_loss(student, teacher, center, student_temp, teacher_temp)


def dino_loss_with_stats(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> DINOLossStats:
    """`dino_loss`, and the monitoring numbers that come with it: see `DINOLossStats`. Same arguments and errors."""
    _check(student, teacher, center, student_temp, teacher_temp)
    return DINOLossStats(*reference.dino_loss_with_stats(student, teacher, center, student_temp, teacher_temp))
