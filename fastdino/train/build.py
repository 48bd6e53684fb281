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
from fastdino.model import MultiCrop
from fastdino.model.archs import ARCHITECTURES
from fastdino.train import distributed, preset, sharded_checkpoint
from fastdino.train.checkpoint import load_checkpoint, save_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.distributed import Process
from fastdino.train.folder import RunFolder
from fastdino.train.initial import start_from
from fastdino.train.learning import build_masks, build_objective, build_schedules, build_tuning
from fastdino.train.modes import why_no_graph
from fastdino.train.networks import build_networks
from fastdino.train.optim import is_fused
from fastdino.train.precision import amp_dtype
from fastdino.train.recipes import OF_THE_WEIGHTS
from fastdino.train.resume import Resumed, in_words, resume
from fastdino.train.sharding import gather_into, shard
from fastdino.train.sinks import Sink
from fastdino.train.step import TrainStep


@dataclass(frozen=True)
class Own:
    """What a caller in Python brings along instead of flags: see `fastdino.train`.

    source: the images to train on, where somebody has opened them already.
    """

    dataset: Any = None
    val_dataset: Any = None
    backbone: nn.Module | None = None
    callbacks: Sequence[Sink] = ()
    source: ImageSource | None = None


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
    start: Sequence[str]
    """What there is to say of the weights it starts from; nothing without any."""
    is_built_in: bool
    """Whether the backbone is config.arch, and not one of the caller's own."""
    whole: nn.Module | None
    """The teacher's backbone in one piece, on the main process of a run whose networks are in parts."""

    @property
    def model_name(self) -> str:
        """The backbone's."""
        if not self.is_built_in:
            return type(self.backbone).__name__
        arch, patch_size = self.config.arch, self.config.patch_size
        if arch == OF_THE_WEIGHTS:
            return f"a ViT/{patch_size}"
        return f"{arch}/{patch_size}" if arch in ARCHITECTURES else arch

    @property
    def preset(self) -> dict[str, Any]:
        """What --preset small gives for the images, by flag; nothing where the run has another."""
        config = self.config
        return preset.values(self.source, self.process.world_size, config.recipe) if config.preset == "small" else {}

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
        backbone: nn.Module = self.step.teacher.backbone if self.whole is None else self.whole
        return backbone

    def gather(self) -> None:
        """Bring `backbone` up to date, where the networks are in parts. All processes take part."""
        if self.config.fsdp:
            gather_into(self.step.teacher.backbone, self.whole)

    def write_shards(self) -> str | None:
        """Write what is in parts, before `save` tells of it: where. All processes take part. None in one piece."""
        if not self.config.fsdp:
            return None
        step = self.step
        tensors = sharded_checkpoint.in_parts(step.student, step.teacher, step.update.optimizer)
        return sharded_checkpoint.write(self.folder.checkpoint.parent, tensors)

    def save(
        self,
        epoch: int,
        iteration: int | None = None,
        progress: Mapping[str, Any] = {},
        shards: str | None = None,
    ) -> None:
        """Write the checkpoint. epoch: finished epochs; iteration: steps done, where the last epoch is not finished.

        progress: the entry or the meter of `Resumed`. shards: what `write_shards` returned.
        """
        step, saved = self.step, self.folder.checkpoint

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
                shards=shards,
                progress={
                    **progress,
                    "niter": self.niter,
                    "n_images": len(self.source),
                    "batch_size": self.batch_size,
                },
            )

        self.folder.write(str(saved.relative_to(self.folder.path)), write)
        if shards:
            sharded_checkpoint.remove_others(saved.parent, shards)
        self.folder.holds = f"{saved} holds " + in_words(epoch, (iteration or epoch * self.niter) - epoch * self.niter)

    def keep(self, epochs: int) -> None:
        """Every saveckp_freq epochs a copy of checkpoint.pth that stays, unless it is there. epochs: finished ones."""
        every, saved, kept = self.config.saveckp_freq, self.folder.checkpoint, self.folder.kept(epochs - 1)
        is_due = every and (epochs - 1) % every == 0
        if is_due and not (kept.exists() and kept.stat().st_mtime >= saved.stat().st_mtime):
            self.folder.write(kept.name, self.consolidate if self.config.fsdp else lambda path: files.copy(saved, path))

    def consolidate(self, path: Path) -> None:
        """Write the checkpoint of networks in parts as one file in the original's format."""
        whole = load_checkpoint(self.folder.checkpoint.parent)
        files.replace(path, lambda file: torch.save(whole, file))


