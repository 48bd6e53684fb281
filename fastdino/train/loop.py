"""A training run from arguments to pictures: prepare and check, iterate, evaluate, save, resume, stop."""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from fastdino.data.decode import BadImage, decode
from fastdino.data.digits import load_digits
from fastdino.data.loader import MAX_BAD, Batch, CropLoader, EpochSampler, useful_workers
from fastdino.data.sources import ImageSource, open_source
from fastdino.errors import TrainingError, UserError
from fastdino.eval.attention_maps import draw_attention
from fastdino.eval.knn import extract_features, knn_accuracy
from fastdino.loss import DINOLoss
from fastdino.model import ARCHITECTURES, DINOHead, MultiCropWrapper, VisionTransformer
from fastdino.train import distributed, memory
from fastdino.train.checkpoint import load_checkpoint, restore, save_checkpoint
from fastdino.train.config import TrainConfig, check_writable, command_line
from fastdino.train.distributed import Process
from fastdino.train.log import Entry, LogFile, Reporter, draw_curves
from fastdino.train.schedules import Schedules
from fastdino.train.step import StepMetrics, TrainStep

READ_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the metrics: on a GPU, each look waits for it
REDRAW_AFTER = 60.0  # seconds between drawings of the curves during a run
MUCH_WAITING = 0.1  # of an epoch's time: more of it spent on waiting for data is worth a word
SHORT_EPOCH = 10.0  # seconds: in less, the first batch is most of the waiting
NAMED_BAD = 3  # unreadable files named on the console; log.txt names all


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. k-NN accuracies in [0, 1], None without labels; seconds of this session."""

    epochs: int
    knn_before: float | None
    knn_after: float | None
    seconds: float
    interrupted: bool


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, in this process or, under a launcher, together with its siblings.

    Raises UserError before anything is written where the run cannot be (no images, another model's checkpoint ...),
    TrainingError where it cannot go on (non-finite loss, too many unreadable images, memory that does not suffice).
    """
    process = distributed.start(config.device, config.dist_url)
    run: _Run | None = None
    try:
        run = _Run(config, process)
        return run.train()
    except (RuntimeError, MemoryError) as error:
        if (shortage := memory.shortage(error)) is None:
            raise
        where = run.place(run.iteration) if run else "before the first step"
        raise TrainingError(f"out of memory {where}: {shortage}. {memory.advice(config)}") from error
    finally:
        distributed.stop()


