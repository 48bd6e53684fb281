"""Values of several flags that go together, by name."""

from collections.abc import Mapping
from typing import Any

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "dino": {},  # the defaults
    "dinov2": {"blur_prob": (0.0, 0.9, 0.5)},  # what its code amounts to: torchvision's p there is that of no blur
    "none": {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": 0.0},
}

PRESETS = ("auto", "small", "none")

OF_THE_WEIGHTS = "auto"  # --arch with --init: the architecture that the weights are of

# Without data: the handwritten digits that scikit-learn carries. Learned in minutes on two CPU cores.
DIGITS: dict[str, Any] = {
    "preset": "none",
    "arch": "vit_nano",
    "patch_size": 6,
    "out_dim": 1024,
    "hidden_dim": 512,
    "use_bn_in_head": True,  # without it this small model collapses to ln K
    "drop_path_rate": 0.0,
    "momentum_teacher": 0.97,
    "epochs": 48,
    "batch_size_per_gpu": 64,
    "lr": 0.004,
    "warmup_epochs": 2,
    # 8 x 8 strokes: smaller parts of a digit say too little of which one it is.
    "global_crops_size": 24,
    "global_crops_scale": (0.7, 1.0),
    "local_crops_number": 2,
    "local_crops_size": 18,
    "local_crops_scale": (0.4, 0.9),
    "flip_prob": 0.0,  # a mirrored 2 is not a 2
    "gray_prob": 0.0,
    "solarize_prob": 0.0,
    "eval_resize": 24,
    "num_workers": 1,
    "knn_freq": 8,
    "output_dir": "fastdino_digits",
    "resume": False,
}

# --preset small: folders of hundreds to ten thousands of images. main_dino's defaults are for a million: on such a
# folder their average teacher (0.996) hardly moves, and 65,536 prototypes have more parameters than there are pixels.
SMALL_FOLDER = 10_000  # images: up to so many, a folder is small
SMALL: dict[str, Any] = {
    "preset": "small",
    "arch": "vit_nano",
    "out_dim": 1024,
    "hidden_dim": 512,
    "use_bn_in_head": True,  # without it this small model collapses to ln K
    "drop_path_rate": 0.0,
    "momentum_teacher": 0.97,
    "lr": 0.008,
    "local_crops_number": 4,
    "saveckp_freq": 0,
}
SMALL_BATCH, SMALL_STEPS = 32, 2000
SMALL_SIDES = (28, 32, 48, 64)  # of the global crops; larger ones learn no more in the same time


def small(n_images: int, side: int, n_processes: int = 1) -> dict[str, Any]:
    """`--preset small` for so many images, with short sides of about `side` pixels.

    The global crops are as large as the images, or the next size below, of 4 x 4 patches; so many epochs that
    SMALL_STEPS are taken, of SMALL_BATCH images in all processes together. A tenth of the epochs is warm-up.
    """
    size = max((s for s in SMALL_SIDES if s <= side), default=SMALL_SIDES[0])
    return {
        **SMALL,
        "batch_size_per_gpu": max(1, SMALL_BATCH // n_processes),
        "epochs": max(1, round(SMALL_STEPS / max(1, n_images // SMALL_BATCH))),
        "patch_size": size // 4,
        "global_crops_size": size,
        "local_crops_size": size // 2,
    }


def from_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run with `init` does otherwise than one from scratch. values: the flags that are known so far."""
    epochs = values.get("epochs", 2)
    return {
        "arch": OF_THE_WEIGHTS,
        "patch_size": 0,
        "freeze_backbone_epochs": min(1, epochs - 1) if isinstance(epochs, int) else 1,
        "freeze_last_layer": 0,
    }
