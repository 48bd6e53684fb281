"""A training run: iterate, evaluate, save, stop. Its parts come from `build`, its numbers go to `sinks`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastdino.data.loader import MAX_BAD, Batch
from fastdino.errors import TrainingError
from fastdino.train import distributed, memory, sharded_checkpoint
from fastdino.train.build import Own, assemble
from fastdino.train.config import TrainConfig
from fastdino.train.console import Console
from fastdino.train.distributed import Process
from fastdino.train.finite import ADVICE, nonfinite_metric
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Interrupted, Stop
from fastdino.train.judge import Judge
from fastdino.train.loggers import asked_loggers
from fastdino.train.meter import Meter
from fastdino.train.result import TrainResult
from fastdino.train.resume import arguments
from fastdino.train.sinks import Curves, LogFile, Sinks
from fastdino.train.watch import Watch
from fastdino.train.words import conclude, introduce, remark

READ_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the metrics: on a GPU, each look waits for it


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
            run.close()
        distributed.stop()


class Run:
    """One run of one process. Making it checks everything and writes nothing."""

    def __init__(self, config: TrainConfig, process: Process, own: Own) -> None:
        self.config, self.process, self.callbacks = config, process, own.callbacks
        self.loggers = asked_loggers(config)
        self.console = Console(process.is_main)
        self.stop = Stop(speaks=process.is_main)
        checkpoint = f"{sharded_checkpoint.FOLDER}/{sharded_checkpoint.RUN}" if config.fsdp else "checkpoint.pth"
        self.folder = RunFolder(config.output_dir, config.disk_wait * 60, self.console.say, self.stop, checkpoint)
        self.folder.check()
        distributed.main_first(self.folder.lock)
        try:
            self.parts = assemble(config, process, own, self.folder, self.console.say)
        except BaseException:
            self.folder.unlock()
            raise
        self.config = self.parts.config  # with the architecture of --init's weights
        self.niter, self.resumed = self.parts.niter, self.parts.resumed
        self.epochs, self.iteration = self.resumed.epoch, self.resumed.iteration
        self.log = LogFile(self.folder)
        self.judge = Judge(self.parts, self.stop, self.console.say)

    def train(self) -> TrainResult:
        """From the first iteration that is left to the last, or until somebody stops it."""
        with self.stop.listening():
            started = time.perf_counter()
            sinks = self._open_sinks()
            try:
                self._train_epochs(sinks)
            except KeyboardInterrupt:  # by a second signal: no time for curves
                self.console.close()
                raise
            except BaseException:
                with suppress(TrainingError):  # of a sink: what ended the run is what has to be said
                    sinks.close()
                raise
            sinks.close()
            self.parts.gather()
            result = TrainResult(
                epochs=self.epochs,
                before=self.judge.before,
                after=self.judge.latest,
                seconds=time.perf_counter() - started,
                interrupted=self.epochs < self.config.epochs,
                signal=self.stop.signal,
                backbone=self.parts.backbone,
            )
            if self.process.is_main:
                conclude(self.parts, result, self.iteration - self.epochs * self.niter, self.console.say)
            distributed.barrier()
            return result

    def _train_epochs(self, sinks: Sinks) -> None:
        config = self.config
        introduce(self.parts, self.console.say)
        self.judge.start(self.log)
        self.console.start(config.epochs * self.niter, self.iteration, config.epochs)
        while self.epochs < config.epochs and not distributed.any_of(self.stop.requested, self.process.device):
            meter = self._train_epoch(sinks)
            if self.iteration == (self.epochs + 1) * self.niter and self._finish_epoch(meter, sinks):
                continue
            stopped, shards = {"meter": meter.state(), "before": self.judge.before}, self.parts.write_shards()
            distributed.main_first(partial(self.parts.save, self.epochs, self.iteration, stopped, shards))
        if self.resumed.epoch == config.epochs:  # when nothing was left to do
            self.judge.evaluate("of the finished run")

    def close(self) -> None:
        """Let go of the graph, before the process group goes, and of the folder."""
        self.parts.loader.close()
        self.parts.step.close()
        self.folder.unlock()

    def _open_sinks(self) -> Sinks:
        """The first thing that writes: the folder, args.json, and whoever is told the numbers."""
        distributed.main_first(self._open_folder)
        if not self.process.is_main:
            return Sinks([])
        curves = Curves(self.log, self.config.out_dim, self.folder)
        loggers = [logger(self.config, self.niter) for logger in self.loggers]
        watch = Watch(self.config, len(self.parts.source), self.log, self.console.say)
        return Sinks([self.console, self.log, curves, watch, *loggers, *self.callbacks])

    def _open_folder(self) -> None:
        """Make it, and bring to its end the saving of an epoch that was cut short."""
        self.folder.make()
        self.folder.replace("args.json", arguments(self.folder.path, self.config, self.resumed))
        self.log.mend()
        if entry := self.resumed.entry:
            if entry not in self.log.read():
                self.log.epoch(dict(entry))
            self.parts.keep(self.resumed.epoch)

    def _next(self, batches: Iterator[Batch], meter: Meter) -> Batch | None:
        """The next batch; None where somebody stopped the run before it came."""
        asked = time.perf_counter()
        try:
            # Several processes have to agree on where they stop, which they do between steps.
            with self.stop.interruptible() if distributed.is_alone() else nullcontext():
                batch = next(batches)
        except Interrupted:
            return None
        meter.waited += time.perf_counter() - asked
        meter.bad.update(dict.fromkeys(batch.bad))
        self._check_bad(list(meter.bad))
        return batch

    def _train_epoch(self, sinks: Sinks) -> Meter:
        """An epoch, or what is left of it, or the part of it until somebody stops the run; its means."""
        parts, device, epoch = self.parts, self.process.device, self.epochs
        meter = Meter(parts.step.metric_names)
        first_batch = self.iteration - epoch * self.niter
        if first_batch and self.resumed.meter:
            meter.restore(self.resumed.meter)
        meter.bad.update(dict.fromkeys(getattr(parts.source, "damage", ())))  # known when it was opened
        parts.sampler.seek(epoch, first_batch)
        batches = iter(parts.loader)
        pending: list[Sequence[Tensor]] = []
        for i in range(first_batch, self.niter):
            if batch := self._next(batches, meter):
                # Drop-path depends on the iteration alone, so that a resumed run draws what it would have drawn.
                torch.manual_seed(_mix(self.config.seed, self.iteration, self.process.rank))
                pending.append(parts.step(batch.views(device), self.iteration))
                self.iteration += 1
                meter.n_images += parts.batch_size
            if not batch or len(pending) == READ_EVERY[device.type] or i == self.niter - 1:
                self._read_metrics(pending, meter, epoch, sinks)
                pending = []
                if distributed.any_of(self.stop.requested, device):
                    break
        return meter

    def _read_metrics(self, pending: Sequence[Sequence[Tensor]], meter: Meter, epoch: int, sinks: Sinks) -> None:
        """Bring the metrics of the last steps to the host, averaged over processes. Raises where one is not finite."""
        if not pending:
            return
        rows = torch.stack([torch.stack(list(metrics)) for metrics in pending])
        values = distributed.average(rows).cpu().double().numpy()
        names = (*meter.names, "state")
        skips = ("grad_norm",) if self.parts.step.update.scaler else ()  # steps of infinite gradients
        if found := nonfinite_metric(values, names, skips):
            offset, words = found
            raise TrainingError(f"{words} {self.place(self.iteration - len(pending) + offset)}. {ADVICE}")
        sinks.step(meter.step_entry(values[:, :-1], self.iteration, epoch, self.parts.step.schedules))

    def place(self, iteration: int) -> str:
        """Where a run ended, and what is left of it."""
        epoch, step = divmod(iteration, self.niter)
        return f"at epoch {epoch + 1}, step {step + 1} (iteration {iteration}; {self.folder.holds})"

    def _check_bad(self, bad: Sequence[str]) -> None:
        n_images = len(self.parts.source)
        if len(bad) > MAX_BAD * n_images:
            raise TrainingError(
                f"more than {MAX_BAD:.0%} of the images cannot be read ({len(bad)} of {n_images} so far); "
                f"the last: {bad[-1]}"
            )

    def _finish_epoch(self, meter: Meter, sinks: Sinks) -> bool:
        """Evaluate where it is time to, and save; False where somebody stopped the evaluation."""
        bad = sorted({line for lines in distributed.gather(list(meter.bad)) for line in lines})
        self._check_bad(bad)
        found = self.judge.after(self.epochs)
        if found is None:
            return False
        self.epochs += 1
        shards = self.parts.write_shards()
        distributed.main_first(partial(self._commit, meter, bad, found, sinks, shards))
        return True

    def _commit(
        self, meter: Meter, bad: Sequence[str], found: dict[str, float], sinks: Sinks, shards: str | None
    ) -> None:
        """Save the epoch and tell of it.

        The checkpoint holds the epoch's line of the log: once it is written the epoch is done, and what a kill then
        cuts off is made up for when the run resumes.
        """
        epoch = self.epochs - 1
        entry = meter.epoch_entry(epoch, self.niter, self.parts.step.schedules) | {"knn": None} | found
        if epoch == 0:
            entry["knn_before"] = None
            entry |= {f"{name}_before": value for name, value in self.judge.before.items()}
        if bad:
            entry["bad_images"] = len(bad)
            self.folder.replace("bad_images.txt", "\n".join([*bad, ""]))
        self.parts.save(self.epochs, progress={"entry": entry}, shards=shards)
        sinks.epoch(entry)
        self.parts.keep(self.epochs)
        remark(self.parts, meter.seconds, meter.data_wait, bad, self.console.say)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several small ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
