"""The Vision Transformer of DINO, with the original's parameter names, so that checkpoints move both ways.

ViT (arXiv:2010.11929) as DeiT (arXiv:2012.12877) trains it. Images of several resolutions go through together: their
tokens are rows of one matrix, and attention alone looks at where an image ends (`attention.Packing`).
Axes: B images, N tokens (1 + patches), M tokens of all images, H heads, D channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.model.attention import Packing, attention
from fastdino.model.recompute import linear_of_gelu, linear_of_norm, linear_of_parts


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with DINO's epsilon, a tenth of PyTorch's."""
    return nn.LayerNorm(dim, eps=1e-6)


def drop_path_scale(n_images: int, drop_prob: float, like: Tensor) -> Tensor:
    """(n_images,) factors of stochastic depth (arXiv:1603.09382): 0 for a dropped image, else 1 / (1 - p)."""
    return like.new_empty(n_images).bernoulli_(1 - drop_prob) / (1 - drop_prob)


def sample_images(packing: Packing, drop_prob: float, like: Tensor) -> tuple[Tensor, Packing]:
    """Rows (m,) of the images that a block works on, and their packing: of every group a random (1 - p), at least one.

    DINOv2's form of stochastic depth (arXiv:2304.07193, section 5): what is dropped is not computed either.
    """
    rows, groups, start = [], [], 0
    for n_images, n_tokens in packing.groups:
        n_kept = max(int(n_images * (1 - drop_prob)), 1)
        # argsort of noise, because randperm waits for the device
        images = torch.rand(n_images, device=like.device).argsort()[:n_kept]
        rows.append((start + images[:, None] * n_tokens + torch.arange(n_tokens, device=like.device)).flatten())
        groups.append((n_kept, n_tokens))
        start += n_images * n_tokens
    return torch.cat(rows), Packing(tuple(groups))


