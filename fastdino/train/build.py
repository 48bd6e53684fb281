"""What a run is made of, from its arguments: images, networks, the step, the loader. Nothing here writes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdino import files
from fastdino.data.channels import ImageFormat, converted, open_images
from fastdino.data.digits import load_digits
from fastdino.data.loader import CropLoader, EpochSampler, useful_workers
from fastdino.data.sequences import dataset_source
from fastdino.data.sources import ImageSource
from fastdino.errors import UserError
from fastdino.model import DINOHead, MultiCropWrapper
from fastdino.model.archs import ARCHITECTURES, timm_backbone
from fastdino.objectives import DINOLoss
from fastdino.train import distributed
from fastdino.train.checkpoint import save_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.distributed import Process
from fastdino.train.folder import RunFolder
from fastdino.train.modes import why_no_graph
from fastdino.train.optim import is_fused
from fastdino.train.precision import amp_dtype
from fastdino.train.resume import Resumed, in_words, resume
from fastdino.train.schedules import Schedules
from fastdino.train.sinks import Sink
from fastdino.train.step import TrainStep


@dataclass(frozen=True)
class Own:
    """What a caller in Python brings along instead of flags: see `fastdino.train`."""

    dataset: Any = None
    val_dataset: Any = None
    backbone: nn.Module | None = None
    callbacks: Sequence[Sink] = ()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Of one process. step holds the networks and the loss, on the device; sampler deals out the images."""

    config: TrainConfig
    process: Process
    source: ImageSource
    held_out: ImageSource | None
    sampler: EpochSampler
    step: TrainStep
    loader: CropLoader
    folder: RunFolder
    resumed: Resumed
    is_built_in: bool
    """Whether the backbone is config.arch, and not one of the caller's own."""

    @property
    def model_name(self) -> str:
        """The backbone's."""
        if not self.is_built_in:
            return type(self.backbone).__name__
        return f"{self.config.arch}/{self.config.patch_size}" if self.config.arch in ARCHITECTURES else self.config.arch

    @property
    def niter(self) -> int:
        """Steps of an epoch."""
        return len(self.sampler)

    @property
    def batch_size(self) -> int:
        """Images of a step, of all processes."""
        return self.config.batch_size_per_gpu * self.process.world_size

    @property
    def backbone(self) -> nn.Module:
        """The teacher's: what is evaluated, and what people take away."""
        backbone: nn.Module = self.step.teacher.backbone
        return backbone

    def save(self, epoch: int, iteration: int | None = None, progress: Mapping[str, Any] = {}) -> None:
        """Write checkpoint.pth. epoch: finished epochs; iteration: steps done, where the last epoch is not finished.

        progress: the entry or the meter of `Resumed`.
        """
        step = self.step

        def write(path: Path) -> None:
            save_checkpoint(
                path,
                student=step.student,
                teacher=step.teacher,
                optimizer=step.update.optimizer,
                loss=step.loss,
                epoch=epoch,
                config=self.config,
                scaler=step.update.scaler,
                iteration=iteration,
                progress={
                    **progress,
                    "niter": self.niter,
                    "n_images": len(self.source),
                    "batch_size": self.batch_size,
                },
            )

        self.folder.write(self.folder.checkpoint.name, write)
        self.folder.holds = f"{self.folder.checkpoint} holds " + in_words(
            epoch, (iteration or epoch * self.niter) - epoch * self.niter
        )

    def keep(self, epochs: int) -> None:
        """Every saveckp_freq epochs a copy of checkpoint.pth that stays, unless it is there. epochs: finished ones."""
        every, saved, kept = self.config.saveckp_freq, self.folder.checkpoint, self.folder.kept(epochs - 1)
        is_due = every and (epochs - 1) % every == 0
        if is_due and not (kept.exists() and kept.stat().st_mtime >= saved.stat().st_mtime):
            self.folder.write(kept.name, lambda path: files.copy(saved, path))


def assemble(config: TrainConfig, process: Process, own: Own, folder: RunFolder, say: Callable[[str], object]) -> Parts:
    """All parts of a run, and `say` for what the step has to tell. Raises UserError where they cannot be had."""
    source, held_out = open_sources(config, own.dataset, own.val_dataset)
    sampler = EpochSampler(len(source), config.batch_size_per_gpu, config.seed, process.rank, process.world_size)
    batch_size = config.batch_size_per_gpu * process.world_size
    if len(source) < batch_size:
        raise UserError(
            f"{source.describe()}: fewer than the {batch_size} of one step; "
            f"lower --batch_size_per_gpu (now {config.batch_size_per_gpu}) or add images"
        )
    step = build_step(config, process, len(sampler), build_networks(config, own.backbone), say)
    loader = CropLoader(
        source,
        config.recipe(),
        sampler,
        num_workers=useful_workers(config.num_workers, distributed.local_world_size()),
        device=process.device,
        augment=config.augment,
        dct_scale=config.dct_scale,
        # The kernels have no fp64.
        dtype=torch.float32 if step.run.crop_dtype == torch.float64 else step.run.crop_dtype,
    )
    return Parts(
        config=config,
        process=process,
        folder=folder,
        resumed=resume(config, folder, step, len(sampler), len(source), batch_size),
        source=source,
        held_out=held_out,
        sampler=sampler,
        step=step,
        loader=loader,
        is_built_in=own.backbone is None,
    )


