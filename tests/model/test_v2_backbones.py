"""Backbones of DINOv2 and DINOv3 beyond the golden numbers: files, packing, draws, and who looks at their tokens."""

import copy

import numpy as np
import pytest
import torch

import fastdino
from fastdino import DINOHead, MultiCropWrapper, VisionTransformer
from fastdino.cli import main
from fastdino.errors import UserError
from fastdino.eval.attention_maps import cls_attention
from fastdino.eval.features import backbone_features
from fastdino.model import mlp
from fastdino.model.archs import PUBLISHED, check_arch, heads_of
from fastdino.model.convnext import ConvNeXt

TINY = {"embed_dim": 192, "depth": 2, "num_heads": 3, "patch_size": 8}
KINDS = {
    "v2": ("dinov2_vits14", {"img_size": [32]}),
    "v2 registers": ("dinov2_vits14_reg", {"img_size": [32]}),
    "v2 giant": ("dinov2_vitg14_reg", {"img_size": [32]}),
    "v3": ("dinov3_vits16", {}),
    "v3 plus": ("dinov3_vits16plus", {}),
    "v3 7B": ("dinov3_vit7b16", {}),
}


def tiny(kind, **options):
    """A published architecture, small; its weights are random where they would start at zero."""
    name, more = KINDS[kind]
    torch.manual_seed(0)
    vit = PUBLISHED[name](**{**TINY, **more, **options})
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 40])
def test_a_file_gives_the_network_that_wrote_it(kind, size, tmp_path):
    vit, images = tiny(kind), torch.randn(2, 3, size, size)
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    loaded = fastdino.load_backbone(tmp_path / "weights.pth")
    assert loaded.num_heads == 3
    assert not loaded.training
    assert torch.equal(loaded(images), vit(images))
    for ours, theirs in zip(loaded.get_intermediate_layers(images, 2), vit.get_intermediate_layers(images, 2)):
        assert torch.equal(ours, theirs)


def test_a_file_of_the_published_sizes_loads(tmp_path):
    vit = PUBLISHED["dinov3_vits16plus"]()
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    loaded = fastdino.load_backbone(tmp_path / "weights.pth")
    assert (loaded.num_heads, len(loaded.blocks), loaded.num_prefix_tokens) == (6, 12, 5)
    assert torch.equal(loaded.rope_embed.periods, vit.rope_embed.periods)


def test_a_convnext_loads_and_gives_features(tmp_path):
    net = ConvNeXt((1, 2, 1, 1), (8, 12, 16, 24))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    loaded, images = fastdino.load_backbone(tmp_path / "weights.pth"), torch.randn(2, 3, 64, 96)
    assert torch.equal(loaded(images), net(images))
    features = loaded.forward_features([images])[0]
    assert features["patch"].shape == (2, 6, 24)
    torch.testing.assert_close(features["cls"], net(images))
    assert main(["knn", "--pretrained_weights", str(tmp_path / "weights.pth"), "--size", "32", "--nb_knn", "1"]) == 0


def test_a_convnext_that_lacks_a_stage_is_refused(tmp_path):
    state = ConvNeXt((1, 1, 1, 1), (8, 12, 16, 24)).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("stages.3")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="no ConvNeXt of four stages: found 3"):
        fastdino.load_backbone(tmp_path / "weights.pth")


@pytest.mark.parametrize("ratio", [1.3, 2.71, 3.999])
@pytest.mark.parametrize("ffn", ["mlp", "swiglufused", "swiglu", "swiglu64"])
def test_the_width_of_mlps_is_told_by_the_weights(ffn, ratio, tmp_path):
    vit = tiny("v3", ffn=ffn, mlp_ratio=ratio, rope=None)
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    state = fastdino.load_backbone(tmp_path / "weights.pth").state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in vit.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2_vits14", "dinov2_vits14 is trained by --recipe dinov2, got dino"),
        ("dinov3_convnext_tiny", "the ConvNeXts of DINOv3 were distilled"),
    ],
)
def test_an_architecture_says_which_recipe_trains_it(name, words):
    with pytest.raises(ValueError, match=words):
        check_arch(name)
    if name in PUBLISHED:
        check_arch(name, "dinov2")


def test_heads_of_all_published_models_are_told_by_the_width():
    for arch in PUBLISHED.values():
        assert heads_of(arch.width) == arch.heads


