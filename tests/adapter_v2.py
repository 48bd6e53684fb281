"""What check_v2.py asks of an implementation of the DINOv2 and DINOv3 recipes, by fastdino's own functions."""

import torch

from fastdino import DINOHead, VisionTransformer, load_backbone, objectives
from fastdino.data.masks import BlockMasks
from fastdino.data.masks import mask_batch as draw_masks
from fastdino.model.archs import CONVNEXTS, PUBLISHED
from fastdino.model.attention import Packing
from fastdino.model.convnext import ConvNeXt
from fastdino.model.drop_path import Path as DropPath
from fastdino.model.drop_path import of_images
from fastdino.model.layers import NORMS, layer_norm
from fastdino.model.rope import Draw, RopeEmbed
from fastdino.model.vit import Block, Interpolation
from fastdino.train.iteration_schedules import LR_SCALES, IterationSchedules, warmup_cosine_constant
from fastdino.train.param_multipliers import backbone_multipliers, head_multipliers
from fastdino_kernels import center_update_, patch_loss, sinkhorn_center
from fastdino_kernels import dino_loss as dino_loss_of_pairs

# Losses and masks.
STUDENT_TEMP = 0.1


def _logits(probs):
    """Whose softmax at temperature 1 is `probs`; the ops take logits."""
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log(), probs.new_zeros(probs.shape[-1])


def softmax_center(logits, center, temp):
    return torch.softmax((logits - center) / temp, dim=-1)


def sinkhorn(logits, temp):
    return softmax_center(logits, sinkhorn_center(logits, temp), temp)


def center_update(center, logits):
    center = center.clone()
    center_update_(center.flatten(), logits[None], 0.9)
    return center


def dino_loss(globals_, locals_, probs):
    """The two parts of the loss over all pairs; only their sum is the op's, so the local part is the rest."""
    n_global_pairs, n_pairs = 2, 2 + 2 * len(locals_)
    teacher, center = _logits(probs)
    whole = dino_loss_of_pairs(torch.cat([globals_, locals_]), teacher, center, STUDENT_TEMP, 1.0)
    part = dino_loss_of_pairs(globals_, teacher, center, STUDENT_TEMP, 1.0) * (n_global_pairs / n_pairs)
    return part, whole - part


def dino_loss_diag(globals_, probs):
    teacher, center = _logits(probs)
    pairs = [dino_loss_of_pairs(views, teacher, center, STUDENT_TEMP, 1.0) for views in (globals_, globals_.flip(0))]
    return sum(pairs) / 2


def ibot_loss(student, probs, masks, weights):
    n_masked = int(masks.sum())
    if weights is None:
        weights = (1 / masks.sum(-1).clamp(min=1).float()).repeat_interleave(masks.sum(-1))
    padded = torch.zeros(len(student), dtype=student.dtype)
    padded[:n_masked] = weights.to(student.dtype) / len(masks)
    return patch_loss(student, *_logits(probs), padded, STUDENT_TEMP, 1.0)


def koleo(x, topk):
    return objectives.koleo(x, topk)


def gram(student, teacher, **flags):
    return objectives.gram(student, teacher, **flags)


def _generator(version, input_size, max_num_patches=None, num_masking_patches=None, **options):
    names = {"min_num_patches": "min_patches", "min_aspect": "min_aspect", "roll": "circular_shift"}
    options = {names.get(name, name): value for name, value in options.items() if value is not None}
    most = num_masking_patches if max_num_patches is None else max_num_patches
    return BlockMasks(height=input_size[0], width=input_size[1], max_patches=most, exact=version == 3, **options)


def mask(version, kw, count, py, nprng):
    return _generator(version, **kw).draw(count, py, nprng)


def mask_batch(version, case, py, nprng):
    side = case["img_size"] // case["patch_size"]
    shift = {"circular_shift": case["circular_shift"]} if version == 3 else {}
    generator = _generator(version, (side, side), case["max_num_patches"], **shift)
    got = draw_masks(generator, 2 * case["images"], case["probability"], case["ratio"], py, nprng)
    return {
        "masks": got.masks,
        "indices": got.indices,
        "weights": got.weights,
        "n_masked": len(got.indices),
        "upperbound": got.upper_bound,
    }


# Schedules and parameters.
def schedules(case):
    optim, teacher = dict(case["optim"]), case["teacher"]
    scale = LR_SCALES[optim.pop("scaling_rule")](case["batch"])
    if case["version"] == 2:
        lr = optim.pop("base_lr") * scale
    else:  # DINOv3 counts the square root from another batch
        lr = optim.pop("lr") * scale * (4 if case["optim"]["scaling_rule"] == "sqrt_wrt_1024" else 1)
    extra = optim.pop("schedule_trunc_extra", 0.0)
    settings = {"epoch_length": case["epoch_length"], "n": case["n"], "trunc_extra": extra, "lr": lr}
    got = IterationSchedules.of(**optim, **teacher, **settings)
    names = {"wd": "weight_decay", "momentum": "momentum_teacher"}
    return {k: getattr(got, names.get(k, k)) for k in ("lr", "wd", "momentum", "teacher_temp", "last_layer_lr")}


def curve(**kw):
    return warmup_cosine_constant(**kw)


def param_groups(case):
    settings = case["depth"], case["lr_decay_rate"], case["patch_embed_lr_mult"]
    return {
        "backbone": {name: list(backbone_multipliers(name, *settings)) for name in case["names"]["backbone"]},
        "head": {name: list(head_multipliers(name)) for name in case["names"]["head"]},
    }


# Backbones and heads.
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
