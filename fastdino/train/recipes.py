"""Values of several flags that go together, by name."""

from collections.abc import Mapping
from typing import Any

from fastdino.model.archs import PUBLISHED

AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "dino": {},  # the defaults
    "dinov2": {"blur_prob": (0.0, 0.9, 0.5)},  # what its code amounts to: torchvision's p there is that of no blur
    "none": {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": 0.0},
}


# --recipe. What DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) have in their configurations for one node.
_NEWER: dict[str, Any] = {
    "drop_path_rate": 0.3,
    "drop_path_mode": "batch",
    "norm_last_layer": False,
    "momentum_teacher": 0.992,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
    "lr": 0.004,
    "lr_scaling": "sqrt_wrt_1024",
    "lr_decay": 0.9,
    "patch_embed_lr": 0.2,
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    **AUGMENTATIONS["dinov2"],
    "augmentation": "dinov2",
}
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {},
    "dinov2": _NEWER,
    "dinov3": {**_NEWER, "registers": 4, "centering": "sinkhorn", "ibot_out_dim": 65536},
}
# Flags that say nothing to DINO's recipe.
OF_NEWER_RECIPES = """registers layerscale ffn centering ibot_weight koleo_weight ibot_out_dim ibot_bottleneck_dim
    mask_probability mask_ratio mask_count lr_scaling patch_embed_lr adamw_beta2 final_momentum_teacher
    gram_start gram_teacher gram_update_epochs gram_weight gram_crops_size"""

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

# What few images want of DINOv2's and DINOv3's recipes, whose own defaults are for a million: Sinkhorn, and otherwise
# DINO's. LayerScale that starts at 1e-5 has not grown when such a short run ends. k-NN on validation images of DINOv2's
# recipe, after 100 to 150 seconds of a CPU core, November 2026: digits .900 and .873 (seeds 1, 2), parts of photographs
# .755, MNIST .739. DINO's recipe in as many seconds: .890 and .873, .693, .632. The authors' values: digits .813.
FEW_OF_NEWER: dict[str, Any] = {
    "centering": "sinkhorn",  # a running mean: digits .877 and .837
    "layerscale": 0.0,
    "norm_last_layer": True,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "lr_decay": 1.0,
    "patch_embed_lr": 1.0,
    "ibot_out_dim": 0,
    "mask_ratio": (0.1, 0.3),  # of 16 patches; up to 0.5: digits .900 and .863, parts .739, MNIST .731
    "lr": 0.004,  # with masks up to 0.5: twice as much .867 and .860, a third .840
}

# --preset small: folders of hundreds to ten thousands of images. main_dino's defaults are for a million, and for as
# many steps. In the few hundred or thousand that such a folder is worth, an average of 0.996 hardly moves; on pictures
# of a few pixels, crops of a twentieth, solarized ones and a wide bottleneck drive the teacher to ln K. Numbers below
# are k-NN on held-out images, one seed, November 2026. In full, means of three seeds on images that chose nothing, with
# seconds of a CPU core: 1,137 digits of 8 x 8 pixels 0.62 to 0.95 (220 s), 3,000 of MNIST 0.47 to 0.83 (620 s), 612
# parts of photographs 0.64 to 0.66 (240 s; one seed of three lost 0.01).
SMALL_FOLDER = 10_000  # images: up to so many, a folder is small
SMALL: dict[str, Any] = {
    "preset": "small",
    "arch": "vit_nano",
    "out_dim": 1024,
    "hidden_dim": 512,
    "bottleneck_dim": 64,  # digits, 280 steps: k-NN 0.73; with 32 0.67, with 256 0.65
    "use_bn_in_head": True,  # without it this small model collapses to ln K
    "drop_path_rate": 0.0,
    "momentum_teacher": 0.97,  # 0.9 and 0.99 learned less of MNIST in 186 steps
    "lr": 0.008,
    "global_crops_scale": (0.7, 1.0),
    "local_crops_number": 2,
    "local_crops_scale": (0.4, 0.9),
    "solarize_prob": 0.0,
    "flip_prob": 0.0,  # what is written has a side: digits 0.75, with flips 0.73; not tried on photographs
    "exif_turn": True,  # photographs as their owner sees them
    "saveckp_freq": 0,  # checkpoint.pth alone: hundreds of epochs would leave tens of copies
}
# At least so many steps, and so many epochs: 3,000 digits of MNIST (28 pixels) go from 0.48 to 0.67 in 1,500 steps, and
# to 0.84 in 45 epochs, of which the last five add nothing.
SMALL_BATCH, SMALL_STEPS, SMALL_EPOCHS = 32, 1500, 45
SMALL_SIDES = (24, 32, 48, 64)  # of the global crops; larger ones learned no more in the same time


def small(n_images: int, side: int, n_processes: int = 1, recipe: str = "dino") -> dict[str, Any]:
    """`--preset small` for so many images, with short sides of about `side` pixels.

    The global crops are as large as the images, or the next size below, of 4 x 4 patches, the local ones of 3 x 3.
    So many epochs that SMALL_STEPS are taken, of SMALL_BATCH images in all processes together; SMALL_EPOCHS at least.
    """
    size = max((s for s in SMALL_SIDES if s <= side), default=SMALL_SIDES[0])
    return {
        **SMALL,
        **(FEW_OF_NEWER if recipe != "dino" else {}),
        "batch_size_per_gpu": max(1, SMALL_BATCH // n_processes),
        "epochs": max(SMALL_EPOCHS, round(SMALL_STEPS / max(1, n_images // SMALL_BATCH))),
        "patch_size": size // 4,
        "global_crops_size": size,
        "local_crops_size": size * 3 // 4,
    }


# k-NN on held-out digits 5 to 9 after 126 steps from a backbone that knows 0 to 4 (as tests/trials/weights.py trains,
# November 2026), beside that with the flags of a run from scratch: .004 more over 29 seeds that chose nothing (standard
# error .0015; 19 won, 9 lost), after 28 steps .008 more, in all 11 of which that is known. At worst it falls .004 below
# the weights as they came on its way, with the flags of a run from scratch .018. Chosen on seeds 0 to 2, which won by
# .017: seed 0 has 0.895, and less with half the lr 0.866, twice 0.882; momentum 0.99 0.844, 0.95 0.891; two frozen
# epochs 0.879, three 0.862; lr_decay 0.9 0.882, 0.7 0.862; prototypes frozen, too, 0.891; nothing frozen 0.877.
def from_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run with `init` does otherwise than one from scratch. values: the flags that are known so far."""
    epochs = values.get("epochs", 2)
    return {
        "arch": OF_THE_WEIGHTS,
        "patch_size": 0,
        "freeze_backbone_epochs": min(1, epochs - 1) if isinstance(epochs, int) else 1,
        "freeze_last_layer": 0,
    }


def recipe_for(given: Mapping[str, Any], is_demo: bool) -> dict[str, Any]:
    """The defaults of a run: its recipe's, and where it learns the digits, theirs."""
    recipe = given.get("recipe", "dino")
    values = dict(RECIPES.get(recipe, {}))
    arch = PUBLISHED.get(given.get("arch", ""))
    if arch is not None and recipe in RECIPES:
        values |= {
            "patch_size": arch.patch_size,
            "registers": arch.options["registers"],
            "ffn": arch.options.get("ffn", "mlp"),
        }
        values |= {"local_crops_size": 7 * arch.patch_size}
    if is_demo:
        values |= DIGITS | (FEW_OF_NEWER if recipe != "dino" else {})
    return values
