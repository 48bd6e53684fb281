"""One training iteration: crops in, weights changed, metrics out. DINO (arXiv:2104.14294), algorithm 1.

In three modes that give the same numbers: `eager`; `compiled`, where both networks and the loss are one compiled graph;
`graph`, where the whole iteration (forward, loss, backward, clip, AdamW, EMA, center, metrics) is one CUDA graph, one
launch on the host. They can be the same code because nothing in it asks the host: what changes from iteration to
iteration (lr, weight decay, teacher momentum, teacher temperature, freezing) is a row of a table on the device, and the
step itself counts the rows.
Axes: V views (two global, then local), B images, K prototypes.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdino.loss import N_TEACHER_VIEWS, DINOLoss
from fastdino.model import MultiCropWrapper, attention
from fastdino.model.vit import Block, VisionTransformer
from fastdino.train import distributed, memory
from fastdino.train.optim import OPTIMIZERS, cancel_last_layer_gradients, clip_gradients, get_params_groups
from fastdino.train.schedules import Schedules
from fastdino_kernels import ClipAdamWEMA, ema_update_

MODES = ("eager", "compiled", "graph")  # each falls back to the one before it
WARM_UP = 3  # iterations on a side stream before a capture, which wants everything allocated and compiled


class StepMetrics(NamedTuple):
    """0-D tensors on the device, so that reading them can wait: loss, teacher_entropy and kl in nats."""

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor


def low_precision_twin(network: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
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


class TrainStep:
    """Forward, loss, backward, clip, optimizer, EMA and center, in the original's order.

    student: a MultiCropWrapper; teacher: its frozen copy; both keep full precision. optimizer: a name of OPTIMIZERS.
    clip_grad: largest norm of one tensor's gradient, 0 for none. freeze_last_layer: epochs without an update of the
    prototypes. amp_dtype: bf16 computes on copies of the weights (adamw) or under autocast (sgd, lars); fp16 under
    autocast, with a GradScaler; None in the weights' own precision.
    mode: see MODES. accumulate: parts that a batch is computed in; one update and one center for all of them.
    attention_backend: a name of attention.BACKENDS, or auto. say: what is told where something falls back.
    With several processes gradients are averaged over them before the clip, by the step itself, also in a graph.
    Attributes: mode (as it came to be), optimizer, scaler, attention (backend, why).
    Raises ValueError for a mode, a backend or a number of parts that cannot be.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        loss: DINOLoss,
        optimizer: str,
        schedules: Schedules,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int,
        amp_dtype: torch.dtype | None = None,
        mode: str = "eager",
        accumulate: int = 1,
        attention_backend: str = "auto",
        say: Callable[[str], object] = print,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate: expected 1 or more, got {accumulate}")
        self.student, self.teacher, self.loss = student, teacher, loss
        self.schedules, self.niter_per_ep = schedules, niter_per_ep
        self.clip_grad, self.freeze_last_layer = clip_grad, freeze_last_layer
        self.accumulate, self.attention_backend, self.say = accumulate, attention_backend, say
        self.attention: tuple[str, str] | None = None
        param = next(student.parameters())
        self.device, self.amp_dtype = param.device, amp_dtype
        self.scaler = torch.amp.GradScaler(param.device.type) if amp_dtype == torch.float16 else None

        # Networks as they are run: the masters, or their low-precision twins.
        twins = amp_dtype == torch.bfloat16 and optimizer == "adamw"
        self._autocasts = amp_dtype is not None and not twins
        self._student, self._teacher = student, teacher
        copies: list[tuple[Tensor, Tensor]] = []
        if twins:
            assert amp_dtype is not None
            self._student, copies = low_precision_twin(student, amp_dtype)
            self._teacher, teacher_copies = low_precision_twin(teacher, amp_dtype)
            copies = copies + teacher_copies
        self._dtype = amp_dtype or param.dtype
        attention.check(attention_backend, self.device.type, self._dtype)
        self._copies = copies
        self._masters = [(p, low) for p, low in copies if low.requires_grad]

        self.student_params = [p.detach() for p in student.parameters()]
        self.teacher_params = [p.detach() for p in teacher.parameters()]
        groups = get_params_groups(student)
        # A GradScaler may skip a step, but never an EMA: then the two are apart.
        self._fused = optimizer == "adamw" and self.scaler is None
        if self._fused:
            pairs = zip(student.parameters(), teacher.parameters())
            self.optimizer: torch.optim.Optimizer = ClipAdamWEMA(
                groups, lr=0.0, clip_grad=clip_grad, teacher=pairs, copies=copies
            )
        else:
            self.optimizer = OPTIMIZERS[optimizer](groups)
        self._rows = self._table()
        self._now = self._rows[0].clone()
        self._counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._next = 0  # where the device's counter stands
        self._last_layer = [p for name, p in student.named_parameters() if "last_layer" in name and p.requires_grad]
        if self._fused:
            self._schedule_on_device()

        self._forward = self._networks_and_loss
        self.mode = "eager"
        self._use(mode)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor] = []
        self._metrics = torch.zeros(len(StepMetrics._fields), dtype=param.dtype, device=self.device)
        self._warm = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" and mode == "graph" else None

    # --- what changes per iteration ----------------------------------------------------------------------------

    def _table(self) -> Tensor:
        """(iterations, 5): lr, weight decay, teacher momentum and temperature, 1 where the last layer is frozen."""
        n = len(self.schedules.lr)
        epochs = torch.arange(n) // self.niter_per_ep
        columns = [torch.from_numpy(x) for x in (self.schedules.lr, self.schedules.weight_decay)]
        columns += [torch.from_numpy(self.schedules.momentum_teacher)]
        columns += [torch.from_numpy(self.loss.teacher_temp_schedule)[epochs], epochs < self.freeze_last_layer]
        return torch.stack([x.double() for x in columns], dim=1).to(self.device, next(self.student.parameters()).dtype)

    def _schedule_on_device(self) -> None:
        """The optimizer's numbers as views of the current row."""
        assert isinstance(self.optimizer, ClipAdamWEMA)
        lr, weight_decay, momentum, _, _ = self._now.unbind()
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            # The other group holds what must not decay.
            group["weight_decay"] = weight_decay if i == 0 else torch.zeros_like(weight_decay)
        self.optimizer.momentum = momentum

    def _schedule_on_host(self, iteration: int) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])

    # --- the parts of an iteration -----------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.amp_dtype) if self._autocasts else nullcontext()

    def _networks_and_loss(
        self, crops: Sequence[Tensor], teacher_temp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, teacher entropy, KL, mean teacher logits (K,)). The one part that is compiled."""
        if self._dtype != crops[0].dtype and not self._autocasts:
            crops = [crop.to(self._dtype) for crop in crops]
        with self._autocast():
            with torch.no_grad():
                teacher_output = self._teacher(crops[:N_TEACHER_VIEWS])
            student_output = self._student(crops)
        stats = self.loss.at_temperature(student_output, teacher_output, teacher_temp)
        return stats.loss, stats.teacher_entropy, stats.kl, self.loss.batch_center(teacher_output)

    def _compute(self, crops: Sequence[Tensor]) -> None:
        """Forward and backward over the parts of the batch; leaves gradients, metrics and the center's mean."""
        n = self.accumulate
        parts = zip(*(crop.chunk(n) for crop in crops)) if n > 1 else [tuple(crops)]
        mean: Tensor | None = None
        self._metrics.zero_()
        for part in parts:
            loss, entropy, kl, logits = self._forward(part, self._now[3])
            scaled = loss / n if n > 1 else loss
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            mean = logits / n if mean is None else mean + logits / n
            self._metrics += torch.stack([loss.detach(), entropy, kl]).to(self._metrics.dtype) / n
            if n > 1:
                self._add_up()
        assert mean is not None
        self._center_mean = mean

    def _add_up(self) -> None:
        """Gradients of several parts are summed in full precision, where the masters are."""
        for master, low in self._masters:
            if low.grad is not None:
                grad = low.grad.to(master.dtype)
                if master.grad is None:
                    master.grad = grad
                else:
                    master.grad.add_(grad)
                low.grad = None

    def _gradients(self) -> list[Tensor]:
        holders: Iterable[Tensor] = (*self.student.parameters(), *(low for _, low in self._masters))
        return [x.grad for x in holders if x.grad is not None]

    def _update(self, iteration: int) -> None:
        """Average over processes, clip, optimizer, EMA, center."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        distributed.average_all(self._gradients())
        if isinstance(self.optimizer, ClipAdamWEMA):
            self.optimizer.freeze_(self._last_layer, self._now[4] > 0)
            self.optimizer.step()
        else:
            if self.clip_grad:
                clip_gradients(self.student, self.clip_grad)
            if iteration // self.niter_per_ep < self.freeze_last_layer:
                cancel_last_layer_gradients(self.student)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            ema_update_(self.teacher_params, self.student_params, self._now[2])
        self.loss.move_center(self._center_mean)

    def _iterate(self, crops: Sequence[Tensor], iteration: int) -> None:
        """A whole iteration. Only optimizers with schedules on the host look at `iteration`."""
        self._now.copy_(self._rows.index_select(0, self._counter)[0])
        self._counter += 1
        if not self._fused:
            self._schedule_on_host(iteration)
        self.optimizer.zero_grad()
        self._compute(crops)
        self._update(iteration)

    # --- the three modes ---------------------------------------------------------------------------------------

    def _use(self, mode: str) -> None:
        if mode == "graph" and (self.device.type != "cuda" or not self._fused):
            what = "a CUDA device" if self.device.type != "cuda" else "adamw without a GradScaler"
            self.say(f"step: a graph needs {what}; using compiled")
            mode = "compiled"
        compiles = mode in ("compiled", "graph")
        self._forward = (
            torch.compile(self._networks_and_loss, fullgraph=True, dynamic=False)
            if compiles
            else self._networks_and_loss
        )
        self.mode = mode

    def _fall_back(self, error: Exception) -> None:
        lower = MODES[MODES.index(self.mode) - 1]
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.say(f"step: {self.mode} failed ({type(error).__name__}: {reason[:200]}); using {lower}")
        self._graph = None
        self._use(lower)

    def _prepare(self, crops: Sequence[Tensor]) -> None:
        """On the first batch: choose the attention for its shapes, and make its masks, outside of any trace."""
        if crops[0].shape[0] % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of the batch of {len(crops[0])}, got {self.accumulate}")
        backbone = getattr(self.student, "backbone", None)
        if not isinstance(backbone, VisionTransformer) or not isinstance(self.student, MultiCropWrapper):
            return
        block = backbone.blocks[0]
        assert isinstance(block, Block)
        heads = block.attn.num_heads
        packings = [
            self.student.packing(crops[:n], len(crops[0]) // self.accumulate) for n in (N_TEACHER_VIEWS, len(crops))
        ]
        self.attention = attention.choose(
            packings[1], heads, backbone.embed_dim // heads, self.device.type, self._dtype, self.attention_backend
        )
        attention.use_backend(self.attention[0])
        for packing in packings:
            attention.prepare(self.attention[0], packing, self.device)

    def __call__(self, crops: Sequence[Tensor], iteration: int) -> StepMetrics:
        """V normalised crops (B, 3, H, W), and the iteration counted from 0 over the whole run."""
        if self.attention is None:
            self._prepare(crops)
        if iteration != self._next:
            self._counter.fill_(iteration)
        self._next = iteration + 1
        if self.mode == "graph":
            return self._replay(crops, iteration)
        try:
            self._iterate(crops, iteration)
        except Exception as error:
            # Compilation happens before the first update: nothing has changed yet but the counter.
            if self.mode != "compiled" or self._warm or memory.shortage(error):
                raise
            self._fall_back(error)
            self._counter.fill_(iteration)
            self._iterate(crops, iteration)
        self._warm += 1
        return StepMetrics(*self._metrics.clone())

    def _replay(self, crops: Sequence[Tensor], iteration: int) -> StepMetrics:
        """The first iterations warm up on a side stream, the next is captured, and then it is replayed."""
        shapes = [crop.shape for crop in crops]
        if self._static and shapes != [x.shape for x in self._static]:
            raise ValueError(
                f"crops: expected the captured shapes {[tuple(x.shape) for x in self._static]}, "
                f"got {[tuple(shape) for shape in shapes]}; a batch of another size is dropped, not captured again"
            )
        if not self._static:
            self._static = [crop.to(self._dtype, copy=True) for crop in crops]
        torch._foreach_copy_(self._static, list(crops))
        assert self._stream is not None
        try:
            if self._warm < WARM_UP:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    self._iterate(self._static, iteration)
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
                self._warm += 1
                return StepMetrics(*self._metrics.clone())
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad()  # gradients shall live in the graph's own memory
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._iterate(self._static, iteration)
                self._graph = graph
            self._graph.replay()
        except Exception as error:
            if self._graph is not None or memory.shortage(error):
                raise
            torch.cuda.synchronize(self.device)
            self._fall_back(error)
            self._warm = 0
            self._counter.fill_(iteration)
            return self(crops, iteration)
        return StepMetrics(*self._metrics.clone())

    def refresh_copies(self) -> None:
        """Bring the low-precision copies up to date: after weights were loaded."""
        if self._copies:
            torch._foreach_copy_([low.detach() for _, low in self._copies], [p.detach() for p, _ in self._copies])

    def close(self) -> None:
        """Drop the graph; a process group must not be destroyed before it."""
        self._graph = None