def test_a_file_that_lacks_a_register_mask_is_refused(tmp_path):
    state = tiny("v3").state_dict()
    del state["blocks.1.attn.qkv.bias_mask"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.bias_mask is missing"):
        fastdino.load_backbone(tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_crops_get_the_features_that_they_get_alone(kind):
    vit = tiny(kind).double()
    crops = [torch.randn(2, 3, side, side + 8, dtype=torch.float64) for side in (32, 16)]
    together, alone = vit(crops), torch.cat([vit(crop) for crop in crops])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    for features, crop in zip(vit.forward_features(crops), crops):
        tokens = vit.get_intermediate_layers(crop)[0]
        joined = torch.cat((features["cls"][:, None], features["reg"], features["patch"]), dim=1)
        torch.testing.assert_close(joined, tokens, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(features["cls"], vit(crop), rtol=1e-10, atol=1e-12)


def test_recomputed_blocks_have_the_gradient_of_kept_ones_under_rope_and_drop_path():
    vit = tiny("v3", drop_path_rate=0.5, drop_path_mode="batch", rope={"rescale": 2.0, "jitter": 1.5}).double().train()
    crops = [torch.randn(4, 3, side, side, dtype=torch.float64) for side in (32, 16)]
    found = []
    for vit.checkpointing in (False, True):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(vit(crops).square().sum(), vit.blocks[0].attn.qkv.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_rope_is_drawn_in_training_alone_and_anew_for_each_block():
    vit = tiny("v3")
    twice = [vit._rotations([(32, 32), (16, 16)]) for _ in range(2)]
    assert torch.equal(twice[0][0].sin, twice[1][1].sin)
    vit.train()
    drawn = [vit._rotations([(32, 32), (16, 16)]) for _ in range(2)]
    assert not torch.equal(drawn[0][0].sin, drawn[0][1].sin)
    assert not torch.equal(drawn[0][0].sin, drawn[1][0].sin)
    assert torch.equal(drawn[0][0].cos[:5], torch.ones(5, 32))  # CLS and registers stay


def test_a_model_in_bf16_turns_by_fp32_tables():
    vit = tiny("v3").bfloat16()
    assert vit._rotations([(32, 32)])[0].sin.dtype == torch.float32
    assert vit(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_masks_without_a_mask_token_are_refused():
    vit = VisionTransformer([16], 8, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="no mask token"):
        vit.forward_features([torch.randn(1, 3, 16, 16)], [torch.ones(1, 4, dtype=torch.bool)])


@pytest.mark.parametrize("kind", ["v2 registers", "v3"])
def test_registers_are_no_patches(kind):
    vit, images = tiny(kind), torch.randn(2, 3, 32, 24)
    features = vit.forward_features([images])[0]
    found = backbone_features(vit, images, 1, ("cls", "avg", "patch"))
    assert features["reg"].shape[1] == 4
    assert found["patch"].shape == (2, 4, 3, 192)
    torch.testing.assert_close(found["patch"].flatten(1, 2), features["patch"])
    torch.testing.assert_close(found["avg"], features["patch"].mean(1))
    torch.testing.assert_close(found["cls"], features["cls"])
    assert cls_attention(vit, np.zeros((32, 24, 3), np.uint8)).shape == (3, 4, 3)


@pytest.mark.parametrize("kind", ["v2 registers", "v3"])
def test_the_last_attention_is_what_the_last_block_adds(kind):
    vit, images = tiny(kind).double(), torch.randn(2, 3, 32, 24, dtype=torch.float64)
    probs = vit.get_last_selfattention(images)
    assert torch.allclose(probs.sum(-1), torch.ones((), dtype=torch.float64))
    seen = []
    last = vit.blocks[-1]
    handles = [
        last.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out)),
        last.attn.proj.register_forward_hook(lambda module, args, out: seen.append(args[0])),
    ]
    vit(images)
    for handle in handles:
        handle.remove()
    v = seen[0].unflatten(-1, (3, 3, -1))[:, :, 2]
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", probs, v).flatten(2), seen[1])


def test_mlp_ours_refuses_swiglu():
    student = MultiCropWrapper(tiny("v3 plus"), DINOHead(192, 8))
    with pytest.raises(ValueError, match="the backbone has SwiGLU"):
        mlp.choose_for(student, [torch.randn(2, 3, 32, 32)], 1, torch.float32, "ours", False)


def test_drop_path_is_the_same_for_all_blocks_where_asked():
    assert [
        block.drop_path for block in tiny("v2", drop_path_rate=0.3, drop_path_uniform=True).blocks
    ] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("kind", ["v2 registers", "v3"])
def test_a_compiled_backbone_is_the_same_function(kind):
    vit = tiny(kind).double()
    crops = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in (32, 16)]
    compiled = torch.compile(copy.deepcopy(vit), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(crops), vit(crops), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["v2 registers", "v3 plus"])
def test_commands_take_such_a_checkpoint(kind, photo_folder, tmp_path, capsys):
    torch.save({"teacher": {f"backbone.{k}": v for k, v in tiny(kind).state_dict().items()}}, tmp_path / "w.pth")
    weights = ["--pretrained_weights", str(tmp_path / "w.pth"), "--size", "32"]
    assert main(["knn", *weights, "--nb_knn", "1"]) == 0
    data = ["--data_path", str(photo_folder), "--output", str(tmp_path / "features.npz"), "--tokens", "avg"]
    assert main(["features", *weights, *data]) == 0
    assert main(["export", *weights[:2], "--format", "backbone", "--output", str(tmp_path / "out.pth")]) == 0
