"""The center: a running mean of the teacher's logits, which keeps one prototype from winning everywhere.

    center <- momentum * center + (1 - momentum) * mean over views and images of teacher

DINO (arXiv:2104.14294), equation 4. Axes: T teacher views, B images, K prototypes. The mean is taken in fp32 (fp64
for fp64 logits) whatever the logits' dtype.
"""

from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_momentum, check_same_device, check_shape


def batch_center(teacher: Tensor) -> Tensor:
    """Mean of the teacher's logits over views and images.

    teacher: (T, B, K) logits. Returns (K,) fp32 (fp64 for fp64 logits): what distributed callers all-reduce before
    `center_ema_`. Raises ValueError for another shape or dtype.
    """
    check_floating("teacher", teacher)
    check_shape("teacher", teacher, ("T", "B", "K"))
    return reference.batch_center(teacher)


def center_ema_(center: Tensor, batch_mean: Tensor, momentum: float | Tensor) -> None:
    """center <- momentum * center + (1 - momentum) * batch_mean, in place.

    center, batch_mean: (K,). momentum: float in [0, 1] or a 0-D tensor on the same device.
    Raises ValueError where shapes, dtypes or devices do not fit, or the momentum is out of range.
    Source: DINO (arXiv:2104.14294), equation 4.
    """
    check_floating("center", center)
    check_shape("center", center, ("K",))
    check_shape("batch_mean", batch_mean, center.shape)
    check_same_device(center=center, batch_mean=batch_mean)
    check_momentum("momentum", momentum)
    reference.center_ema_(center, batch_mean, momentum)


def center_update_(center: Tensor, teacher: Tensor, momentum: float | Tensor) -> None:
    """The center's update from one batch, in place: `center_ema_(center, batch_center(teacher), momentum)`.

    center: (K,). teacher: (T, B, K) logits. momentum: float in [0, 1] or a 0-D tensor on the same device.
    Raises ValueError where shapes, dtypes or devices do not fit, or the momentum is out of range.
    """
    center_ema_(center, batch_center(teacher), momentum)
