"""teacher <- momentum * teacher + (1 - momentum) * student, for every tensor of a model.

DINO (arXiv:2104.14294), section 3.1. Accumulates in fp32 whatever the dtype (fp64 for fp64 tensors).
"""

from collections.abc import Sequence

from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_momentum, check_pairs


def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Exponential moving average of a list of tensors, in place.

    teacher, student: lists of tensors of equal shapes; dtypes may differ. momentum: float in [0, 1] or a 0-D tensor
    on the same device. Raises ValueError where lengths, shapes, dtypes or devices do not fit, or the momentum is out
    of range; nothing is modified then. Source: DINO (arXiv:2104.14294), section 3.1.
    """
    check_pairs("teacher", teacher, "student", student)
    check_momentum("momentum", momentum)
    reference.ema_update_(teacher, student, momentum)
