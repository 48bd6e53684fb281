"""What a run says of itself: at the start, after an epoch that had something to remark on, and at the end."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastdino import files
from fastdino.data.remarks import remarks
from fastdino.errors import some_of
from fastdino.eval import TITLES
from fastdino.eval.attention_maps import draw_samples
from fastdino.model.archs import TIMM
from fastdino.train.build import Parts
from fastdino.train.command_line import command_line
from fastdino.train.config import TrainConfig
from fastdino.train.preset import is_small
from fastdino.train.result import TrainResult
from fastdino.train.resume import HARMLESS, in_words, shown

BACKBONE = "backbone.pth"  # the teacher's backbone alone, as the original publishes its own
MUCH_WAITING = 0.1  # warn when loading takes more than this share of an epoch
SHORT_EPOCH = 10.0  # seconds: in less, the first batch is most of the waiting

Say = Callable[[str], object]


def introduce(parts: Parts, say: Say) -> None:
    """What is about to be trained, on what, and how."""
    config, process, step = parts.config, parts.process, parts.step
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[step.run.amp_dtype]
    name = parts.model_name
    whole, backbone = (sum(p.numel() for p in of.parameters()) / 1e6 for of in (parts.step.student, parts.backbone))
    say(f"data    {parts.source.describe()}")
    for line in remarks(parts.source):
        say(f"        {line}")
    if parts.held_out:
        say(f"        {parts.held_out.describe()}")
    _tell_of_preset(parts, say)
    say(f"model   {name}, {backbone:.1f} M backbone + {whole - backbone:.1f} M head, {config.out_dim:,} prototypes")
    for i, line in enumerate(parts.start):
        say(f"{'        ' if i else 'start   '}{line}")
    say(
        f"crops   2 x {config.global_crops_size} px + {config.local_crops_number} x {config.local_crops_size} px, "
        f"{parts.batch_size} images a step"
    )
    if config.recipe != "dino":
        say(f"recipe  {_recipe(config)}")
    say(f"loading {parts.loader.describe()}")
    processes = f" x {process.world_size} processes" if process.world_size > 1 else ""
    n_threads = parts.loader.num_workers
    workers = _several(n_threads, "loading thread")
    fewer = f" (of {config.num_workers}: one per core)" if n_threads < config.num_workers else ""
    say(
        f"run     {_several(config.epochs, 'epoch')} x {_several(parts.niter, 'step')} of {config.optimizer}"
        f" on {process.device}{processes}, {precision}, {workers}{fewer}"
    )
    tuned = ", tuned" if config.compile == "max" else ""
    kernels = "".join(f"; {name} {choice}" for name, choice in (step.kernels or {}).items())
    say(f"step    {step.mode}{tuned}{kernels}")
    if parts.resumed.iteration or parts.resumed.changes or parts.resumed.notes:
        _tell_of_resume(parts, say)


def _recipe(config: TrainConfig) -> str:
    """What is learned besides DINO's own, in words."""
    low, high = config.mask_ratio
    masked = f"{config.mask_probability:.0%} of the global crops have {low:.0%} to {high:.0%} of their patches masked"
    heads = f"a head of {config.ibot_out_dim:,} for patches" if config.ibot_out_dim else "one head"
    words = f"{config.recipe}: {masked}, {heads}, {config.centering}, KoLeo {config.koleo_weight:g}"
    seen = f" of crops of {config.gram_crops_size} px" if config.gram_crops_size else ""
    later = "which then takes more time and memory"
    return words + (f", Gram{seen} after {_several(config.gram_start, 'epoch')}, {later}" if config.gram_start else "")


def _tell_of_preset(parts: Parts, say: Say) -> None:
    """Whose defaults the run has, where the images are few: why, how to have the others, and which flags win."""
    config, n = parts.config, f"{len(parts.source):,} images"
    if config.preset == "small":
        preset = parts.preset
        whose = "main_dino's" if config.recipe == "dino" else f"{config.recipe}'s own"
        say(f"preset  small, for {n}; {whose} defaults: --preset none")
        if own := [name for name, value in preset.items() if getattr(config, name) != value]:
            say("        flags that were given win over it: " + ", ".join(f"--{name}" for name in own))
    elif config.preset == "auto" and is_small(parts.source):
        say(f"preset  none, as flags of a recipe are given; --preset small sets the others for {n}")


