"""Parameter groups, clipping, and the three optimizers of the original."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


def get_params_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: parameters that decay, and those that do not (names ending in `.bias`, and vectors).

    Frozen parameters are left out. The second group carries weight_decay = 0.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (not_decayed if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale each parameter's gradient to at most the norm `clip`, tensor by tensor (not over the whole model).

    Returns the norms before clipping, (number of gradients,), on the device: nothing waits for it.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((clip / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return norms


def cancel_last_layer_gradients(model: nn.Module) -> None:
    """Drop (set to None) the gradients of the head's last layer: no step, no decay, no optimizer state."""
    for name, param in model.named_parameters():
        if "last_layer" in name:
            param.grad = None


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888), as in the original: vectors neither decay nor adapt.

    lr, weight_decay: per group. momentum: of the velocity. eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim != 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    param_norm, update_norm = param.norm(), update.norm()
                    trust = group["eta"] * param_norm / update_norm
                    update = update * torch.where((param_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[param]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(param)
                velocity = state["mu"]
                velocity.mul_(group["momentum"]).add_(update)
                param.add_(velocity, alpha=-group["lr"])
        return loss


# adamw here is what a GradScaler drives; otherwise the step takes ClipAdamWEMA, whose state_dict is the same.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": lambda groups: AdamW(groups, lr=0.0),  # the step sets lr and weight decay from the schedules
    "sgd": lambda groups: SGD(groups, lr=0.0, momentum=0.9),
    "lars": LARS,
}
