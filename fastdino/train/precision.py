"""Which half precision a run computes in, and how: under autocast, or on copies of the weights."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.errors import UserError
from fastdino.model import MultiCrop
from fastdino.objectives import Objective
from fastdino.train.config import TrainConfig
from fastdino.train.sharding import is_sharded


def amp_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for fp32: where it is switched off, and on a CPU that was not asked.

    Raises UserError for a precision that the device does not have.
    """
    if not config.use_fp16:
        return None
    if device.type != "cuda":
        if config.amp_dtype == "fp16":
            raise UserError("--amp_dtype: fp16 needs a GPU; on a CPU use bf16, or --use_fp16 false")
        return torch.bfloat16 if config.amp_dtype == "bf16" else None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.amp_dtype == "bf16" and not has_bf16:
        raise UserError(f"--amp_dtype: {torch.cuda.get_device_name(device)} has no bf16; use fp16")
    return torch.bfloat16 if has_bf16 and config.amp_dtype != "fp16" else torch.float16


class Networks:
    """Student and teacher as they are run in a precision, and what ties them to the masters, which keep full precision.

    amp_dtype: half precision, or None. on_copies: half precision is that of copies of the weights, which the optimizer
    writes, and not autocast's. Attributes: student, teacher: as run; dtype: what they compute in; crop_dtype: what they
    are given, full precision under autocast; copies: pairs (master's parameter, its copy).
    """

    def __init__(self, student: MultiCrop, teacher: MultiCrop, amp_dtype: torch.dtype | None, on_copies: bool) -> None:
        master = next(student.parameters())
        self.device_type, self.amp_dtype, self.dtype = master.device.type, amp_dtype, amp_dtype or master.dtype
        # Networks in parts compute on copies of their own, which come and go with each block.
        casts_itself = is_sharded(student)
        self._autocasts = amp_dtype is not None and not on_copies and not casts_itself
        self.crop_dtype = master.dtype if self._autocasts else self.dtype
        self.student, self.teacher = student, teacher
        self.copies: list[tuple[Tensor, Tensor]] = []
        if amp_dtype is not None and on_copies and not casts_itself:
            self.student, copies = low_precision_twin(student, amp_dtype)
            self.teacher, teacher_copies = low_precision_twin(teacher, amp_dtype)
            self.copies = copies + teacher_copies

    @property
    def both(self) -> tuple[MultiCrop, MultiCrop]:
        """Student and teacher as they are run."""
        return self.student, self.teacher

    def dtype_of(self, view: Tensor) -> torch.dtype:
        """What a view is given in: a crop in crop_dtype, anything else, as masks, as it is."""
        return self.crop_dtype if view.ndim == 4 else view.dtype

    def outputs(self, objective: Objective, views: Sequence[Tensor], taught: Any = None) -> tuple[Any, Any]:
        """(what the student learns from the views, what the teacher taught), in this precision. taught: if known."""
        views = [view if view.dtype == self.dtype_of(view) else view.to(self.dtype_of(view)) for view in views]
        with torch.autocast(self.device_type, self.amp_dtype) if self._autocasts else nullcontext():
            if taught is None:
                with torch.no_grad():
                    taught = objective.teach(self.teacher, views)
            return objective.learn(self.student, views), taught

    def sum_gradients(self) -> None:
        """Add the gradients of the copies to the masters': in full precision, for several parts of a batch."""
        for master, low in self.copies:
            if low.grad is not None:
                grad = low.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                low.grad = None

    def refresh(self) -> None:
        """Bring the copies up to date: after weights were loaded."""
        if self.copies:
            torch._foreach_copy_([low.detach() for _, low in self.copies], [p.detach() for p, _ in self.copies])


def low_precision_twin(network: MultiCrop, dtype: torch.dtype) -> tuple[MultiCrop, list[tuple[Tensor, Tensor]]]:
    """(a copy whose parameters are low-precision copies, the pairs (parameter, copy)).

    What the original casts in every forward is cast here once per step, by the optimizer's kernel. Buffers are shared,
    and so is BatchNorm, which keeps fp32 as autocast would.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    memo: dict[int, Tensor] = {
        id(x): x for x in (*network.buffers(), *(p for norm in norms for p in norm.parameters()))
    }
    pairs: list[tuple[Tensor, Tensor]] = []
    for param in network.parameters():
        if id(param) not in memo:
            low = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
            pairs.append((param, low))
            memo[id(param)] = low  # what deepcopy takes for the copy of param
    return copy.deepcopy(network, memo), pairs
