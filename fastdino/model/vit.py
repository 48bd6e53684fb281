"""The Vision Transformer of DINO, with the original's parameter names, so that checkpoints move both ways.

ViT (arXiv:2010.11929) as DeiT (arXiv:2012.12877) trains it. Axes: B images, N tokens (1 + patches), H heads,
D channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.attention import attention


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with DINO's epsilon, a tenth of PyTorch's."""
    return nn.LayerNorm(dim, eps=1e-6)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382) per sample: a branch is dropped for an image, or scaled up by 1/(1 - p)."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (keep / keep_prob)


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


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

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, N, H, D / H)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(attention(*self._qkv(x), self.scale).flatten(2)))

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, N): the probabilities that the fused kernels never write down."""
        q, k, _ = self._qkv(x)
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
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, H/p * W/p, D): one linear map per p x p patch."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def init_linear(module: nn.Module) -> None:
    """Weights from a normal of deviation 0.02 cut at +-2, biases zero, norms at one; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """DINO's backbone: the CLS token after the last norm.

    img_size: one-element list, the side in pixels the position embedding is laid out for; other sizes, square or
    not, are interpolated. num_classes: 0 for features, else a linear classifier follows.
    Raises ValueError where num_heads does not divide embed_dim, patch_size not img_size, or (in forward) patch_size
    not the image.
    """

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
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        if img_size[0] % patch_size:
            raise ValueError(f"patch_size: expected a divisor of img_size={img_size[0]}, got {patch_size}")
        self.num_features = self.embed_dim = embed_dim
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
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) CLS features."""
        x = self.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, heads, N, N) attention probabilities of the last block."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.attention_map(last.norm1(x))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """(B, 3, H, W) -> the normalised tokens (B, N, D) after each of the last n blocks."""
        x = self.prepare_tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                outputs.append(self.norm(x))
        return outputs


def _vit(embed_dim: int, depth: int, num_heads: int, patch_size: int, kwargs: dict[str, Any]) -> VisionTransformer:
    shape = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return VisionTransformer(**{**shape, **kwargs})


def vit_nano(patch_size: int = 4, **kwargs: Any) -> VisionTransformer:
    """96 wide, 4 deep, 3 heads: not of the paper; small enough to learn the digits on two CPU cores in minutes."""
    return _vit(96, 4, 3, patch_size, kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """192 wide, 12 deep, 3 heads (5.5 M parameters)."""
    return _vit(192, 12, 3, patch_size, kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """384 wide, 12 deep, 6 heads (21.7 M parameters)."""
    return _vit(384, 12, 6, patch_size, kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """768 wide, 12 deep, 12 heads (85.8 M parameters)."""
    return _vit(768, 12, 12, patch_size, kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """1024 wide, 24 deep, 16 heads (303.3 M parameters)."""
    return _vit(1024, 24, 16, patch_size, kwargs)


# What `--arch` accepts; the deit names are the original's synonyms.
ARCHITECTURES: dict[str, Callable[..., VisionTransformer]] = {
    "vit_nano": vit_nano,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "deit_tiny": vit_tiny,
    "deit_small": vit_small,
}
