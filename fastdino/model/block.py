"""A block of the Vision Transformer: attention and a feed-forward network, each on a residual branch.

ViT (arXiv:2010.11929), with the original's parameter names. The stream is (B, N, D), as in the textbook, or the packed
tokens of several resolutions, (M, D), of which attention alone looks at where an image ends (`attention.Packing`).
Axes: B images, N tokens (1 + patches), M tokens of all images, H heads, D channels.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.attention import Packing, attention, attention_of_cls, turned
from fastdino.model.drop_path import Path, Rows, draw, of_rows
from fastdino.model.layers import QkvWithoutKeyBias, layer_norm, layer_scale
from fastdino.model.mlp import feed_forward
from fastdino.model.rope import Rotation


def _cls(tokens: Tensor, packing: Packing | None) -> Tensor:
    """The CLS tokens of packed tokens (M, D) -> (images, D), or of one resolution (B, N, D) -> (B, 1, D)."""
    return tokens[:, :1] if packing is None else packing.cls(tokens)


class Attention(nn.Module):
    """Multi-head self-attention. mask_k_bias: the keys have no bias, as in DINOv3."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        mask_k_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = QkvWithoutKeyBias(dim) if mask_k_bias and qkv_bias else nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        cls_only: bool = False,
        with_map: bool = True,
        rotation: Rotation | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) -> (B, N, D), and the probabilities (B, H, N, N).

        with_map=False: None in their place, because the fused kernels never write them down; x may be packed, (M, D).
        cls_only: what CLS attends to, (B, 1, D) or (images, D). rotation: of queries and keys.
        rows: of packed tokens, (m,) those whose result is wanted, (m, D).
        """
        # not somebody's own in its place
        if cls_only and not with_map and type(self.qkv) in (nn.Linear, QkvWithoutKeyBias):
            return self.proj(self._attended_by_cls(x, packing, rotation)), None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (..., 3, H, D / H)
        probs = None
        if with_map:
            q, k, v = turned(qkv, rotation, packing).unbind(-3)
            probs = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).softmax(-1)
            attended = torch.einsum("bhqk,bkhd->bqhd", probs, v).flatten(-2)
        else:
            attended = attention(qkv, self.scale, packing, rotation)
        if rows is not None:
            return self.proj(attended.index_select(0, rows)), probs
        return self.proj(_cls(attended, packing) if cls_only else attended), probs

    def _attended_by_cls(self, x: Tensor, packing: Packing | None, rotation: Rotation | None = None) -> Tensor:
        """What CLS attends to, (images, D) or (B, 1, D); the patches make no queries, and CLS is not rotated."""
        images = packing or Packing(((x.shape[0], x.shape[1]),))
        tokens, sizes = x.flatten(0, -2), (x.shape[-1], 2 * x.shape[-1])
        to_q, to_kv = self.qkv.weight.split(sizes)
        bias = self.qkv.masked_bias if isinstance(self.qkv, QkvWithoutKeyBias) else self.qkv.bias
        bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
        q = F.linear(images.cls(tokens), to_q, bias_q).unflatten(-1, (self.num_heads, -1))
        kv = F.linear(tokens, to_kv, bias_kv).unflatten(-1, (2, self.num_heads, -1))
        attended = attention_of_cls(q, kv, self.scale, images, rotation)
        return attended if packing else attended[:, None]


class Block(nn.Module):
    """Pre-norm transformer block. drop_path: the probability that training leaves an image out of a branch.

    ffn: of `mlp.FEED_FORWARDS`. init_values: where LayerScale starts; None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
        *,
        ffn: str = "mlp",
        proj_bias: bool = True,
        ffn_bias: bool = True,
        mask_k_bias: bool = False,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, mask_k_bias)
        self.ls1 = layer_scale(dim, init_values)
        self.drop_path = drop_path
        self.norm2 = norm_layer(dim)
        self.mlp = feed_forward(ffn, dim, int(dim * mlp_ratio), ffn_bias)
        self.ls2 = layer_scale(dim, init_values)

    def paths(
        self,
        x: Tensor,
        packing: Packing | None,
        mode: str,
        cls_only: bool = False,
        orders: Sequence[Sequence[Rows]] | None = None,
    ) -> tuple[Path, Path]:
        """What `forward` goes by: paths through attention and MLP, drawn anew. orders: of images, for both."""
        drop_prob, after = self.drop_path if self.training else 0.0, packing.of_cls if packing and cls_only else packing
        of_attn, of_mlp = orders or (None, None)
        return draw(mode, drop_prob, packing, after, x, of_attn), draw(mode, drop_prob, after, after, x, of_mlp)

    def paths_of_rows(self, x: Tensor, packing: Packing, mode: str, image_of_row: Tensor) -> tuple[Path, Path]:
        """The same where `forward` is asked for rows alone; image_of_row: (m,) the image that each of them is of."""
        drop_prob = self.drop_path if self.training else 0.0
        to_attn, to_mlp = (of_rows(mode, drop_prob, packing, image_of_row, x) for _ in range(2))
        return to_attn, to_mlp

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        *,
        packing: Packing | None = None,
        paths: tuple[Path, Path] | None = None,
        cls_only: bool = False,
        rotation: Rotation | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or with a packing (M, D) -> (M, D).

        return_attention: the probabilities (B, H, N, N) alone. paths: None draws them. cls_only: CLS alone, (B, 1, D)
        or (images, D), so that projection and MLP skip the patches. rotation: of queries and keys. rows: (m,)
        of packed tokens, the only ones that are wanted, (m, D); paths are then those of `paths_of_rows`.
        """
        if return_attention:
            return cast(Tensor, self.attn(self.norm1(x), rotation=rotation)[1])
        to_attn, to_mlp = paths or self.paths(x, packing, "sample", cls_only)
        attended, _ = self.attn(self.norm1(to_attn.take(x)), to_attn.packing, cls_only, False, rotation, rows)
        x = _cls(x, packing) if cls_only else x if rows is None else x.index_select(0, rows)
        x = to_attn.add(x, self.ls1(attended))
        return to_mlp.add(x, self.ls2(self.mlp(self.norm2(to_mlp.take(x)))))
