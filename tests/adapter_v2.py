"""What `check_v2.py` asks for, by the product's own modules. A section for each part of the recipe."""

import torch

# --- backbones: fastdino.model ---
from fastdino import DINOHead, VisionTransformer, load_backbone
from fastdino.model.archs import CONVNEXTS, PUBLISHED
from fastdino.model.attention import Packing
from fastdino.model.convnext import ConvNeXt
from fastdino.model.drop_path import Path as DropPath
from fastdino.model.drop_path import of_images
from fastdino.model.layers import NORMS, layer_norm
from fastdino.model.rope import Draw, RopeEmbed
from fastdino.model.vit import Block, Interpolation


def head(version, kw):
    return DINOHead(**kw, norm_last_layer=False, weight_norm=version == 2)


def block(version, variant, dim, num_heads):
    module = Block(
        dim,
        num_heads,
        qkv_bias=variant.get("qkv_bias", True),
        norm_layer=NORMS[variant["norm"]] if "norm" in variant else layer_norm,
        ffn=variant.get("ffn", "mlp"),
        proj_bias=variant.get("proj_bias", True),
        ffn_bias=variant.get("ffn_bias", True),
        mask_k_bias=variant.get("mask_k_bias", False),
        init_values=1.0 if variant.get("ls") else None,
    )
    module.rope = RopeEmbed(dim // num_heads) if variant.get("rope") else None
    if module.rope is not None:  # not of the block's own state
        module.__dict__["rope"] = module._modules.pop("rope")
    return module


def run_block(module, xs, grids, rows):
    packing, tokens = Packing(tuple(tuple(x.shape[:2]) for x in xs)), torch.cat([x.flatten(0, 1) for x in xs])
    rotations = None
    if module.rope is not None:
        tables = [module.rope.to(tokens.dtype)(*grid) for grid in grids]
        rotations = [table.after(x.shape[1] - len(table.sin)) for table, x in zip(tables, xs)]
    paths = DropPath(packing), DropPath(packing)
    if rows:
        paths = tuple(of_images(rows[branch], packing, packing, tokens) for branch in ("attn", "ffn"))
    return packing.split(module(tokens, packing=packing, paths=paths, rotations=rotations))


def backbone(kw):
    kw = dict(kw)
    same = {"patch_size", "embed_dim", "depth", "num_heads", "untie_cls_and_patch_norms"}
    same |= {"untie_global_and_local_cls_norm", "mask_k_bias"}
    options = {name: kw[name] for name in same if name in kw}
    options |= {"img_size": [kw.get("img_size", 224)], "ffn": kw["ffn_layer"], "mask_token": True}
    if kw["version"] == 2:
        options["interpolation"] = Interpolation(kw["interpolate_offset"], kw["interpolate_antialias"], True)
        options |= {"init_values": kw["init_values"], "registers": kw["num_register_tokens"]}
    else:
        options["rope"] = {
            name: kw[f"pos_embed_rope_{name}_coords"]
            for name in ("shift", "jitter", "rescale")
            if f"pos_embed_rope_{name}_coords" in kw
        }
        options |= {"init_values": kw["layerscale_init"], "registers": kw["n_storage_tokens"]}
        options["norm_layer"] = NORMS[kw["norm_layer"]]
    return VisionTransformer(**options)


def run_backbone(module, images, masks, rope):
    if rope:
        depth, groups = rope["shift"].shape[:2]
        draws = iter([(block, group) for block in range(depth) for group in range(groups)])
        module.rope_embed.draw = lambda: Draw(*(rope[name][at] for at in [next(draws)] for name in Draw._fields))
    return module.forward_features(images, masks)


def intermediate(module, x, n):
    rows, cols = module.patch_embed.grid(*x.shape[-2:])
    layers = module.get_intermediate_layers(x, n)
    patches = [tokens[:, module.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, cols)) for tokens in layers]
    return [(patch, tokens[:, 0]) for patch, tokens in zip(patches, layers)]


def pos_embed(table, height, width, patch, offset, antialias):
    side = int((table.shape[1] - 1) ** 0.5)
    how = Interpolation(offset, antialias, True)
    vit = VisionTransformer(
        [side * patch], patch, embed_dim=table.shape[2], depth=0, num_heads=1, mask_token=True, interpolation=how
    )
    vit.pos_embed.data = table
    return vit.interpolate_pos_encoding(table, height, width)


def rope(kw, H, W, dtype):
    kw = dict(kw)
    module = RopeEmbed(kw.pop("embed_dim") // kw.pop("num_heads"), **kw, dtype=dtype)
    table = module(H, W)
    return table.sin, table.cos, module.periods


def architecture(name):
    with torch.device("meta"):
        module = ConvNeXt(*CONVNEXTS[name]) if name in CONVNEXTS else PUBLISHED[name]()
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def load_teacher(path, version, cfg, img_size):
    return load_backbone(path, num_heads=2 if version == 2 else None).double()
