"""The Vision Transformer of DINO, with the original's parameter names, so that checkpoints move both ways.

ViT (arXiv:2010.11929) as DeiT (arXiv:2012.12877) trains it. Images of several resolutions go through together: their
tokens are rows of one matrix, and attention alone looks at where an image ends (`attention.Packing`).
Axes: B images, N tokens (1 + patches), M tokens of all images, H heads, D channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.model.attention import Packing, attention
from fastdino.model.drop_path import MODES, Path, draw
from fastdino.model.recompute import keep_recipes, recomputed


class LayerNorm(nn.LayerNorm):
    """PyTorch's, whose output is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return recomputed(super().forward, x)


class GELU(nn.GELU):
    """PyTorch's (exact), whose output is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return recomputed(super().forward, x)


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with DINO's epsilon, a tenth of PyTorch's."""
    return LayerNorm(dim, eps=1e-6)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3 D) -> q, k, v, each (..., H, D / H)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    def forward(self, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        """(M, D) -> (M, D); cls_only: (images, D), what CLS attends to."""
        q, k, v = self._heads(self.qkv(x))
        attended = attention(q, k, v, self.scale, packing)
        return self.proj(packing.cls(attended) if cls_only else attended)

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, N): the probabilities that the fused kernels never write down."""
        q, k, _ = self._heads(self.qkv(x))
        return torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).softmax(-1)


class Block(nn.Module):
    """Pre-norm transformer block. drop_path: the probability that training leaves an image out of a branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = drop_path
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def paths(self, x: Tensor, packing: Packing, mode: str, cls_only: bool = False) -> tuple[Path, Path]:
        """What `forward` needs: paths through attention and MLP, drawn anew."""
        drop_prob, after = self.drop_path if self.training else 0.0, packing.of_cls if cls_only else packing
        return draw(mode, drop_prob, packing, after, x), draw(mode, drop_prob, after, after, x)

    def forward(self, x: Tensor, packing: Packing, paths: tuple[Path, Path], cls_only: bool = False) -> Tensor:
        """(M, D) -> (M, D). cls_only: (images, D), CLS alone, so that projection and MLP skip the patches."""
        to_attn, to_mlp = paths
        attended = self.attn(self.norm1(to_attn.take(x)), to_attn.packing, cls_only)
        x = to_attn.add(packing.cls(x) if cls_only else x, attended)
        return to_mlp.add(x, self.mlp(self.norm2(to_mlp.take(x))))


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, H//p * W//p, D): one linear map per p x p patch; what is left of the sides is not read."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its size is one matrix product over the patches, and faster as such.
        size, (height, width) = self.patch_size, x.shape[2:]
        x = x[:, :, : height // size * size, : width // size * size]
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
    Raises ValueError where num_heads does not divide embed_dim or patch_size img_size, and for what the original takes
    and no recipe of DINO uses: qk_scale, drop_rate, attn_drop_rate.
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
        for name, value in {"qk_scale": qk_scale, "drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}.items():
            if value:
                raise ValueError(f"{name}: expected none, for it is not supported, got {value}")
        if drop_path_mode not in MODES:
            raise ValueError(f"drop_path_mode: expected {' or '.join(MODES)}, got {drop_path_mode!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        if img_size[0] % patch_size:
            raise ValueError(f"patch_size: expected a divisor of img_size={img_size[0]}, got {patch_size}")
        self.drop_path_mode, self.checkpointing = drop_path_mode, checkpointing
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_embed = PatchEmbed(img_size[0], patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        drop_paths = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_path, norm_layer) for drop_path in drop_paths
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
        if rows == cols == side and height == width:
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
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)), dim=1)
        return tokens + self.interpolate_pos_encoding(*x.shape[-2:])

    def packing(self, runs: Sequence[tuple[int, int, int]]) -> Packing:
        """How the tokens of runs of images lie one after another: (images, height, width) of each run, in pixels."""
        size = self.patch_embed.patch_size
        return Packing(tuple((n, 1 + (height // size) * (width // size)) for n, height, width in runs))

    def _run(self, block: nn.Module, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        """A block; under checkpointing, once more in the backward pass."""
        # Drawn outside: a checkpoint then has no random state to put back, which a CUDA graph could not.
        paths = cast(Block, block).paths(x, packing, self.drop_path_mode, cls_only)
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(x, packing, paths, cls_only)
        return checkpoint(block, x, packing, paths, cls_only, use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) -> (B, D) CLS features; a list of such, of several resolutions, to all their features."""
        groups = [self.prepare_tokens(images) for images in ([x] if isinstance(x, Tensor) else x)]
        packing = Packing(tuple((len(tokens), tokens.shape[1]) for tokens in groups))
        tokens = torch.cat([group.flatten(0, 1) for group in groups])
        with keep_recipes():
            for i, block in enumerate(self.blocks, 1):
                tokens = self._run(block, tokens, packing, cls_only=i == len(self.blocks))
        return self.head(self.norm(tokens))

    def _tokens_after_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """(B, 3, H, W) -> (B, N, D) before the first block, and after each."""
        tokens = self.prepare_tokens(x)
        packing = Packing(((len(tokens), tokens.shape[1]),))
        yield tokens
        for block in self.blocks:
            tokens = self._run(block, tokens.flatten(0, 1), packing).unflatten(0, packing.groups[0])
            yield tokens

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, heads, N, N) attention probabilities of the last block."""
        last = cast(Block, self.blocks[-1])
        return last.attn.attention_map(last.norm1([*self._tokens_after_blocks(x)][-2]))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """(B, 3, H, W) -> the normalised tokens (B, N, D) after each of the last n blocks."""
        return [self.norm(tokens) for tokens in [*self._tokens_after_blocks(x)][1:][-n:]]
