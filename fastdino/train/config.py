"""Everything a run depends on: one frozen dataclass, from which the command line is generated.

The original's names and defaults (main_dino.py) come first in each group; what is ours is an addition.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastdino.data.channels import ImageFormat
from fastdino.data.params import MultiCropRecipe, ViewRecipe
from fastdino.eval import EVALUATIONS
from fastdino.model.archs import ARCHITECTURES, PUBLISHED, SYNONYMS, check_arch
from fastdino.model.attention import BACKENDS
from fastdino.model.mlp import FEED_FORWARDS, WAYS
from fastdino.objectives.dinov2 import CENTERINGS
from fastdino.train.checks import check
from fastdino.train.fields import check_value, flag
from fastdino.train.loggers import LoggerFlags
from fastdino.train.recipes import (
    AUGMENTATIONS,
    OF_THE_WEIGHTS,
    PRESETS,
    RECIPES,
    from_weights,
    recipe_for,
)


def _optimizers() -> Sequence[str]:
    from fastdino.train.optim import OPTIMIZERS

    return list(OPTIMIZERS)


def _modes() -> Sequence[str]:
    from fastdino.train.modes import MODES

    return ["auto", *MODES]


def _scales() -> Sequence[str]:
    from fastdino.train.iteration_schedules import LR_SCALES

    return list(LR_SCALES)


def _efforts() -> Sequence[str]:
    from fastdino.train.modes import EFFORTS

    return list(EFFORTS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoggerFlags):
    """A training run. Raises ValueError, naming flag, expected and got, for values that cannot work together."""

    # Recipe
    preset: str = flag(
        "auto",
        "Recipe",
        "small: what learns from hundreds to ten thousands of images; none: the defaults of main_dino, or of --recipe; "
        "auto: small for so few images where, but for --recipe and --epochs, no flag of recipe, model, teacher, "
        "optimisation or crops is given. Flags win over it",
        PRESETS,
    )
    recipe: str = flag(
        "dino",
        "Recipe",
        "dino; dinov2 and dinov3 learn from masked patches, too, and have other defaults for many flags; those given "
        "win. All flags of this group below are theirs",
        tuple(RECIPES),
    )
    registers: int = flag(0, "Recipe", "register tokens of the backbone; 4 with dinov3")
    layerscale: float = flag(1e-5, "Recipe", "where the blocks' LayerScale starts; 0 for none")
    ffn: str = flag("mlp", "Recipe", "MLP of the blocks", tuple(FEED_FORWARDS))
    centering: str = flag(
        "center", "Recipe", "center: a running mean of the teacher's logits; sinkhorn: the batch's own", CENTERINGS
    )
    ibot_weight: float = flag(1.0, "Recipe", "what the masked patches count")
    koleo_weight: float = flag(0.1, "Recipe", "what KoLeo counts, which spreads the features of a batch")
    ibot_out_dim: int = flag(0, "Recipe", "prototypes of a head for patches; 0: CLS and patches share one head")
    ibot_bottleneck_dim: int = flag(256, "Recipe", "bottleneck_dim of the head for patches")
    mask_probability: float = flag(0.5, "Recipe", "share of the global crops that are masked")
    mask_ratio: tuple[float, ...] = flag((0.1, 0.5), "Recipe", "least and largest share of their patches")
    mask_count: str = flag(
        "exact", "Recipe", "exact: as many patches in every step (DINOv3); atmost: blocks may not reach it (DINOv2)",
        ("exact", "atmost"),
    )  # fmt: skip
    lr_scaling: str = flag(
        "linear_wrt_256", "Recipe", "how lr follows the images of a step, and from how many", _scales
    )
    patch_embed_lr: float = flag(1.0, "Recipe", "learning rate of the patches' projection, as a part of its own")
    adamw_beta2: float = flag(0.999, "Recipe", "decay of AdamW's second moments")
    final_momentum_teacher: float = flag(1.0, "Recipe", "where the EMA momentum ends")
    gram_start: int = flag(
        0, "Recipe", "epoch after which patches are held to the Gram teacher's (DINOv3's second stage); 0 for never"
    )
    gram_teacher: str = flag("ema", "Recipe", "a file with a backbone, or ema: the teacher as it is after --gram_start")
    gram_update_epochs: int = flag(0, "Recipe", "epochs between renewals of the Gram teacher from the EMA; 0 for never")
    gram_weight: float = flag(1.0, "Recipe", "what Gram anchoring counts")
    gram_crops_size: int = flag(
        0, "Recipe", "side of the global crops as the Gram teacher sees them, for finer patches; 0: as the student does"
    )

    # Model
    arch: str = flag("vit_small", "Model", f"architecture: {', '.join(ARCHITECTURES)}; timm:NAME for one of timm's")
    patch_size: int = flag(16, "Model", "side of a patch in pixels; smaller is better, slower and hungrier")
    drop_path_rate: float = flag(0.1, "Model", "stochastic depth of the last block (the first has none)")
    out_dim: int = flag(65536, "Model", "number of prototypes (the head's output)")
    norm_last_layer: bool = flag(True, "Model", "keep the prototypes' lengths at 1; false learns them, less stable")
    use_bn_in_head: bool = flag(False, "Model", "BatchNorm in the head")
    hidden_dim: int = flag(2048, "Model", "width of the head's MLP")
    bottleneck_dim: int = flag(256, "Model", "width the head normalises and compares with the prototypes")

    init: str | None = flag(
        None, "Model", "weights to start from: a file, a public name such as dinov2_vits14, or timm:NAME; fresh heads"
    )

    # Teacher
    momentum_teacher: float = flag(0.996, "Teacher", "EMA momentum at the start; a cosine takes it to 1")
    warmup_teacher_temp: float = flag(0.04, "Teacher", "teacher temperature at the start")
    teacher_temp: float = flag(0.04, "Teacher", "teacher temperature after its warm-up; above 0.07 is unstable")
    warmup_teacher_temp_epochs: int = flag(0, "Teacher", "epochs over which the temperature goes from one to the other")

    # Optimisation
    epochs: int = flag(100, "Optimisation", "epochs to train")
    batch_size_per_gpu: int = flag(
        64, "Optimisation", "images per process and step; what is left over waits for the next epoch"
    )
    optimizer: str = flag("adamw", "Optimisation", "adamw, sgd or lars", _optimizers)
    lr: float = flag(0.0005, "Optimisation", "peak learning rate for 256 images a step; scales with the batch")
    lr_decay: float = flag(1.0, "Optimisation", "learning rate of a block as a part of the next one's")
    warmup_epochs: int = flag(10, "Optimisation", "epochs of linear learning-rate warm-up")
    min_lr: float = flag(1e-6, "Optimisation", "learning rate at the end of the cosine")
    weight_decay: float = flag(0.04, "Optimisation", "weight decay at the start")
    weight_decay_end: float = flag(0.4, "Optimisation", "weight decay at the end of its cosine")
    clip_grad: float = flag(
        3.0, "Optimisation", "largest gradient norm of one parameter tensor; 0 switches clipping off"
    )
    freeze_last_layer: int = flag(1, "Optimisation", "epochs during which the prototypes stay fixed")
    freeze_backbone_epochs: int = flag(0, "Optimisation", "epochs during which the heads alone train; 1 with --init")
    use_fp16: bool = flag(True, "Optimisation", "half precision on GPUs (on a CPU fp32, unless --amp_dtype bf16)")
    amp_dtype: str = flag(
        "auto", "Optimisation", "which half: bf16 where the GPU has it, else fp16", ("auto", "bf16", "fp16")
    )
    step: str = flag("auto", "Optimisation", "how a step runs: graph on GPUs, eager on CPU", _modes)
    compile: str = flag("default", "Optimisation", "max tunes compiled kernels, for minutes at the start", _efforts)
    attention: str = flag("auto", "Optimisation", "attention kernels; auto times what works", ("auto", *BACKENDS))
    mlp: str = flag(
        "auto", "Optimisation", "kernels of blocks' MLPs; auto times ours and the library's", ("auto", *WAYS)
    )
    accumulate: int = flag(1, "Optimisation", "parts that a batch is computed in, one update for all; less memory")
    fsdp: bool = flag(
        False, "Optimisation", "each process keeps a part of networks and optimizer (FSDP2); for models beyond one GPU"
    )
    checkpointing: bool = flag(False, "Optimisation", "recompute activations in the backward pass; less memory")
    drop_path_mode: str = flag(
        "sample", "Optimisation", "drop-path as in the original, or on a subset (DINOv2)", ("sample", "batch")
    )

    # Crops
    global_crops_scale: tuple[float, ...] = flag((0.4, 1.0), "Crops", "area of the global crops, as parts of the image")
    local_crops_number: int = flag(8, "Crops", "local crops per image; 0 trains on the two globals alone")
    local_crops_scale: tuple[float, ...] = flag((0.05, 0.4), "Crops", "area of the local crops, as parts of the image")
    global_crops_size: int = flag(224, "Crops", "side of the global crops in pixels; the original reads 224 alone")
    local_crops_size: int = flag(96, "Crops", "side of the local crops in pixels")
    augmentation: str = flag(
        "dino",
        "Crops",
        "probabilities of the alterations: dino; dinov2 (blur 0, 0.9, 0.5); none (flips only); flags below win over it",
        tuple(AUGMENTATIONS),
    )
    flip_prob: float = flag(0.5, "Crops", "probability of a horizontal flip")
    jitter_prob: float = flag(0.8, "Crops", "probability of colour jitter (0.4, 0.4, 0.2, 0.1)")
    gray_prob: float = flag(0.2, "Crops", "probability of grayscale")
    blur_prob: tuple[float, ...] = flag(
        (1.0, 0.1, 0.5), "Crops", "blur of global 1, global 2, locals (DINOv2's code amounts to 0 0.9 0.5)"
    )
    solarize_prob: float = flag(0.2, "Crops", "probability that global 2 is solarized")

    # Data
    data_path: str | None = flag(
        None,
        "Data",
        "folder of images, of any depth; .tar or .parquet files, a folder of them or a pattern like "
        "'train-{000..146}.tar'; without it: scikit-learn's digits",
    )
    channels: int = flag(
        3, "Data", "of the images, 1 to 16: gray (1), RGB (3), or what .npy arrays (H, W, C) and TIFF stacks hold"
    )
    value_range: tuple[float, ...] = flag(
        (), "Data", "numbers in the files that are black and white; without it the type's, 0 to 65535 or 0 to 1"
    )
    exif_turn: bool = flag(False, "Data", "turn images as EXIF says and viewers show them; the original does not")
    num_workers: int = flag(10, "Data", "loading threads per GPU, at most one per core; 0 loads between the steps")
    augment: str = flag(
        "auto",
        "Data",
        "exact: Pillow's pixels; fast: within 1.5 levels on average; auto: exact on GPUs, fast on CPU",
        ("auto", "exact", "fast"),
    )
    dct_scale: bool = flag(False, "Data", "decode JPEGs far larger than the crops need at 1/2 to 1/8 of their size")

    # Evaluation
    eval: str = flag(
        "knn", "Evaluation", f"what is evaluated where there are labels, with commas between: {', '.join(EVALUATIONS)}"
    )
    knn_freq: int = flag(10, "Evaluation", "epochs between k-NN evaluations; 0 for never")
    linear_freq: int = flag(10, "Evaluation", "epochs between linear evaluations, with --eval knn,linear; 0 for never")
    knn_k: int = flag(20, "Evaluation", "neighbours that vote")
    knn_images: int = flag(10000, "Evaluation", "most images in each half of a k-NN evaluation; 0 for all")
    val_path: str | None = flag(None, "Evaluation", "held-out images with the same classes; else leave-one-out")
    eval_resize: int = flag(
        0, "Evaluation", "short side before the center crop; 0: 8/7 of the global crop (256 for 224)"
    )
    attention_images: int = flag(6, "Evaluation", "sample images in attention.png; 0 for no picture")

    # Run
    output_dir: str = flag(".", "Run", "folder for checkpoints, log and pictures")
    saveckp_freq: int = flag(20, "Run", "epochs between the checkpoints that are kept; 0 keeps the last only")
    disk_wait: float = flag(10.0, "Run", "minutes that a full disk is waited for before the run ends")
    resume: bool = flag(True, "Run", "go on from output_dir/checkpoint.pth where there is one")
    seed: int = flag(0, "Run", "seed of weights, order, crops and drop-path")
    device: str = flag("auto", "Run", "auto, cpu, cuda or cuda:N")
    dist_url: str = flag("env://", "Run", "where the processes of a distributed run meet")
    local_rank: int = flag(0, "Run", "ignored; older launchers pass it")

    def __post_init__(self) -> None:
        try:
            if not self.init or self.arch not in (OF_THE_WEIGHTS, *PUBLISHED):
                check_arch(self.arch, self.recipe)
        except ValueError as error:
            raise ValueError(f"--arch: {error}") from error
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        check(self, {f.name: f.default for f in fields(self)})

    @property
    def eval_names(self) -> list[str]:
        """Of the evaluations, as they were given."""
        return [name.strip() for name in self.eval.split(",") if name.strip()]

    @property
    def evaluations(self) -> dict[str, int]:
        """Name -> epochs between evaluations, of those that are made; one without a flag comes with k-NN."""
        freqs = {name: int(getattr(self, f"{name}_freq", self.knn_freq)) for name in self.eval_names}
        return {name: freq for name, freq in freqs.items() if freq}

    @property
    def ncrops(self) -> int:
        """V: the two global crops and the local ones."""
        return 2 + self.local_crops_number

    @property
    def eval_size(self) -> tuple[int, int]:
        """Short side an image is resized to, and the side of the center crop, when features are extracted."""
        return self.eval_resize or round(self.global_crops_size * 8 / 7), self.global_crops_size

    @property
    def image_format(self) -> ImageFormat:
        """How images are read."""
        return ImageFormat(self.channels, tuple(float(x) for x in self.value_range), self.exif_turn)

    def crops(self) -> MultiCropRecipe:
        """The crops, as `fastdino.data` wants them."""

        def view(size: int, scale: tuple[float, ...], blur: float, solarize: float = 0.0) -> ViewRecipe:
            return ViewRecipe(
                size=size,
                scale=(scale[0], scale[1]),
                flip=self.flip_prob,
                jitter=self.jitter_prob,
                gray=self.gray_prob,
                blur=blur,
                solarize=solarize,
            )

        return MultiCropRecipe(
            globals=(
                view(self.global_crops_size, self.global_crops_scale, self.blur_prob[0]),
                view(self.global_crops_size, self.global_crops_scale, self.blur_prob[1], self.solarize_prob),
            ),
            locals=(view(self.local_crops_size, self.local_crops_scale, self.blur_prob[2]),) * self.local_crops_number,
            anchor_size=self.gram_crops_size,
            anchor_epoch=self.gram_start,
        )

    def namespace(self) -> argparse.Namespace:
        """As checkpoints carry it."""
        return argparse.Namespace(**asdict(self))

    @classmethod
    def from_flags(cls, given: Mapping[str, Any], is_demo: bool | None = None) -> "TrainConfig":
        """A run from the flags somebody gave: the rest are the defaults, or the digits' recipe.

        With `init`, what is better from weights than from scratch.

        is_demo: whether it is the digits'; by default, where there is no data_path.
        What `augmentation` stands for replaces defaults, never a probability that was given.
        The default warm-up is a tenth of the epochs in a run shorter than itself, and under the small preset.
        """
        preset = AUGMENTATIONS.get(given.get("augmentation", "dino"), {})
        is_demo = not given.get("data_path") if is_demo is None else is_demo
        values = {"arch": cls.arch, **recipe_for(given, is_demo), **preset, **given}
        if given.get("init"):
            values |= {**from_weights(values), **given}
        values["arch"] = SYNONYMS.get(values["arch"], values["arch"])  # as the original saves it
        epochs = values.get("epochs", cls.epochs)
        is_number = isinstance(epochs, int)  # else __post_init__ says so
        is_short = is_number and values.get("warmup_epochs", cls.warmup_epochs) > epochs
        if is_number and "warmup_epochs" not in given and (is_short or values.get("preset") == "small"):
            values["warmup_epochs"] = epochs // 10
        temps = "warmup_teacher_temp_epochs"
        if is_number and temps not in given and values.get(temps, 0) > epochs:
            values[temps] = 3 * epochs // 10
        return cls(**values)
