"""What check_v2.py asks of an implementation of the DINOv2 and DINOv3 recipes, by fastdino's own functions."""

import math

import numpy as np
import torch

from fastdino import DINOHead, VisionTransformer, load_backbone, objectives
from fastdino.data.masks import BlockMasks
from fastdino.data.masks import mask_batch as draw_masks
from fastdino.model.archs import CONVNEXTS, PUBLISHED
from fastdino.model.attention import Packing
from fastdino.model.block import Block
from fastdino.model.convnext import ConvNeXt
from fastdino.model.drop_path import Path as DropPath
from fastdino.model.drop_path import Rows, of_images
from fastdino.model.layers import NORMS, layer_norm
from fastdino.model.masked import MaskedMultiCrop
from fastdino.model.patches import Interpolation
from fastdino.model.rope import Draw, RopeEmbed
from fastdino.objectives import DINOv2Loss, DINOv2Weights, GramTeacher
from fastdino.train.iteration_schedules import LR_SCALES, IterationSchedules, warmup_cosine_constant
from fastdino.train.step import TrainStep
from fastdino.train.tuning import backbone_multipliers, dinov2_tuning, head_multipliers
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
    got = IterationSchedules.from_settings(**optim, **teacher, **settings)
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
    rotation = None
    if module.rope is not None:
        rotation = module.rope.to(tokens.dtype)(grids, xs[0].shape[1] - math.prod(grids[0]))[0]
    paths = DropPath(packing), DropPath(packing)
    if rows:
        sizes = [n for n, _ in packing.groups]
        images = [[Rows.among(n, x) for n, x in zip(sizes, rows[branch])] for branch in ("attn", "ffn")]
        paths = tuple(of_images(branch, packing, packing, tokens) for branch in images)
    return packing.split(module(tokens, packing=packing, paths=paths, rotation=rotation))


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
        module.rope_embed.draw = lambda n_blocks, n_groups: Draw(**rope)
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
    halves = module([(H, W)])[0]
    return *(half.tile(2) for half in halves), module.periods


def architecture(name):
    with torch.device("meta"):
        module = ConvNeXt(*CONVNEXTS[name]) if name in CONVNEXTS else PUBLISHED[name]()
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def load_teacher(path, version, cfg, img_size):
    return load_backbone(path, num_heads=2 if version == 2 else None).double()


# Training.
def _heads(cfg, version, name):
    given = cfg[name]
    return DINOHead(
        cfg["embed_dim"],
        given["head_n_prototypes"],
        norm_last_layer=False,
        nlayers=given["head_nlayers"],
        hidden_dim=given["head_hidden_dim"],
        bottleneck_dim=given["head_bottleneck_dim"],
        weight_norm=version == 2,
    )


def _network(cfg):
    version, given = cfg["version"], cfg["student"]
    kw = {name: cfg[name] for name in ("version", "embed_dim", "depth", "num_heads")}
    kw |= {"patch_size": given["patch_size"], "ffn_layer": given.get("ffn_layer", "mlp")}
    kw |= {"img_size": cfg["crops"]["global_crops_size"]}
    if version == 2:
        kw |= {"init_values": 1e-5, "num_register_tokens": given.get("num_register_tokens", 0)}
        kw |= {"interpolate_offset": given.get("interpolate_offset", 0.1)}
        kw |= {"interpolate_antialias": given.get("interpolate_antialias", False)}
    else:
        names = ("n_storage_tokens", "mask_k_bias", "norm_layer", "untie_global_and_local_cls_norm")
        kw |= {"layerscale_init": 1e-5, **{name: given[name] for name in names}}
    shared = version == 2 and not cfg["ibot"]["separate_head"]
    ibot_head = None if shared else _heads(cfg, version, "ibot")
    return MaskedMultiCrop(backbone(kw), _heads(cfg, version, "dino"), ibot_head)


def _curve(case, length, epochs):
    """One of DINOv3's explicit schedules."""
    warmup, cosine = case["warmup_epochs"] * length, case.get("cosine_epochs")
    return warmup_cosine_constant(
        case["start"], case["peak"], case["end"], warmup, epochs * length, None if cosine is None else cosine * length
    )


def _schedules(cfg, epochs, length):
    if cfg["version"] == 3:
        given = {name: dict(case) for name, case in cfg["schedules"].items()}
        # DINOv3 scales the rate with the batch, the square root's from a batch of 64.
        scale = LR_SCALES["sqrt_wrt_1024"](cfg["batch"]) * 4
        given["lr"] |= {name: given["lr"][name] * scale for name in ("peak", "end")}
        curves = {name: _curve(case, length, epochs) for name, case in given.items()}
        thawed = np.arange(epochs * length) >= given["lr"]["freeze_last_layer_epochs"] * length
        return IterationSchedules(
            lr=curves["lr"],
            last_layer_lr=curves["lr"] * thawed,
            weight_decay=curves["weight_decay"],
            momentum_teacher=curves["momentum"],
            teacher_temp=curves["teacher_temp"],
        )
    optim, teacher = cfg["optim"], cfg["teacher"]
    return IterationSchedules.from_settings(
        epochs=epochs,
        epoch_length=length,
        lr=optim["base_lr"] * LR_SCALES["sqrt_wrt_1024"](cfg["batch"]),
        min_lr=1e-6,
        warmup_epochs=optim["warmup_epochs"],
        weight_decay=0.04,
        weight_decay_end=0.4,
        momentum_teacher=teacher.get("momentum_teacher", 0.992),
        final_momentum_teacher=1.0,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=teacher["warmup_teacher_temp_epochs"],
        freeze_last_layer_epochs=optim["freeze_last_layer_epochs"],
    )


