"""The small networks and the loss of the golden trajectories."""

from fastdino import DINOHead, DINOLoss, MultiCropWrapper, VisionTransformer


def micro_networks(cfg):
    """The small student and teacher of the golden trajectories."""

    def network(norm_last_layer):
        backbone = VisionTransformer(
            img_size=[cfg["img_size"]],
            patch_size=cfg["patch_size"],
            embed_dim=cfg["embed_dim"],
            depth=cfg["depth"],
            num_heads=cfg["num_heads"],
        )
        dims = {"hidden_dim": cfg["hidden_dim"], "bottleneck_dim": cfg["bottleneck_dim"]}
        return MultiCropWrapper(
            backbone, DINOHead(cfg["embed_dim"], cfg["out_dim"], norm_last_layer=norm_last_layer, **dims)
        )

    return network(cfg["norm_last_layer"]), network(True).requires_grad_(False)


def micro_loss(cfg):
    return DINOLoss(
        cfg["out_dim"],
        2 + cfg["local_crops_number"],
        cfg["warmup_teacher_temp"],
        cfg["teacher_temp"],
        cfg["warmup_teacher_temp_epochs"],
        cfg["epochs"],
    )