class Mlp(nn.Module):
    """Linear, GELU (exact), linear. Kept for the backward pass: what came in, and what came out of the first linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(..., D) -> (..., D), of norm(x)."""
        hidden = linear_of_norm(self.fc1, norm, x)
        if self.drop.p:
            return self.drop(self.fc2(self.drop(self.act(hidden))))
        return linear_of_gelu(self.fc2, self.act, hidden)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if attn_drop:
            raise ValueError(f"attn_drop: expected 0 (fused attention has no dropout here), got {attn_drop}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3 D) -> q, k, v, each (..., H, D / H)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    def forward(self, x: Tensor, packing: Packing, norm: nn.Module, cls_only: bool = False) -> Tensor:
        """(M, D) -> (M, D), of norm(x); cls_only: (images, D), what CLS attends to."""
        q, k, v = self._heads(linear_of_norm(self.qkv, norm, x))
        parts = [part.flatten(1) for part in attention(q, k, v, self.scale, packing)]
        if cls_only:
            parts = [packing.cls(torch.cat(parts))]
        return self.proj_drop(linear_of_parts(self.proj, parts))

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, N): the probabilities that the fused kernels never write down."""
        q, k, _ = self._heads(self.qkv(x))
        return torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).softmax(-1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = drop_path
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def _attend(self, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        return self.attn(x, packing, self.norm1, cls_only)

    def _mlp(self, x: Tensor, packing: Packing) -> Tensor:
        return self.mlp(x, self.norm2)

    def _scaled(self, x: Tensor, packing: Packing, factors: Sequence[Tensor], cls_only: bool) -> Tensor:
        attended = self._attend(x, packing, cls_only)
        if cls_only:
            x, packing = packing.cls(x), Packing(tuple((n_images, 1) for n_images, _ in packing.groups))
        if not factors:
            x = x + attended
            return x + self._mlp(x, packing)
        attention_scale, mlp_scale = (packing.per_token(f) for f in factors)
        x = x + attended * attention_scale
        return x + self._mlp(x, packing) * mlp_scale

    def _on_subsets(self, x: Tensor, samples: Sequence[tuple[Tensor, Packing]]) -> Tensor:
        for branch, (rows, packing) in zip((self._attend, self._mlp), samples):
            x = x.index_add(0, rows, branch(x[rows], packing) * (len(x) / len(rows)))
        return x

    def forward(
        self, x: Tensor, packing: Packing, mode: str = "sample", checkpointing: bool = False, cls_only: bool = False
    ) -> Tensor:
        """(M, D) -> (M, D). mode: drop-path by sample, or by batch (on a subset of the images, scaled up).

        cls_only: (images, D), the CLS tokens alone: of a last block nobody reads the others, and three quarters of its
        work are done token by token after the attention.
        """
        # What is random is drawn out here: a checkpoint then has no random state to put back, which a CUDA graph
        # could not.
        drops = self.drop_path > 0 and self.training
        if drops and mode == "batch":
            samples = [sample_images(packing, self.drop_path, x) for _ in range(2)]
            x = self._maybe_recomputed(checkpointing, self._on_subsets, x, samples)
            return packing.cls(x) if cls_only else x
        n_images = sum(n for n, _ in packing.groups)
        factors = [drop_path_scale(n_images, self.drop_path, x) for _ in range(2)] if drops else []
        return self._maybe_recomputed(checkpointing, self._scaled, x, packing, factors, cls_only)

    def _maybe_recomputed(self, checkpointing: bool, branch: Callable[..., Tensor], *args: Any) -> Tensor:
        if not (checkpointing and torch.is_grad_enabled()):
            return branch(*args)
        # Dropout inside, which no DINO recipe has, would want its random state back.
        random = self.training and self.mlp.drop.p > 0
        return checkpoint(branch, *args, use_reentrant=False, preserve_rng_state=random)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, H/p * W/p, D): one linear map per p x p patch."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its size is one matrix product over the patches, and faster as such.
        size = self.patch_size
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Weights from a normal of deviation `std` cut at +-2, biases zero, norms at one; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """DINO's backbone: the CLS token after the last norm.

    img_size: one-element list, the side in pixels the position embedding is laid out for; other sizes, square or
    not, are interpolated. num_classes: 0 for features, else a linear classifier follows.
    drop_path_mode: "sample" as the original, "batch" as DINOv2, which saves the dropped work. checkpointing: blocks
    keep their input alone and compute again in the backward pass; less memory, a third more time.
    init_std: deviation of weights, position embedding and CLS token at the start; the default is the original's.
    Attributes: embed_dim (D), num_heads; packs: it takes crops of several resolutions in one pass.
    Raises ValueError where num_heads does not divide embed_dim, patch_size not img_size, or (in forward) patch_size
    not the image.
    """

    packs = True

    def __init__(
        self,
        img_size: Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
        drop_path_mode: str = "sample",
        checkpointing: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if drop_path_mode not in ("sample", "batch"):
            raise ValueError(f"drop_path_mode: expected sample or batch, got {drop_path_mode!r}")
        self.drop_path_mode, self.checkpointing = drop_path_mode, checkpointing
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        if img_size[0] % patch_size:
            raise ValueError(f"patch_size: expected a divisor of img_size={img_size[0]}, got {patch_size}")
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_embed = PatchEmbed(img_size[0], patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        drop_paths = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, drop_path, norm_layer)
            for drop_path in drop_paths
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        self.apply(partial(init_linear, std=init_std))

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embedding (1, N, D) for an image of this many pixels."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        rows, cols = height // self.patch_embed.patch_size, width // self.patch_embed.patch_size
        if rows == cols == side:
            return self.pos_embed
        cls_pos, patch_pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        # Not `size=(rows, cols)`: the original passes scale factors with 0.1 added against rounding, and the bicubic
        # grid follows the factor. At 96 pixels the two differ by 28% RMS, and published weights were trained with this.
        patch_pos = F.interpolate(
            patch_pos.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            scale_factor=((rows + 0.1) / side, (cols + 0.1) / side),
            mode="bicubic",
        )
        return torch.cat((cls_pos, patch_pos.flatten(2).transpose(1, 2)), dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, N, D) tokens, CLS first, positions added."""
        height, width = x.shape[-2:]
        patch_size = self.patch_embed.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"x: expected sides divisible by patch_size={patch_size}, got {height}x{width} pixels")
        tokens = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1)
        return self.pos_drop(tokens + self.interpolate_pos_encoding(height, width))

    def packing(self, runs: Sequence[tuple[int, int, int]]) -> Packing:
        """How the tokens of runs of images lie one after another: (images, height, width) of each run, in pixels."""
        size = self.patch_embed.patch_size
        return Packing(tuple((n, 1 + (height // size) * (width // size)) for n, height, width in runs))

    def _blocks(self, x: Tensor, packing: Packing) -> Iterator[Tensor]:
        """(M, D) tokens after each block."""
        for block in self.blocks:
            x = block(x, packing, self.drop_path_mode, self.checkpointing)
            yield x

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) -> (B, D) CLS features; a list of such, of several resolutions, to all their features."""
        groups = [self.prepare_tokens(images) for images in ([x] if isinstance(x, Tensor) else x)]
        packing = Packing(tuple((len(tokens), tokens.shape[1]) for tokens in groups))
        tokens = torch.cat([group.flatten(0, 1) for group in groups])
        for i, block in enumerate(self.blocks, 1):
            tokens = block(tokens, packing, self.drop_path_mode, self.checkpointing, cls_only=i == len(self.blocks))
        return self.head(self.norm(tokens))

    def _tokens_after_blocks(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, N, D) before the first block, and after each."""
        tokens = self.prepare_tokens(x)
        packing = Packing(((tokens.shape[0], tokens.shape[1]),))
        return [tokens, *(y.unflatten(0, packing.groups[0]) for y in self._blocks(tokens.flatten(0, 1), packing))]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, heads, N, N) attention probabilities of the last block."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.attention_map(last.norm1(self._tokens_after_blocks(x)[-2]))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """(B, 3, H, W) -> the normalised tokens (B, N, D) after each of the last n blocks."""
        return [self.norm(tokens) for tokens in self._tokens_after_blocks(x)[1:][-n:]]