class _WithLocalAndGramWeights(DINOv2Loss):
    """Weights that follow DINOv3's schedules."""

    def __init__(self, curves, **options):
        super().__init__(**options)
        self.curves = curves

    def columns(self, epochs):
        return self.curves


def _objective(cfg, gram_teacher, epochs, length):
    curves = {}
    if cfg["version"] == 3:
        curves["local_weight"] = _curve(cfg["dino"]["local_loss_weight_schedule"], length, epochs)
        curves["gram_weight"] = _curve(cfg["gram"]["loss_weight_schedule"], length, epochs)
    return _WithLocalAndGramWeights(
        curves,
        ncrops=2 + cfg["crops"]["local_crops_number"],
        out_dim=cfg["dino"]["head_n_prototypes"],
        patch_out_dim=cfg["ibot"]["head_n_prototypes"],
        centering="center" if cfg["train"].get("centering") == "centering" else "sinkhorn",
        weights=DINOv2Weights(reweights_local=cfg["version"] == 3),
        gram=gram_teacher,
    )


def _gram_teacher(cfg, tensors, dtype):
    if "gram" not in cfg:
        return None
    backbone = _network(cfg).backbone
    backbone.load_state_dict(_state(tensors, "gram_init", "backbone."))
    given = cfg["gram"]
    return GramTeacher(
        backbone.to(dtype),
        first_update=given["it_first_update"],
        update_every=given["update_frequency"],
        max_updates=given["max_updates"],
        img_level=given["img_level"],
    )


def _state(tensors, key, prefix=""):
    start = f"{key}.{prefix}"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def _views(tensors, i, dtype):
    crops = [x.to(dtype) / 16 for kind in ("global", "local") for x in tensors[f"{kind}{i}"]]
    masks, weights = tensors[f"masks{i}"], tensors[f"weights{i}"]
    extra = [*masks.chunk(2), masks.flatten().nonzero().flatten()[None], weights[None]]
    return [*crops, *extra, *(x.to(dtype) / 16 for x in tensors.get(f"gram{i}", ()))]


def train(cfg, tensors, dtype):
    torch.manual_seed(0)
    epochs, length = cfg["optim"]["epochs"], cfg["train"]["OFFICIAL_EPOCH_LENGTH"]
    networks = [_network(cfg), _network(cfg)]
    for network in networks:
        network.load_state_dict(_state(tensors, "init"))
        network.to(dtype).train(network is networks[0])
    networks[1].requires_grad_(False)
    optim = cfg["optim"]
    step = TrainStep(
        student=networks[0],
        teacher=networks[1],
        loss=_objective(cfg, _gram_teacher(cfg, tensors, dtype), epochs, length).to(dtype),
        optimizer="adamw",
        schedules=_schedules(cfg, epochs, length),
        niter_per_ep=length,
        clip_grad=optim["clip_grad"],
        tuning=dinov2_tuning(
            cfg["depth"],
            lr_decay=optim.get("layerwise_decay", 0.9),
            patch_embed_lr=0.2,
            betas=(0.9, optim.get("adamw_beta2", 0.999)),
        ),
    )
    step.schedule.seek(0)
    step.schedule.advance()
    step.compute(step.forward, _views(tensors, 0, dtype))
    out = {"grad0": {name: p.grad.clone() for name, p in step.student.named_parameters()}}
    out |= {"total_loss": [], "grad_norm": []}
    for i in range(epochs * length):
        if cfg["version"] == 2 and hasattr(step.loss, "center"):  # the originals' files lack the last step's update
            out |= {"center_cls": step.loss.center.clone(), "center_patch": step.loss.patch_center.clone()}
        step.schedule.seek(i)
        metrics = step(_views(tensors, i, dtype), i)
        out["total_loss"].append(float(metrics.loss))
        out["grad_norm"].append(step.update.optimizer.grad_norms.clone())
    out["total_loss"] = torch.tensor(out["total_loss"], dtype=torch.float64)
    out["grad_norm"] = torch.stack(out["grad_norm"])
    for name, module in (("student", step.student), ("teacher", step.teacher)):
        out[name] = module.state_dict()
    if step.loss.gram_teacher is not None:
        out["gram_teacher"] = {f"backbone.{k}": v for k, v in step.loss.gram_teacher.backbone.state_dict().items()}
    return out
