"""Which values of the flags can work together. A configuration is a TrainConfig; errors name flag, expected and got."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastdino.eval import EVALUATIONS
from fastdino.model.archs import TIMM
from fastdino.train.recipes import OF_NEWER_RECIPES

if TYPE_CHECKING:
    from fastdino.train.config import TrainConfig


def check(config: "TrainConfig", defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for values that cannot work, each of its own kind. defaults: of all flags."""
    _check_ranges(config)
    _check_recipe(config, defaults)
    if config.batch_size_per_gpu % config.accumulate:
        raise ValueError(
            f"--accumulate: expected a divisor of --batch_size_per_gpu={config.batch_size_per_gpu}, "
            f"got {config.accumulate}"
        )
    _check_fsdp(config)
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if getattr(config, name) > config.epochs:
            raise ValueError(f"--{name}: expected at most --epochs={config.epochs}, got {getattr(config, name)}")


def _check_fsdp(config: "TrainConfig") -> None:
    if not config.fsdp:
        return
    if config.use_bn_in_head:
        raise ValueError("--use_bn_in_head: expected false with --fsdp, whose heads are in parts, got true")
    for name, allowed in (("optimizer", ("adamw",)), ("step", ("auto", "eager")), ("amp_dtype", ("auto", "bf16"))):
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name}: expected {' or '.join(allowed)} with --fsdp, got {getattr(config, name)}")


def in_words(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:g}" for v in values)


def _check_ranges(config: "TrainConfig") -> None:
    positive = """out_dim hidden_dim bottleneck_dim epochs batch_size_per_gpu accumulate knn_k
        warmup_teacher_temp teacher_temp global_crops_size local_crops_size"""
    not_negative = """warmup_epochs warmup_teacher_temp_epochs lr min_lr weight_decay weight_decay_end clip_grad
        freeze_last_layer freeze_backbone_epochs local_crops_number num_workers knn_freq linear_freq knn_images
        eval_resize attention_images saveckp_freq disk_wait registers layerscale koleo_weight ibot_out_dim
        gram_start gram_update_epochs gram_weight gram_crops_size"""
    for name in positive.split():
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name}: expected a value above 0, got {getattr(config, name)}")
    for name in not_negative.split():
        if getattr(config, name) < 0:
            raise ValueError(f"--{name}: expected 0 or more, got {getattr(config, name)}")
    shares = """momentum_teacher final_momentum_teacher mask_probability lr_decay flip_prob jitter_prob gray_prob
        solarize_prob"""
    for name in shares.split():
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"--{name}: expected a value in [0, 1], got {getattr(config, name)}")
    if config.patch_size < (0 if config.init else 1):
        raise ValueError(f"--patch_size: expected a value above 0, got {config.patch_size}")
    if unknown := set(config.eval_names) - set(EVALUATIONS):
        raise ValueError(f"--eval: expected some of {', '.join(EVALUATIONS)}, got {', '.join(sorted(unknown))}")
    try:
        _ = config.image_format
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed: expected 0 to {2**32 - 1}, as NumPy takes them, got {config.seed}")
    if not 0 <= config.drop_path_rate < 1:
        raise ValueError(f"--drop_path_rate: expected a value in [0, 1), got {config.drop_path_rate}")
    if len(config.blur_prob) != 3 or not all(0 <= p <= 1 for p in config.blur_prob):
        raise ValueError(f"--blur_prob: expected three values in [0, 1], got {in_words(config.blur_prob)}")
    for name in ("global_crops_scale", "local_crops_scale", "mask_ratio"):
        scale = getattr(config, name)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"--{name}: expected two rising values in (0, 1], got {in_words(scale)}")


def _check_recipe(config: "TrainConfig", defaults: Mapping[str, Any]) -> None:
    """Raise ValueError, naming flag, expected and got, for flags that contradict the recipe."""
    if config.recipe == "dino":
        for name in OF_NEWER_RECIPES.split():
            if getattr(config, name) != defaults[name]:
                raise ValueError(
                    f"--{name}: is for --recipe dinov2 or dinov3, and says nothing to dino, got {getattr(config, name)}"
                )
        return
    if not config.local_crops_number:
        raise ValueError(f"--local_crops_number: expected 1 or more with --recipe {config.recipe}, got 0")
    if config.optimizer != "adamw":
        raise ValueError(f"--optimizer: expected adamw with --recipe {config.recipe}, got {config.optimizer}")
    if config.arch.startswith(TIMM):
        raise ValueError(f"--arch: {config.arch} takes no masks, and --recipe {config.recipe} masks patches; use dino")
    if not config.mask_probability or not config.ibot_weight > 0:
        name = "ibot_weight" if config.mask_probability else "mask_probability"
        raise ValueError(
            f"--{name}: expected a value above 0, got {getattr(config, name)}; --recipe dino masks nothing"
        )
    if int(2 * config.batch_size_per_gpu // config.accumulate * config.mask_probability) < 1:
        raise ValueError(f"--mask_probability: {config.mask_probability} of so few crops masks none")
    if config.koleo_weight and config.batch_size_per_gpu < 2:
        raise ValueError("--batch_size_per_gpu: expected 2 or more, for KoLeo compares images, got 1")
    of_gram = ("gram_teacher", "gram_update_epochs", "gram_crops_size")
    if not config.gram_start and (name := next((n for n in of_gram if getattr(config, n) != defaults[n]), "")):
        raise ValueError(f"--{name}: says nothing without --gram_start, the epoch after which it is looked at")
    if config.gram_crops_size and config.gram_crops_size < config.global_crops_size:
        raise ValueError(
            f"--gram_crops_size: expected at least --global_crops_size={config.global_crops_size}, "
            f"got {config.gram_crops_size}"
        )
    if config.gram_start >= config.epochs:
        raise ValueError(f"--gram_start: expected less than --epochs={config.epochs}, got {config.gram_start}")
    if config.gram_update_epochs and config.gram_start % config.gram_update_epochs:
        raise ValueError(
            f"--gram_update_epochs: expected a divisor of --gram_start={config.gram_start}, "
            f"got {config.gram_update_epochs}"
        )