def build_networks(config: TrainConfig) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """(student, its frozen copy as teacher): only the student has drop-path and a say about the prototypes' lengths."""

    def network(drop_path_rate: float, norm_last_layer: bool) -> MultiCropWrapper:
        backbone = ARCHITECTURES[config.arch](
            config.patch_size,
            img_size=[config.global_crops_size],
            drop_path_rate=drop_path_rate,
            drop_path_mode=config.drop_path_mode,
            checkpointing=config.checkpointing,
        )
        head = DINOHead(
            backbone.embed_dim,
            config.out_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=norm_last_layer,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
        )
        return MultiCropWrapper(backbone, head)

    torch.manual_seed(config.seed)
    student, teacher = network(config.drop_path_rate, config.norm_last_layer), network(0.0, True)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def amp_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for fp32: where it is switched off, and on a CPU that was not asked."""
    if not config.use_fp16:
        return None
    if device.type != "cuda":
        return torch.bfloat16 if config.amp_dtype == "bf16" else None
    if config.amp_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[config.amp_dtype]


def open_sources(config: TrainConfig) -> tuple[ImageSource, ImageSource | None]:
    """(images to train on, held-out images or None)."""
    if config.data_path is None:
        return load_digits()
    source = open_source(config.data_path)
    if config.val_path is None:
        return source, None
    held_out = open_source(config.val_path)
    if list(held_out.classes) != list(source.classes) or not source.classes:
        raise UserError(
            f"--val_path: expected the class folders of --data_path ({', '.join(source.classes) or 'none'}), "
            f"got {', '.join(held_out.classes) or 'none'}"
        )
    return source, held_out


class _Stop:
    """Whether somebody asked the run to end. The first Ctrl-C (or SIGTERM) asks, the second insists."""

    requested = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while the run iterates; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Meter:
    """Averages of one epoch, and how its time was spent."""

    def __init__(self) -> None:
        self.sums = np.zeros(len(StepMetrics._fields))
        self.n_steps = self.n_images = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def images_per_s(self) -> float:
        return self.n_images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        return self.waited / max(self.seconds, 1e-9)


class _Run:
    """The parts of a run. Making one checks everything and writes nothing."""

    def __init__(self, config: TrainConfig, process: Process) -> None:
        self.config, self.process = config, process
        self.folder = Path(config.output_dir)
        check_writable(self.folder)
        self.source, self.held_out = open_sources(config)
        self.sampler = EpochSampler(
            len(self.source), config.batch_size_per_gpu, config.seed, process.rank, process.world_size
        )
        self.batch_size = config.batch_size_per_gpu * process.world_size
        if len(self.source) < self.batch_size:
            raise UserError(
                f"{self.source.describe()}: fewer than the {self.batch_size} of one step; "
                f"lower --batch_size_per_gpu (now {config.batch_size_per_gpu}) or add images"
            )
        self.niter = len(self.sampler)

        device = process.device
        self.student, self.teacher = build_networks(config)
        for network in (self.student, self.teacher):
            distributed.synchronize_batchnorm(network, process)
            network.to(device)
        self.loss = DINOLoss(
            config.out_dim,
            config.ncrops,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
        ).to(device)
        self.reporter = Reporter(process.is_main)
        mode = config.step if config.step != "auto" else "graph" if device.type == "cuda" else "eager"
        try:
            self.step = TrainStep(
                student=self.student,
                teacher=self.teacher,
                loss=self.loss,
                optimizer=config.optimizer,
                schedules=Schedules.of(config, self.niter, process.world_size),
                niter_per_ep=self.niter,
                clip_grad=config.clip_grad,
                freeze_last_layer=config.freeze_last_layer,
                amp_dtype=amp_dtype(config, device),
                mode=mode,
                accumulate=config.accumulate,
                attention_backend=config.attention,
                say=self.reporter.say,
            )
        except ValueError as error:
            raise UserError(f"--{error}") from error
        self.checkpoint_path = self.folder / "checkpoint.pth"
        self.iteration = self._resume() if config.resume and self.checkpoint_path.is_file() else 0

        self.num_workers = useful_workers(config.num_workers, distributed.local_world_size())
        self.loader = CropLoader(
            self.source,
            config.recipe(),
            self.sampler,
            num_workers=self.num_workers,
            device=device,
            augment=config.augment,
            dct_scale=config.dct_scale,
        )
        self.log = LogFile(self.folder / "log.txt")
        self.stop = _Stop()
        self.stopped = False
        self.knn_before: float | None = None
        self.drawn_at = time.perf_counter()

    def _resume(self) -> int:
        """Restore the output folder's checkpoint; the iteration to go on from."""
        checkpoint = load_checkpoint(self.checkpoint_path)
        try:
            restore(
                checkpoint,
                student=self.student,
                teacher=self.teacher,
                optimizer=self.step.optimizer,
                loss=self.loss,
                scaler=self.step.scaler,
            )
            self.step.refresh_copies()
        except UserError as error:
            raise UserError(
                f"cannot resume from {self.checkpoint_path} (--resume false starts anew): {error}"
            ) from error
        first = int(checkpoint["epoch"]) * self.niter
        iteration = int(checkpoint.get("iteration", first))
        return iteration if first <= iteration < first + self.niter else first

    # --- the run ---------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        started = time.perf_counter()
        config, first_epoch = self.config, self.iteration // self.niter
        if self.process.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
            self.log.keep_before(first_epoch)
        self._introduce()
        past = self.log.read() if self.process.is_main else []
        self.knn_before = past[0].get("knn_before") if past else None
        if self.iteration == 0:
            self.knn_before = self._evaluate("before training")
        knn: float | None = None
        self.reporter.start(config.epochs * self.niter, self.iteration)
        try:
            with self.stop.listening():
                for epoch in range(first_epoch, config.epochs):
                    meter, bad = self._train_epoch(epoch)
                    if self.iteration < (epoch + 1) * self.niter:
                        break
                    self._save(epoch + 1)
                    knn = self._finish_epoch(epoch, meter, bad)
                    if self.stopped:
                        break
        finally:
            self.reporter.stop()
            self.loader.close()
        interrupted = self.iteration < config.epochs * self.niter
        if interrupted:
            self._save(self.iteration // self.niter, self.iteration)
        elif first_epoch == config.epochs:  # resumed when nothing was left to do
            knn = self._evaluate("of the finished run")
        seconds = time.perf_counter() - started
        if self.process.is_main:
            self._conclude(knn, seconds, interrupted)
        distributed.barrier()
        return TrainResult(self.iteration // self.niter, self.knn_before, knn, seconds, interrupted)

    def _train_epoch(self, epoch: int) -> tuple[_Meter, list[str]]:
        """One epoch, or the part of it until somebody stops the run; (averages, lines about unreadable images)."""
        config, meter, bad = self.config, _Meter(), dict[str, None]()
        first_batch = self.iteration - epoch * self.niter
        self.sampler.seek(epoch, first_batch)
        batches = iter(self.loader)
        pending: list[StepMetrics] = []
        for i in range(first_batch, self.niter):
            asked = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - asked
            bad.update(dict.fromkeys(batch.bad))
            self._check_bad(list(bad))
            # Drop-path depends on the iteration alone, so that a resumed run draws what it would have drawn.
            torch.manual_seed(_mix(config.seed, self.iteration, self.process.rank))
            pending.append(self.step(self._to_device(batch), self.iteration))
            self.iteration += 1
            meter.n_images += self.batch_size
            if len(pending) == READ_EVERY[self.process.device.type] or i == self.niter - 1:
                self._read_metrics(pending, meter)
                loss = meter.sums[0] / meter.n_steps
                self.reporter.update(self.iteration, epoch, config.epochs, loss, meter.images_per_s, meter.data_wait)
                pending = []
                self.stopped = distributed.any_of(self.stop.requested, self.process.device)
                if self.stopped:
                    break
        return meter, list(bad)

    def _to_device(self, batch: Batch) -> list[Tensor]:
        """V normalised crops (B, 3, H, W), globals first."""
        return batch.crops(self.process.device)

    def _read_metrics(self, pending: list[StepMetrics], meter: _Meter) -> None:
        """Bring the metrics of the last steps to the host, averaged over processes. Raises on a non-finite loss."""
        values = distributed.average(torch.stack([torch.stack(metrics) for metrics in pending])).cpu().double().numpy()
        for offset, loss in enumerate(values[:, 0]):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} {self.place(self.iteration - len(pending) + offset)}. "
                    "Try a smaller --lr, a longer --warmup_epochs, --clip_grad 0.3, or --use_fp16 false"
                )
        meter.sums += values.sum(0)
        meter.n_steps += len(values)

    def place(self, iteration: int) -> str:
        """Where a run ended, and what is left of it."""
        epoch, step = divmod(iteration, self.niter)
        kept = f"{self.checkpoint_path} holds epoch {epoch}" if epoch else "no epoch was finished"
        return f"at epoch {epoch + 1}, step {step + 1} (iteration {iteration}; {kept})"

    def _check_bad(self, bad: list[str]) -> None:
        if len(bad) > MAX_BAD * len(self.source):
            raise TrainingError(
                f"more than {MAX_BAD:.0%} of the images cannot be read ({len(bad)} of {len(self.source)} so far); "
                f"the last: {bad[-1]}"
            )

    # --- between epochs --------------------------------------------------------------------------------------

    def _save(self, epoch: int, iteration: int | None = None) -> None:
        """Write checkpoint.pth, and every saveckp_freq epochs the one that stays. epoch: finished epochs."""
        if not self.process.is_main:
            return
        paths = [self.checkpoint_path]
        if iteration is None and self.config.saveckp_freq and (epoch - 1) % self.config.saveckp_freq == 0:
            paths.append(self.folder / f"checkpoint{epoch - 1:04}.pth")
        for path in paths:
            save_checkpoint(
                path,
                student=self.student,
                teacher=self.teacher,
                optimizer=self.step.optimizer,
                loss=self.loss,
                epoch=epoch,
                config=self.config,
                scaler=self.step.scaler,
                iteration=iteration,
            )

    def _finish_epoch(self, epoch: int, meter: _Meter, bad: list[str]) -> float | None:
        """Log the epoch, evaluate where it is time to; the k-NN accuracy if it was measured."""
        config, last = self.config, epoch == self.config.epochs - 1
        bad = sorted(set(distributed.gather_lists(bad)))
        self._check_bad(bad)
        knn = None
        if last or (config.knn_freq and (epoch + 1) % config.knn_freq == 0):
            knn = self._evaluate()
        if not self.process.is_main:
            return None
        span = slice(epoch * self.niter, (epoch + 1) * self.niter)
        schedules, averages = self.step.schedules, meter.sums / meter.n_steps
        entry: Entry = {
            "train_loss": averages[0],
            "train_lr": float(schedules.lr[span].mean()),
            "train_wd": float(schedules.weight_decay[span].mean()),
            "epoch": epoch,
            "train_teacher_entropy": averages[1],
            "train_kl": averages[2],
            "train_momentum": float(schedules.momentum_teacher[span].mean()),
            "images_per_s": round(meter.images_per_s, 1),
            "data_wait": round(meter.data_wait, 4),
            "knn": knn,
        }
        if epoch == 0:
            entry["knn_before"] = self.knn_before
        if bad:
            entry["bad_images"] = bad
        self.log.append(entry)
        self.reporter.say(
            f"epoch {epoch + 1:>{len(str(config.epochs))}}/{config.epochs}  loss {averages[0]:.4f}  "
            f"teacher entropy {averages[1]:.3f}  {meter.images_per_s:,.0f} img/s  "
            f"{meter.data_wait:.0%} waiting for data" + (f"  k-NN {knn:.4f}" if knn is not None else "")
        )
        if meter.data_wait > MUCH_WAITING and meter.seconds > SHORT_EPOCH:
            self.reporter.say(f"  {meter.data_wait:.0%} of the time went into waiting for data: {self.loader.advice()}")
        if bad:
            named = "; ".join(bad[:NAMED_BAD]) + ("; ..." if len(bad) > NAMED_BAD else "")
            self.reporter.say(
                f"  skipped {len(bad)} unreadable of {len(self.source):,} images (named in log.txt): {named}"
            )
        if time.perf_counter() - self.drawn_at > REDRAW_AFTER:
            self._draw()
        return knn

    def _evaluate(self, when: str = "") -> float | None:
        """k-NN accuracy of the teacher's backbone, on the main process; None without labels."""
        accuracy = None
        if self.process.is_main and self.source.labels is not None and self.config.knn_freq:
            resize, size = self.config.eval_size
            options = {
                "resize": resize,
                "size": size,
                "limit": self.config.knn_images,
                "num_workers": self.num_workers if self.config.data_path else 0,
            }
            bank = extract_features(self.teacher.backbone, self.source, **options)
            queries = extract_features(self.teacher.backbone, self.held_out, **options) if self.held_out else None
            accuracy = knn_accuracy(bank, queries, self.config.knn_k)
            if when:
                self.reporter.say(f"k-NN {when}: {accuracy:.4f}")
        distributed.barrier()
        return accuracy

    # --- words and pictures ----------------------------------------------------------------------------------

    def _introduce(self) -> None:
        config, say = self.config, self.reporter.say
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.step.amp_dtype]
        n_params = sum(p.numel() for p in self.student.backbone.parameters()) / 1e6
        say(f"data    {self.source.describe()}")
        if self.held_out:
            say(f"        {self.held_out.describe()}")
        say(f"model   {config.arch}/{config.patch_size}, {n_params:.1f} M parameters, {config.out_dim:,} prototypes")
        say(
            f"crops   2 x {config.global_crops_size} px + {config.local_crops_number} x {config.local_crops_size} px, "
            f"{self.batch_size} images a step"
        )
        say(f"loading {self.loader.describe()}")
        processes = f" x {self.process.world_size} processes" if self.process.world_size > 1 else ""
        workers = f"{self.num_workers} loading thread{'' if self.num_workers == 1 else 's'}"
        fewer = f" (of {config.num_workers}: one per core)" if self.num_workers < config.num_workers else ""
        say(
            f"run     {config.epochs} epochs x {self.niter} steps of {config.optimizer} on {self.process.device}"
            f"{processes}, {precision}, {workers}{fewer}"
        )
        if self.iteration:
            epoch, step = divmod(self.iteration, self.niter)
            say(f"resumed {self.checkpoint_path} after {epoch} epochs" + (f" and {step} steps" if step else ""))

    def _draw(self) -> None:
        draw_curves(self.log.read(), self.config.out_dim, self.folder / "curves.png")
        self.drawn_at = time.perf_counter()

    def _draw_attention(self) -> None:
        """attention.png over images spread evenly over the held-out set, or over the training set."""
        source = self.held_out or self.source
        n = min(self.config.attention_images, len(source))
        images = []
        for index in np.linspace(0, len(source) - 1, n).astype(int):
            try:
                images.append(decode(source[int(index)]))
            except (BadImage, OSError):
                continue
        if images:
            backbone = self.teacher.backbone
            assert isinstance(backbone, VisionTransformer)
            draw_attention(backbone, images, self.folder / "attention.png", *self.config.eval_size)

    def _conclude(self, knn: float | None, seconds: float, interrupted: bool) -> None:
        say = self.reporter.say
        self._draw()
        self._draw_attention()
        if interrupted:
            epoch, step = divmod(self.iteration, self.niter)
            say(f"stopped in epoch {epoch + 1} after {step} of {self.niter} steps; saved {self.checkpoint_path}")
            say(f"resume with: {command_line(self.config, self.process.world_size)}")
            return
        if knn is not None:
            before = f"{self.knn_before:.4f} before training, " if self.knn_before is not None else ""
            on = f"{len(self.held_out)} held-out images" if self.held_out else "the training images, leave-one-out"
            say(f"k-NN on {on}: {before}{knn:.4f} after; {seconds:.0f} s")
        names = ["checkpoint.pth", "log.txt", "args.json", "curves.png", "attention.png"]
        say("wrote " + ", ".join(str(self.folder / name) for name in names if (self.folder / name).is_file()))


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several small ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
