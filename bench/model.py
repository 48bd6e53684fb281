"""What a step must cost: FLOPs, counted from shapes, and the least time they take below given ceilings.

Axes: N tokens (1 + patches), D channels, K prototypes. A FLOP is one multiplication or one addition. A student's crop
counts three forwards (forward, and the gradients by input and by weight), a teacher's one.
"""

from dataclasses import dataclass

HIDDEN_DIM, BOTTLENECK_DIM = 2048, 256  # of DINO's head


@dataclass(frozen=True)
class Architecture:
    """A ViT's shape."""

    dim: int
    depth: int


ARCHITECTURES = {
    "vit_tiny": Architecture(192, 12),
    "vit_small": Architecture(384, 12),
    "vit_base": Architecture(768, 12),
    "vit_large": Architecture(1024, 24),
}


def forward_flops(arch: Architecture, side: int, patch_size: int = 16) -> dict[str, int]:
    """FLOPs of one backbone pass over one crop of side x side pixels, per part."""
    n_patches = (side // patch_size) ** 2
    n = n_patches + 1
    return {
        "patch_embed": 2 * n_patches * 3 * patch_size**2 * arch.dim,
        "linears": arch.depth * 24 * n * arch.dim**2,  # qkv 6, proj 2, MLP 16
        "attention": arch.depth * 4 * n**2 * arch.dim,  # q k^T and probs v
    }


def head_flops(arch: Architecture, out_dim: int) -> int:
    """FLOPs of one head pass over one crop."""
    mlp = arch.dim * HIDDEN_DIM + HIDDEN_DIM**2 + HIDDEN_DIM * BOTTLENECK_DIM
    return 2 * (mlp + BOTTLENECK_DIM * out_dim)


def step_flops_per_image(
    arch: Architecture, n_local: int = 8, out_dim: int = 65536, global_side: int = 224, local_side: int = 96
) -> dict[str, int]:
    """FLOPs of a whole step, per image and part: 2 globals and n_local locals, x3 for the student, x1 the teacher."""
    large, small = forward_flops(arch, global_side), forward_flops(arch, local_side)
    parts = {part: (3 + 1) * 2 * large[part] + 3 * n_local * small[part] for part in large}
    return parts | {"head": (3 * (2 + n_local) + 2) * head_flops(arch, out_dim)}


def parameters(arch: Architecture, out_dim: int = 65536, patch_size: int = 16, side: int = 224) -> int:
    """Parameters of backbone and head that get a gradient (the prototypes' lengths do not)."""
    block = 12 * arch.dim**2 + 13 * arch.dim  # qkv, proj, MLP; biases 9 D, norms 4 D
    tokens = (side // patch_size) ** 2 + 2  # position embedding of patches and CLS, and the CLS token
    backbone = arch.depth * block + tokens * arch.dim + (3 * patch_size**2 + 1) * arch.dim + 2 * arch.dim
    mlp = (arch.dim + 1) * HIDDEN_DIM + (HIDDEN_DIM + 1) * HIDDEN_DIM + (HIDDEN_DIM + 1) * BOTTLENECK_DIM
    return backbone + mlp + BOTTLENECK_DIM * out_dim


def optimizer_bytes(n_parameters: int) -> int:
    """fp32 traffic of clip, AdamW and EMA in two passes.

    The norms read the gradients (4 bytes); then gradient, weight, two moments and teacher are read (20) and all but
    the gradient written (16).
    """
    return 40 * n_parameters


def step_seconds(
    arch: Architecture, batch: int, matmul_tflops: float, copy_gbps: float, n_local: int = 8, out_dim: int = 65536
) -> float:
    """A lower bound: matmuls at the matmul ceiling, then the optimizer at the copy ceiling. Norms and loss are free."""
    compute = batch * sum(step_flops_per_image(arch, n_local, out_dim).values()) / (matmul_tflops * 1e12)
    return compute + optimizer_bytes(parameters(arch, out_dim)) / (copy_gbps * 1e9)


def projected_allreduce_seconds(n_gpus: int, n_parameters: int, link_gbps: float, bytes_per_gradient: int = 4) -> float:
    """A PROJECTION, never a measurement: a ring moves 2 (n - 1) / n of the gradients through each GPU's link."""
    return 2 * (n_gpus - 1) / n_gpus * n_parameters * bytes_per_gradient / (link_gbps * 1e9)
