"""A training run: iterate, evaluate, save, stop. Its parts come from `build`, its numbers go to `sinks`."""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.data.loader import MAX_BAD
from fastdino.errors import TrainingError, UserError
from fastdino.eval import EVALUATIONS
from fastdino.train import distributed, memory
from fastdino.train.build import Own, assemble
from fastdino.train.config import TrainConfig
from fastdino.train.console import Console
from fastdino.train.distributed import Process
from fastdino.train.interrupt import Stop
from fastdino.train.meter import Meter
from fastdino.train.sinks import Curves, LogFile, Sinks, asked_loggers
from fastdino.train.words import conclude, introduce, remark

READ_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the metrics: on a GPU, each look waits for it


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. before, after: the evaluations' numbers ({"knn": 0.94}), empty without labels.

    epochs: finished ones. seconds: of this session. backbone: the teacher's, as trained, on the run's device.
    """

    epochs: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    interrupted: bool
    backbone: nn.Module = field(repr=False)

    @property
    def knn_before(self) -> float | None:
        """k-NN accuracy before training."""
        return self.before.get("knn")

    @property
    def knn_after(self) -> float | None:
        """k-NN accuracy at the end."""
        return self.after.get("knn")


def train(config: TrainConfig, own: Own | None = None) -> TrainResult:
    """Train as `config` says, in this process or, under a launcher, together with its siblings.

    Raises UserError before anything is written where the run cannot be (no images, another model's checkpoint ...),
    TrainingError where it cannot go on (non-finite loss, too many unreadable images, memory that does not suffice).
    """
    process = distributed.start(config.device, config.dist_url)
    run: Run | None = None
    try:
        run = Run(config, process, own or Own())
        return run.train()
    except (RuntimeError, MemoryError) as error:
        if (shortage := memory.shortage(error)) is None:
            raise
        where = run.place(run.iteration) if run else "before the first step"
        raise TrainingError(f"out of memory {where}: {shortage}. {memory.advice(config)}") from error
    finally:
        if run:
            run.parts.step.close()
        distributed.stop()


class Run:
    """One run of one process. Making it checks everything and writes nothing."""

    def __init__(self, config: TrainConfig, process: Process, own: Own) -> None:
        check_writable(Path(config.output_dir))
        self.config, self.process, self.callbacks = config, process, own.callbacks
        self.loggers = asked_loggers(config)
        self.console = Console(process.is_main)
        self.parts = assemble(config, process, own, self.console.say)
        self.niter = self.parts.niter
        self.iteration = self.parts.resume()
        self.log = LogFile(self.parts.folder / "log.txt")
        self.stop, self.stopped = Stop(), False
        self.before: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    def train(self) -> TrainResult:
        """From the first iteration that is left to the last, or until somebody stops it."""
        started = time.perf_counter()
        config, first_epoch = self.config, self.iteration // self.niter
        sinks = self._open_sinks(first_epoch)
        try:
            introduce(self.parts, self.iteration, self.console.say)
            self._evaluate_before()
            self.console.start(config.epochs * self.niter, self.iteration, config.epochs)
            with self.stop.listening():
                for epoch in range(first_epoch, config.epochs):
                    meter, bad = self._train_epoch(epoch, sinks)
                    if self.iteration < (epoch + 1) * self.niter:
                        break
                    if self.process.is_main:
                        self.parts.save(epoch + 1)
                    self._finish_epoch(epoch, meter, bad, sinks)
                    if self.stopped:
                        break
            interrupted = self.iteration < config.epochs * self.niter
            if interrupted and self.process.is_main:
                self.parts.save(self.iteration // self.niter, self.iteration)
            elif first_epoch == config.epochs:  # resumed when nothing was left to do
                self._evaluate("of the finished run")
        except BaseException:
            with suppress(TrainingError):  # of a sink: what ended the run is what has to be said
                sinks.close()
            raise
        finally:
            self.parts.loader.close()
        sinks.close()
        seconds = time.perf_counter() - started
        if self.process.is_main:
            conclude(self.parts, self.iteration, self.before, self.latest, seconds, self.console.say)
        distributed.barrier()
        epochs = self.iteration // self.niter
        return TrainResult(epochs, self.before, self.latest, seconds, interrupted, self.parts.backbone)

    def _open_sinks(self, first_epoch: int) -> Sinks:
        """The first thing that writes: the folder, args.json, and whoever is told the numbers."""
        if not self.process.is_main:
            return Sinks([])
        folder = self.parts.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        self.log.keep_before(first_epoch)
        curves = Curves(self.log, self.config.out_dim, folder / "curves.png")
        loggers = [logger(self.config, self.niter) for logger in self.loggers]
        return Sinks([self.console, self.log, curves, *loggers, *self.callbacks])

    def _train_epoch(self, epoch: int, sinks: Sinks) -> tuple[Meter, list[str]]:
        """One epoch, or the part of it until somebody stops the run; (means, lines about unreadable images)."""
        parts, device = self.parts, self.process.device
        meter, bad = Meter(parts.step.metric_names), dict[str, None]()
        first_batch = self.iteration - epoch * self.niter
        parts.sampler.seek(epoch, first_batch)
        batches = iter(parts.loader)
        pending: list[Sequence[Tensor]] = []
        for i in range(first_batch, self.niter):
            asked = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - asked
            bad.update(dict.fromkeys(batch.bad))
            self._check_bad(list(bad))
            # Drop-path depends on the iteration alone, so that a resumed run draws what it would have drawn.
            torch.manual_seed(_mix(self.config.seed, self.iteration, self.process.rank))
            pending.append(parts.step(batch.crops(device), self.iteration))
            self.iteration += 1
            meter.n_images += parts.batch_size
            if len(pending) == READ_EVERY[device.type] or i == self.niter - 1:
                self._read_metrics(pending, meter, epoch, sinks)
                pending = []
                self.stopped = distributed.any_of(self.stop.requested, device)
                if self.stopped:
                    break
        return meter, list(bad)

    def _read_metrics(self, pending: Sequence[Sequence[Tensor]], meter: Meter, epoch: int, sinks: Sinks) -> None:
        """Bring the metrics of the last steps to the host, averaged over processes. Raises on a non-finite loss."""
        rows = torch.stack([torch.stack(list(metrics)) for metrics in pending])
        values = distributed.average(rows).cpu().double().numpy()
        for offset, loss in enumerate(values[:, 0]):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} {self.place(self.iteration - len(pending) + offset)}. "
                    "Try a smaller --lr, a longer --warmup_epochs, --clip_grad 0.3, or --use_fp16 false"
                )
        sinks.step(meter.step_entry(values, self.iteration, epoch, self.parts.step.schedules))

    def place(self, iteration: int) -> str:
        """Where a run ended, and what is left of it."""
        epoch, step = divmod(iteration, self.niter)
        kept = f"{self.parts.checkpoint} holds epoch {epoch}" if epoch else "no epoch was finished"
        return f"at epoch {epoch + 1}, step {step + 1} (iteration {iteration}; {kept})"

    def _check_bad(self, bad: list[str]) -> None:
        n_images = len(self.parts.source)
        if len(bad) > MAX_BAD * n_images:
            raise TrainingError(
                f"more than {MAX_BAD:.0%} of the images cannot be read ({len(bad)} of {n_images} so far); "
                f"the last: {bad[-1]}"
            )

    def _finish_epoch(self, epoch: int, meter: Meter, bad: list[str], sinks: Sinks) -> None:
        """Evaluate where it is time to, and tell the sinks."""
        config, last = self.config, epoch == self.config.epochs - 1
        bad = sorted({line for lines in distributed.gather(bad) for line in lines})
        self._check_bad(bad)
        found: dict[str, float] = {}
        if last or (config.knn_freq and (epoch + 1) % config.knn_freq == 0):
            found = self._evaluate()
        if not self.process.is_main:
            return
        entry = meter.epoch_entry(epoch, self.niter, self.parts.step.schedules) | {"knn": None} | found
        if epoch == 0:
            entry["knn_before"] = None
            entry |= {f"{name}_before": value for name, value in self.before.items()}
        if bad:
            entry["bad_images"] = bad
        sinks.epoch(entry)
        remark(self.parts, meter.seconds, meter.data_wait, bad, self.console.say)

    def _evaluate_before(self) -> None:
        """The weights as they came; of a resumed run, what its log says of them."""
        if self.iteration == 0:
            self.before = self._evaluate("before training")
        elif self.process.is_main and (past := self.log.read()):
            pairs = ((name, past[0].get(f"{name}_before")) for name in EVALUATIONS)
            self.before = {name: value for name, value in pairs if value is not None}

    def _evaluate(self, when: str = "") -> dict[str, float]:
        """The numbers of all evaluations, of the teacher's backbone, on the main process; none without labels."""
        found: dict[str, float] = {}
        if self.process.is_main and self.config.knn_freq:
            found = self.parts.evaluate()
            if when and "knn" in found:
                self.console.say(f"k-NN {when}: {found['knn']:.4f}")
        distributed.barrier()
        self.latest = found
        return found


def check_writable(folder: Path) -> None:
    """Raise UserError unless the folder is there, or can be made, and takes files. Makes nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output_dir: expected a folder, got the file {existing}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir: {existing} is not writable")


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several small ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