def _own(val_dataset: Any, wanted: ImageFormat) -> ImageSource | None:
    return None if val_dataset is None else dataset_source(val_dataset, "val_dataset", wanted)


def open_sources(
    config: TrainConfig, dataset: Any = None, val_dataset: Any = None
) -> tuple[ImageSource, ImageSource | None]:
    """(images to train on, held-out images or None): datasets of one's own, --data_path and --val_path, or the digits.

    Raises UserError where there are none, or the two do not have the same classes.
    """
    wanted = config.image_format
    if dataset is not None:
        return dataset_source(dataset, "dataset", wanted), _own(val_dataset, wanted)
    if config.data_path is None:
        train, test = load_digits()
        return converted(train, wanted), converted(test, wanted)
    source = open_images(config.data_path, wanted)
    if config.val_path is None:
        return source, _own(val_dataset, wanted)
    held_out = open_images(config.val_path, wanted)
    if list(held_out.classes) != list(source.classes) or not source.classes:
        raise UserError(
            f"--val_path: expected the class folders of --data_path ({', '.join(source.classes) or 'none'}), "
            f"got {', '.join(held_out.classes) or 'none'}"
        )
    return source, held_out


def build_networks(config: TrainConfig, backbone: nn.Module | None = None) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """(student, its frozen copy as teacher): only the student has drop-path and a say about the prototypes' lengths.

    backbone: the student's, instead of config.arch; the teacher gets a copy. Raises UserError where it has no
    embed_dim.
    """
    if backbone is not None and not isinstance(getattr(backbone, "embed_dim", None), int):
        raise UserError(
            f"backbone: expected a module with an integer embed_dim, the width of its features; "
            f"got {type(backbone).__name__}"
        )

    def network(of: Any, norm_last_layer: bool) -> MultiCropWrapper:
        head = DINOHead(
            of.embed_dim,
            config.out_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=norm_last_layer,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
        )
        return MultiCropWrapper(of, head)

    def built(drop_path_rate: float) -> nn.Module:
        if config.arch not in ARCHITECTURES:
            return timm_backbone(config.arch, drop_path_rate, config.channels)
        for name, size in (("global", config.global_crops_size), ("local", config.local_crops_size)):
            if config.patch_size > size and (name == "global" or config.local_crops_number):
                raise UserError(f"--patch_size: expected at most --{name}_crops_size={size}, got {config.patch_size}")
        return ARCHITECTURES[config.arch](
            config.patch_size,
            img_size=[config.global_crops_size],
            in_chans=config.channels,
            drop_path_rate=drop_path_rate,
            drop_path_mode=config.drop_path_mode,
            checkpointing=config.checkpointing,
        )

    torch.manual_seed(config.seed)
    student = network(backbone or built(config.drop_path_rate), config.norm_last_layer)
    teacher = network(copy.deepcopy(backbone) if backbone else built(0.0), True)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def build_step(
    config: TrainConfig,
    process: Process,
    niter_per_ep: int,
    networks: tuple[MultiCropWrapper, MultiCropWrapper],
    say: Callable[[str], object],
) -> TrainStep:
    """The step on the process's device. Raises UserError for a mode, precision or backend that cannot be there."""
    device = process.device
    precision = amp_dtype(config, device)
    no_graph = why_no_graph(device, is_fused(config.optimizer, precision))
    if config.step == "graph" and no_graph:
        raise UserError(f"--step: graph needs {no_graph}; use auto, compiled or eager")
    automatic = "eager" if device.type != "cuda" else "compiled" if no_graph else "graph"
    mode = automatic if config.step == "auto" else config.step
    if config.compile != "default" and mode == "eager":
        raise UserError(f"--compile: {config.compile} needs a step that is compiled; use --step compiled, or graph")
    for network in networks:
        distributed.synchronize_batchnorm(network, process)
        network.to(device)
    loss = DINOLoss(
        config.out_dim,
        config.ncrops,
        config.warmup_teacher_temp,
        config.teacher_temp,
        config.warmup_teacher_temp_epochs,
        config.epochs,
    ).to(device)
    try:
        step = TrainStep(
            student=networks[0],
            teacher=networks[1],
            loss=loss,
            optimizer=config.optimizer,
            schedules=Schedules.of(config, niter_per_ep, process.world_size),
            niter_per_ep=niter_per_ep,
            clip_grad=config.clip_grad,
            freeze_last_layer=config.freeze_last_layer,
            amp_dtype=precision,
            mode=mode,
            accumulate=config.accumulate,
            attention_backend=config.attention,
            mlp=config.mlp,
            effort=config.compile,
            say=say,
        )
        sides = [config.global_crops_size] * 2 + [config.local_crops_size] * config.local_crops_number
        n, channels = config.batch_size_per_gpu, config.channels
        step.prepare([torch.empty(n, channels, side, side, device="meta") for side in sides])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return step