def _tell_of_resume(parts: Parts, say: Say) -> None:
    """Where it goes on, and in one block what is not as it was."""
    resumed, epochs = parts.resumed, parts.config.epochs
    steps = resumed.iteration - resumed.epoch * parts.niter
    say(f"resumed {parts.folder.checkpoint} after {in_words(resumed.epoch, steps)}")
    for note in resumed.notes:
        say(f"        {note}")
    for i, change in enumerate(shown(resumed.changes, resumed.changes.keys() - HARMLESS)):
        say(f"{'        ' if i else 'changed '}{change}")
    if harmless := [name for name in resumed.changes if name in HARMLESS]:
        say(f"        --{', --'.join(harmless)} changed, too, which makes no difference to what is learned")
    if resumed.epoch >= epochs:
        say(f"        nothing is left to train: {in_words(resumed.epoch)} of {epochs} are done")
        say("        a larger --epochs trains on, another --output_dir or --resume false starts anew")


def remark(parts: Parts, seconds: float, data_wait: float, bad: Sequence[str], say: Say) -> None:
    """After an epoch of so many seconds: what to do about the waiting, which images were left out."""
    if data_wait > MUCH_WAITING and seconds > SHORT_EPOCH:
        say(f"  {data_wait:.0%} of the time went into waiting for data: {parts.loader.advice()}")
    if bad:
        say(f"  training skipped {some_of(bad, len(parts.source))} (bad_images.txt names those it met)")


def conclude(parts: Parts, result: TrainResult, steps: int, say: Say) -> None:
    """At the end: attention.png, backbone.pth, how well it went or how to go on, and how to use what was written.

    steps: of the epoch in which the run was stopped.
    """
    config, folder, before, after = parts.config, parts.folder, result.before, result.after
    if result.interrupted:
        say(f"stopped in epoch {result.epochs + 1} after {steps} of {parts.niter} steps; {folder.holds}")
        say(f"resume with: {command_line(config, parts.process.world_size, parts.preset)}")
        return
    folder.write("attention.png", lambda path: _draw(parts, path, say))
    if config.fsdp:
        folder.write("checkpoint.pth", parts.consolidate)
    held_out, checkpoint = parts.held_out, folder.path / "checkpoint.pth"
    on = f"{len(held_out)} held-out images" if held_out else "the training images, leave-one-out"
    for name, value in after.items():
        at_first = f"{before[name]:.4f} before training, " if name in before else ""
        lower = ", lower" if value < before.get(name, 0.0) else ""
        say(f"{TITLES.get(name, name)} on {on}: {at_first}{value:.4f} after{lower}; {result.seconds:.0f} s")
    folder.write(BACKBONE, lambda path: files.replace(path, partial(torch.save, parts.backbone.state_dict())))
    names = ["checkpoint.pth", BACKBONE, "log.txt", "args.json", "curves.png", "attention.png"]
    say("wrote " + ", ".join(str(folder.path / name) for name in names if (folder.path / name).is_file()))
    if parts.is_built_in and config.arch.startswith(TIMM):
        say(f'use it  network = timm.create_model("{config.arch.removeprefix(TIMM)}", num_classes=0)')
        say(f'        network.load_state_dict(torch.load("{folder.path / BACKBONE}")), or')
        say(f"        fastdino features | knn | linear | logreg --pretrained_weights {checkpoint}")
    elif parts.is_built_in:
        say(f'use it  fastdino.load_backbone("{folder.path / BACKBONE}"), or')
        say(f"        fastdino features | knn | attention | export --pretrained_weights {checkpoint}")


def _draw(parts: Parts, path: Path, say: Say) -> None:
    missing = draw_samples(
        parts.backbone, parts.held_out or parts.source, parts.config.attention_images, path, *parts.config.eval_size
    )
    if missing:
        say(f"no attention.png: {missing}")


def _several(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
