"""The Vision Transformer of DINO, with the original's parameter names, so that checkpoints move both ways.

ViT (arXiv:2010.11929) as DeiT (arXiv:2012.12877) trains it. One tensor of images goes through the blocks as in the
textbook, (B, N, D). Images of several resolutions go through together: their tokens are rows of one matrix (M, D), and
attention alone looks at where an image ends (`attention.Packing`).
Axes: B images, N tokens (1 + patches), M tokens of all images, D channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.model.attention import Packing, packed
from fastdino.model.block import Attention, Block
from fastdino.model.drop_path import MODES, Rows, draw_orders, group_sizes
from fastdino.model.layers import in_dtype_of, init_linear, layer_norm
from fastdino.model.patches import DINOS_INTERPOLATION, Interpolation, PatchEmbed, resize
from fastdino.model.recompute import keep_recipes
from fastdino.model.rope import RopeEmbed, Rotation

__all__ = ["Attention", "Block", "PatchEmbed", "VisionTransformer"]  # the original has them in one file


class VisionTransformer(nn.Module):
    """The backbone of DINO, DINOv2 and DINOv3: the CLS token after the last norm. The defaults are DINO's.

    img_size: one-element list, the side in pixels the position embedding is laid out for; other sizes, square or
    not, are interpolated. num_classes: 0 for features, else a linear classifier follows.
    drop_path_mode: "sample" as the original, "batch" as DINOv2, which saves the dropped work. checkpointing: blocks
    keep their input alone and compute again in the backward pass; less memory, a third more time.
    init_std: deviation of weights, position embedding and CLS token at the start; the default is the original's.
    What DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) add, with `archs.PUBLISHED` for their models:
    ffn: of `mlp.FEED_FORWARDS`. init_values: where LayerScale starts. registers: tokens after CLS (arXiv:2309.16588),
    `register_tokens`, or `storage_tokens` with rope. mask_token: patches can be masked. interpolation: of the position
    table. rope: arguments of RopeEmbed, which takes the table's place. mask_k_bias: keys have no bias.
    untie_cls_and_patch_norms: CLS and registers end in `cls_norm`. untie_global_and_local_cls_norm: in training those
    of local crops, of all groups but the first, end in `local_cls_norm`. drop_path_uniform: the same for all blocks.
    fp32_residual: with weights in half precision, the stream that blocks add to keeps fp32, and so do the features.
    Attributes: embed_dim (D), num_heads, num_prefix_tokens (CLS and registers, before the patches); is_dinos: nothing
    of DINOv2's or DINOv3's is in it; packs: it takes crops of several resolutions in one pass.
    Raises ValueError where num_heads does not divide embed_dim or no patch fits img_size, and for what the original
    takes and no recipe of DINO uses: qk_scale, drop_rate, attn_drop_rate.

    Code written for the original's class: given one tensor, hooks on blocks and their layers see the original's
    (B, N, D), `block(x)`, `block(x, return_attention=True)` and `block.attn(x)` return what they do there, and a
    smaller `patch_embed.proj.stride` gives overlapping patches, whose positions are interpolated. What differs: a hook
    on `attn` sees None for the probabilities unless it is called for them; one on `patch_embed.proj` is called only
    where patches overlap; `attn_drop`, `proj_drop`, `pos_drop` and a module `drop_path` are not there; qkv_bias and the
    norms' epsilon are those of the original's vit_*, not of its class; given a list, as in training, tokens are packed
    (M, D), and the last block ends with CLS alone.
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
        *,
        ffn: str = "mlp",
        proj_bias: bool = True,
        ffn_bias: bool = True,
        mask_k_bias: bool = False,
        init_values: float | None = None,
        registers: int = 0,
        mask_token: bool = False,
        interpolation: Interpolation = DINOS_INTERPOLATION,
        rope: Mapping[str, Any] | None = None,
        untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        drop_path_uniform: bool = False,
        fp32_residual: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"qk_scale": qk_scale, "drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}.items():
            if value:
                raise ValueError(f"{name}: expected none, for it is not supported, got {value}")
        if drop_path_mode not in MODES:
            raise ValueError(f"drop_path_mode: expected {' or '.join(MODES)}, got {drop_path_mode!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        if not 0 < patch_size <= img_size[0]:
            raise ValueError(f"patch_size: expected at most img_size={img_size[0]}, got {patch_size}")
        self.drop_path_mode, self.checkpointing, self.fp32_residual = drop_path_mode, checkpointing, fp32_residual
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_embed = PatchEmbed(img_size[0], patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.interpolation = interpolation
        if rope is None:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.rope_embed = None if rope is None else RopeEmbed(embed_dim // num_heads, **rope)
        self.num_prefix_tokens = 1 + registers
        added = (ffn != "mlp", mask_k_bias, init_values, registers, mask_token, rope is not None)
        untied = untie_cls_and_patch_norms or untie_global_and_local_cls_norm
        self.is_dinos = proj_bias and ffn_bias and interpolation == DINOS_INTERPOLATION and not (any(added) or untied)
        # The originals' names: DINOv2's, and, where positions are rotary, DINOv3's.
        self._registers = None if not registers else "register_tokens" if rope is None else "storage_tokens"
        if self._registers:
            setattr(self, self._registers, nn.Parameter(torch.zeros(1, registers, embed_dim)))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        first = drop_path_rate if drop_path_uniform else 0
        drop_paths = torch.linspace(first, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_path,
                norm_layer,
                ffn=ffn,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                mask_k_bias=mask_k_bias,
                init_values=init_values,
            )
            for drop_path in drop_paths
        )
        self.norm = norm_layer(embed_dim)
        self.cls_norm = norm_layer(embed_dim) if untie_cls_and_patch_norms else None
        self.local_cls_norm = norm_layer(embed_dim) if untie_global_and_local_cls_norm else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if rope is None:
            nn.init.trunc_normal_(self.pos_embed, std=init_std)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        self.apply(partial(init_linear, std=init_std))
        if mask_token:  # DINOv2 and DINOv3 start tokens otherwise, and DINOv3 the patches' projection
            std = 1e-6 if rope is None else 0.02
            for tokens in (self.cls_token, *self._register_tokens()):
                nn.init.normal_(tokens, std=std)
        if rope is not None:
            bound = 1 / math.sqrt(in_chans * patch_size**2)
            for weight in self.patch_embed.proj.parameters():
                nn.init.uniform_(weight, -bound, bound)

    def _register_tokens(self) -> tuple[Tensor, ...]:
        """(1, R, D) registers, or nothing."""
        return (getattr(self, self._registers),) if self._registers else ()

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Position embedding (1, N, D) for tokens x (B, N, D) of images of w x h pixels, (B, 3, w, h)."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        # Positions hold for one size: a tracer that has left it open settles on the one it is shown.
        rows, cols = map(index, self.patch_embed.grid(w, h))
        if rows == cols == side and w == h:
            return self.pos_embed
        cls_pos, patch_pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        return torch.cat((cls_pos, resize(patch_pos, rows, cols, self.interpolation)), dim=1)

    def prepare_tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, N, D) tokens: CLS, registers, patches, positions added to CLS and patches.

        mask: (B, patches) bool, the patches that the mask token replaces.
        """
        # shape[0], not len(x), which an exported graph would hold as a constant
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        patches = self.patch_embed(x)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("mask: expected none, for this model has no mask token")
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat((cls, patches), dim=1)
        if self.rope_embed is None:
            tokens = tokens + self.interpolate_pos_encoding(tokens, *x.shape[-2:])
        if self.fp32_residual:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if not self._registers:
            return tokens
        registers = [part.expand(x.shape[0], -1, -1).to(tokens.dtype) for part in self._register_tokens()]
        return torch.cat((tokens[:, :1], *registers, tokens[:, 1:]), dim=1)

    def _rotations(self, sides: Sequence[Sequence[int]]) -> Sequence[Rotation | None]:
        """Of images of so many pixels, for each block: drawn anew where training draws. None without them."""
        if self.rope_embed is None:
            return [None] * len(self.blocks)
        grids = [self.patch_embed.grid(height, width) for height, width in sides]
        return cast(list[Rotation], self.rope_embed(grids, self.num_prefix_tokens, len(self.blocks)))

    def _orders(self, x: Tensor, packing: Packing | None = None) -> Sequence[list[list[Rows]] | None]:
        """Of images, for the branches of each block, drawn anew. None where drop-path asks for none."""
        n = len(self.blocks)
        if self.drop_path_mode != "batch" or not self.training or not any(block.drop_path for block in self.blocks):
            return [None] * n
        drawn = draw_orders(2 * n, group_sizes(packing, x), x.device)
        return [drawn[2 * i : 2 * i + 2] for i in range(n)]

    def _norm_of_cls(self, is_local: bool) -> nn.Module:
        """The last norm of CLS and registers."""
        if is_local and self.training and self.local_cls_norm is not None:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm

    def _normed(self, tokens: Tensor, is_local: bool = False) -> Tensor:
        """(B, N, D) after the last norm: that of CLS and registers, and that of the patches."""
        norm = self._norm_of_cls(is_local)
        if norm is self.norm:
            return in_dtype_of(tokens, norm)
        n = self.num_prefix_tokens
        return torch.cat((in_dtype_of(tokens[:, :n], norm), in_dtype_of(tokens[:, n:], self.norm)), dim=1)

    def _normed_cls(self, tokens: Tensor, packing: Packing | None) -> Tensor:
        """Packed CLS tokens (images, D), or (B, N, D), after their last norm."""
        if packing is None or self.local_cls_norm is None:
            return in_dtype_of(tokens, self._norm_of_cls(False))
        parts = tokens.split([n for n, _ in packing.groups])
        return torch.cat([in_dtype_of(part, self._norm_of_cls(i > 0)) for i, part in enumerate(parts)])

    def packing(self, runs: Sequence[tuple[int, int, int]]) -> Packing:
        """How the tokens of runs of images lie one after another: (images, height, width) of each run, in pixels."""
        return Packing(
            tuple((n, self.num_prefix_tokens + math.prod(self.patch_embed.grid(*sides))) for n, *sides in runs)
        )

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        packing: Packing | None = None,
        cls_only: bool = False,
        rotation: Rotation | None = None,
        orders: Sequence[Sequence[Rows]] | None = None,
    ) -> Tensor:
        """A block; under checkpointing, once more in the backward pass."""
        # Drawn outside: a checkpoint then has no random state to put back, which a CUDA graph could not.
        paths = cast(Block, block).paths(x, packing, self.drop_path_mode, cls_only, orders)
        call = partial(block, packing=packing, paths=paths, cls_only=cls_only)
        if rotation is not None:  # a block of somebody's own need not know it
            call = partial(call, rotation=rotation)
        return self._called(call, x)

    def _called(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return call(x)
        return cast(Tensor, checkpoint(call, x, use_reentrant=False, preserve_rng_state=False))

    def _last_is_watched(self) -> bool:
        """Whether somebody hooks what the last block does with the patches, whom forward itself does not need."""
        if torch.compiler.is_compiling():
            return False
        return any(m._forward_hooks or m._forward_pre_hooks for m in (*self.blocks[-1].modules(), self.norm))

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W) -> (B, D) CLS features; a list of such, of several resolutions, to all their features."""
        packing = None
        if isinstance(x, Tensor):
            tokens, sides = self.prepare_tokens(x), [x.shape[-2:]]
        else:
            tokens, packing = packed([self.prepare_tokens(images) for images in x])
            sides = [images.shape[-2:] for images in x]
        to_cls = packing is not None or not self._last_is_watched()
        rotations, orders = self._rotations(sides), self._orders(tokens, packing)
        with keep_recipes():
            for i, block in enumerate(self.blocks):
                only = to_cls and i == len(self.blocks) - 1
                tokens = self._run(block, tokens, packing, only, rotations[i], orders[i])
        features = self._normed_cls(tokens, packing)
        return self.head(features[:, 0] if packing is None else features)

    def forward_features(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[dict[str, Tensor]]:
        """Tensors (B, 3, H, W) of one resolution each -> of each, after the last norm, {name: tokens}.

        cls (B, D), reg (B, registers, D), patch (B, patches, D). All go through together. masks: of each, (B, patches)
        bool, the patches that the mask token replaces, or None. In training, images after the first tensor are local
        crops, whose CLS and registers may have a norm of their own (DINOv3).
        Raises ValueError where there are masks and the model has no mask token.
        """
        masks = masks or [None] * len(images)
        groups = [self.prepare_tokens(x, mask) for x, mask in zip(images, masks, strict=True)]
        tokens, packing = packed(groups)
        with keep_recipes():
            rotations, orders = self._rotations([x.shape[-2:] for x in images]), self._orders(tokens, packing)
            for block, rotation, order in zip(self.blocks, rotations, orders):
                tokens = self._run(block, tokens, packing, rotation=rotation, orders=order)
        n = self.num_prefix_tokens
        normed = [self._normed(group, is_local=i > 0) for i, group in enumerate(packing.split(tokens))]
        return [{"cls": x[:, 0], "reg": x[:, 1:n], "patch": x[:, n:]} for x in normed]

    def forward_masked(
        self, images: Sequence[Tensor], indices: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What DINOv2's losses look at: (CLS of all images (images, D), M patches of the first group (M, D)), normed.

        images, masks: as of `forward_features`, masks of the first group alone. indices: (M,) among its B * N patches.
        The last block's projection and MLP skip the patches that are not asked for.
        """
        tokens, packing = packed([self.prepare_tokens(x, masks if i == 0 else None) for i, x in enumerate(images)])
        n_tokens = packing.groups[0][1]
        n_patches = n_tokens - self.num_prefix_tokens
        image = indices // n_patches
        rows = torch.cat((packing.cls_rows(tokens), indices + (image + 1) * self.num_prefix_tokens))
        image_of_row = torch.cat((torch.arange(packing.n_images, device=tokens.device), image))
        rotations, orders = self._rotations([x.shape[-2:] for x in images]), self._orders(tokens, packing)
        *others, last = self.blocks
        with keep_recipes():
            for block, rotation, order in zip(others, rotations, orders):
                tokens = self._run(block, tokens, packing, rotation=rotation, orders=order)
            paths = cast(Block, last).paths_of_rows(tokens, packing, self.drop_path_mode, image_of_row)
            call = partial(last, packing=packing, paths=paths, rotation=rotations[-1], rows=rows)
            tokens = self._called(call, tokens)
        cls, patches = tokens.split([packing.n_images, len(indices)])
        return self._normed_cls(cls, packing), in_dtype_of(patches, self.norm)

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, heads, N, N) attention probabilities of the last block."""
        *others, last = self.blocks
        tokens, rotations = self.prepare_tokens(x), self._rotations([x.shape[-2:]])
        for block, rotation in zip(others, rotations):
            tokens = self._run(block, tokens, rotation=rotation)
        if rotations[-1] is None:
            return last(tokens, return_attention=True)
        return last(tokens, return_attention=True, rotation=rotations[-1])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """(B, 3, H, W) -> the normalised tokens (B, N, D) after each of the last n blocks.

        CLS first, then registers, `num_prefix_tokens` together, then the patches row by row.
        """
        tokens, layers = self.prepare_tokens(x), []
        for i, (block, rotation) in enumerate(zip(self.blocks, self._rotations([x.shape[-2:]]))):
            tokens = self._run(block, tokens, rotation=rotation)
            if len(self.blocks) - i <= n:
                layers.append(self._normed(tokens))
        return layers