def assemble(config: TrainConfig, process: Process, own: Own, folder: RunFolder, say: Callable[[str], object]) -> Parts:
    """All parts of a run, and `say` for what the step has to tell. Raises UserError where they cannot be had."""
    if config.init and own.backbone is not None:
        raise UserError("--init: expected no backbone of one's own beside it")
    config, initial = start_from(config, folder)
    source, held_out = open_sources(config, own.dataset, own.val_dataset, own.source)
    sampler = EpochSampler(len(source), config.batch_size_per_gpu, config.seed, process.rank, process.world_size)
    batch_size = config.batch_size_per_gpu * process.world_size
    if len(source) < batch_size:
        raise UserError(
            f"{source.describe()}: fewer than the {batch_size} of one step; "
            f"lower --batch_size_per_gpu (now {config.batch_size_per_gpu}) or add images"
        )
    networks = build_networks(config, own.backbone, initial)
    whole = copy.deepcopy(networks[1].backbone).to(process.device) if config.fsdp and process.is_main else None
    step = build_step(config, process, len(sampler), networks, say)
    loader = CropLoader(
        source,
        config.crops(),
        sampler,
        num_workers=useful_workers(config.num_workers, distributed.local_world_size()),
        device=process.device,
        augment=config.augment,
        dct_scale=config.dct_scale,
        # The kernels have no fp64.
        dtype=torch.float32 if step.run.crop_dtype == torch.float64 else step.run.crop_dtype,
        masks=build_masks(config),
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
        start=initial.describe(config) if initial else (),
        is_built_in=own.backbone is None,
        whole=whole,
    )


def _own(val_dataset: Any, wanted: ImageFormat) -> ImageSource | None:
    return None if val_dataset is None else dataset_source(val_dataset, "val_dataset", wanted)


def open_sources(
    config: TrainConfig, dataset: Any = None, val_dataset: Any = None, opened: ImageSource | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """(images to train on, held-out images or None): datasets of one's own, --data_path and --val_path, or the digits.

    opened: the former, where they are open already. Raises UserError where there are none, or the two do not have the
    same classes.
    """
    wanted = config.image_format
    if dataset is not None:
        return opened or dataset_source(dataset, "dataset", wanted), _own(val_dataset, wanted)
    if config.data_path is None:
        train, test = load_digits()
        return converted(train, wanted), converted(test, wanted)
    source = opened or open_images(config.data_path, wanted)
    if config.val_path is None:
        return source, _own(val_dataset, wanted)
    try:
        held_out = open_images(config.val_path, wanted)
    except UserError as error:
        raise UserError(f"--val_path: {error}") from None
    if list(held_out.classes) != list(source.classes) or not source.classes:
        raise UserError(
            f"--val_path: expected the class folders of --data_path ({', '.join(source.classes) or 'none'}), "
            f"got {', '.join(held_out.classes) or 'none'}"
        )
    return source, held_out


def build_step(
    config: TrainConfig,
    process: Process,
    niter_per_ep: int,
    networks: tuple[MultiCrop, MultiCrop],
    say: Callable[[str], object],
) -> TrainStep:
    """The step on the process's device. Raises UserError for a mode, precision or backend that cannot be there."""
    device = process.device
    precision = amp_dtype(config, device)
    replays = config.accumulate > 1 and config.recipe != "dino"
    no_graph = why_no_graph(device, is_fused(config.optimizer, precision), replays)
    if config.step == "graph" and no_graph:
        raise UserError(f"--step: graph needs {no_graph}; use auto, compiled or eager")
    if config.fsdp and process.world_size == 1:
        raise UserError("--fsdp: expected several processes: torchrun --nproc_per_node=GPUS -m fastdino.train ...")
    if config.fsdp and precision == torch.float16:
        raise UserError("--fsdp: needs a GPU with bf16, or --use_fp16 false")
    automatic = "eager" if device.type != "cuda" or config.fsdp else "compiled" if no_graph else "graph"
    mode = automatic if config.step == "auto" else config.step
    if config.compile != "default" and mode == "eager":
        raise UserError(f"--compile: {config.compile} needs a step that is compiled; use --step compiled, or graph")
    for network in networks:
        distributed.synchronize_batchnorm(network, process)
        if not config.fsdp:  # it moves part by part
            network.to(device)
    loss = build_objective(config, networks[1], niter_per_ep, precision).to(device)
    for network in networks if config.fsdp else ():
        shard(network, process, precision)
    try:
        step = TrainStep(
            student=networks[0],
            teacher=networks[1],
            loss=loss,
            optimizer=config.optimizer,
            schedules=build_schedules(config, niter_per_ep, process.world_size),
            niter_per_ep=niter_per_ep,
            clip_grad=config.clip_grad,
            freeze_last_layer=config.freeze_last_layer if config.recipe == "dino" else 0,
            freeze_backbone=config.freeze_backbone_epochs,
            tuning=build_tuning(config, networks[0]),
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
