"""FLOPs of a step, counted from shapes. A FLOP is one multiplication or one addition.

Counted is what the original computes, also what `fastdino.model` leaves out (most of the last block's patches, a 16th
of a 12-block backbone). Norms, GELU, loss and optimizer are bound by memory and count nothing. A student's crop counts
three forwards (forward, gradients by input and by weight), a teacher's one.
Axes: N tokens (1 + patches) of a crop, D channels, K prototypes.
"""

from fastdino.model.archs import ARCHITECTURES, Arch

HIDDEN_DIM, BOTTLENECK_DIM = 2048, 256  # of DINO's head


def linears(arch: Arch, n: int) -> int:
    """Patch embedding, qkv, proj and the MLP of every block, for a crop."""
    patch = 3 * arch.patch_size**2
    return arch.depth * 24 * n * arch.width**2 + 2 * (n - 1) * patch * arch.width  # 24: qkv 6, proj 2, MLP 16


def attention(arch: Arch, n: int) -> int:
    """q k^T and times v, for a crop."""
    return arch.depth * 4 * n**2 * arch.width


def head(arch: Arch, out_dim: int) -> int:
    """Three linears and the prototypes, for a crop."""
    return 2 * (HIDDEN_DIM * (arch.width + HIDDEN_DIM + BOTTLENECK_DIM) + BOTTLENECK_DIM * out_dim)


def step_flops(name: str, batch: int, n_local: int = 8, out_dim: int = 65536) -> int:
    """Of a whole step of an architecture of `fastdino.model.archs`, with two global crops."""
    arch = ARCHITECTURES[name]
    large, small = (
        linears(arch, n) + attention(arch, n) + head(arch, out_dim)
        for n in ((side // arch.patch_size) ** 2 + 1 for side in (224, 96))  # pixels
    )
    student, teacher = 2 * large + n_local * small, 2 * large
    return batch * (3 * student + teacher)
