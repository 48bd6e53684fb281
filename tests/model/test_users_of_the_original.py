"""What code written for the original's class does with a backbone: hooks, calls of blocks, strides, exports."""

import gc

import pytest
import torch
from torch import nn

from fastdino import DINOHead, MultiCropWrapper, VisionTransformer
from fastdino.model.recompute import _RECIPES


@pytest.fixture
def golden_vit(golden):
    """(the golden backbone in fp64, its archive)."""
    data = golden("vit_fp64")
    vit = VisionTransformer(**data["kw"]).double().eval()
    vit.load_state_dict(data.state("state"))
    return vit, data


def watch(module, of_input=False):
    """The tensor that a module is given, or gives, when it is called next."""
    seen = []
    module.register_forward_hook(lambda _, given, out: seen.append(given[0] if of_input else out))
    return seen


def test_blocks_can_be_called_one_by_one(golden_vit, rel):
    vit, data = golden_vit
    tokens = vit.prepare_tokens(data["x0"])
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    last = vit.blocks[-1]
    attended, probs = last.attn(last.norm1(tokens))
    assert rel(probs, data["attn0"]) < 1e-10
    assert rel(last(tokens, return_attention=True), data["attn0"]) < 1e-10
    summed = tokens + attended
    assert rel(vit.norm(summed + last.mlp(last.norm2(summed))), data["inter0_1"]) < 1e-10
    assert rel(vit.norm(last(tokens)), data["inter0_1"]) < 1e-10


def test_a_hook_on_the_last_qkv_gives_the_originals_attention(golden_vit, rel):
    vit, data = golden_vit
    seen, x = watch(vit.blocks[-1].attn.qkv), data["x1"]
    assert rel(vit(x), data["cls1"]) < 1e-10
    n_heads, (b, n, width) = data["kw"]["num_heads"], seen[0].shape
    qkv = seen[0].reshape(b, n, 3, n_heads, width // 3 // n_heads).permute(2, 0, 3, 1, 4)
    attn = ((qkv[0] @ qkv[1].transpose(-2, -1)) * vit.blocks[-1].attn.scale).softmax(-1)
    assert rel(attn, data["attn1"]) < 1e-10


@pytest.mark.parametrize("where", [lambda vit: vit.blocks[-1], lambda vit: vit.norm], ids=["last block", "norm"])
def test_a_hook_behind_the_last_block_sees_all_patches(golden_vit, rel, where):
    vit, data = golden_vit
    seen = watch(where(vit))
    assert rel(vit(data["x1"]), data["cls1"]) < 1e-10
    normed = seen[0] if where(vit) is vit.norm else vit.norm(seen[0])
    assert rel(normed, data["inter1_1"]) < 1e-10


def test_a_hook_on_attention_sees_tokens_of_images(golden_vit):
    vit, data = golden_vit
    given, out = watch(vit.blocks[0].attn, of_input=True), watch(vit.blocks[0].attn)
    vit(data["x0"])
    assert given[0].shape == out[0][0].shape == vit.prepare_tokens(data["x0"]).shape
    assert out[0][1] is None


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_one_tensor_and_a_list_of_it_are_the_same_in_training_too(mode):
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.5, drop_path_mode=mode)
    vit, x = vit.double().train(), torch.randn(5, 3, 32, 32, dtype=torch.float64)

    def features_and_gradients(images):
        torch.manual_seed(1)  # drop-path
        features = vit(images)
        return features, *torch.autograd.grad(features.square().sum(), list(vit.parameters()))

    for one, listed in zip(features_and_gradients(x), features_and_gradients([x]), strict=True):
        torch.testing.assert_close(one, listed, rtol=1e-11, atol=1e-13)


def test_nothing_stays_behind_of_a_forward_pass_without_a_backward_pass():
    vit = VisionTransformer([32], 8, embed_dim=24, depth=3, num_heads=3)
    seen = watch(vit.norm)
    features = vit(torch.randn(2, 3, 32, 32))
    assert seen
    del features, seen, vit
    gc.collect()
    assert len(_RECIPES) == 0


@pytest.mark.parametrize("stride", [4, (4, 4), (2, 8)], ids=str)
def test_a_smaller_stride_gives_overlapping_patches(stride):
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=1, num_heads=3).double()
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    vit.patch_embed.proj.stride = stride
    expected = vit.patch_embed.proj(x)
    assert torch.equal(vit.patch_embed(x), expected.flatten(2).transpose(1, 2))
    assert vit.patch_embed.grid(40, 33) == expected.shape[2:]
    n_tokens = 1 + expected[0, 0].numel()
    assert vit.prepare_tokens(x).shape[1] == n_tokens
    assert vit.packing([(2, 40, 33)]).groups == ((2, n_tokens),)
    torch.testing.assert_close(vit(x), vit([x]), rtol=1e-12, atol=1e-12)


def test_a_patch_that_does_not_divide_the_image_has_positions_for_those_that_fit():
    vit = VisionTransformer([224], 12, embed_dim=24, depth=1, num_heads=3)
    assert vit.pos_embed.shape == (1, 1 + 18 * 18, 24)
    assert vit(torch.randn(1, 3, 224, 224)).shape == (1, 24)
    with pytest.raises(ValueError, match="patch_size: expected at most img_size=8, got 12"):
        VisionTransformer([8], 12, embed_dim=24, depth=1, num_heads=3)


class ResNet(nn.Module):
    """As torchvision's: features, then a classifier called fc; knows no embed_dim."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.features(x))


def test_the_wrapper_takes_the_classifier_off():
    wrapper = MultiCropWrapper(ResNet(), DINOHead(6, 5, hidden_dim=4, bottleneck_dim=3))
    assert isinstance(wrapper.backbone.fc, nn.Identity)
    assert wrapper([torch.randn(2, 3, side, side) for side in (16, 16, 8)]).shape == (6, 5)
    vit = VisionTransformer([16], 8, num_classes=10, embed_dim=24, depth=1, num_heads=3)
    assert MultiCropWrapper(vit, nn.Identity())(torch.randn(2, 3, 16, 16)).shape == (2, 24)
    backbone = ResNet()
    backbone.fc.forward = lambda features: (features, features)  # as an XCiT in training
    assert MultiCropWrapper(nn.Sequential(backbone), nn.Identity())(torch.randn(2, 3, 16, 16)).shape == (2, 6)
    own = ResNet()
    own.embed_dim = 10  # it says itself that fc makes its features
    assert MultiCropWrapper(own, nn.Identity())(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def _exported(vit, x, folder):
    return torch.export.export(vit, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


def _traced(vit, x, folder):
    return torch.jit.trace(vit, x)


def _onnx(vit, x, folder):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = str(folder / "vit.onnx")
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(vit, (x,), path, dynamo=True, input_names=["x"], dynamic_shapes=batch, verbose=False)
    session = runtime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


EXPORTS = [
    pytest.param(shape, frozen, export, id=f"{size}-{'frozen' if frozen else 'trainable'}-{name}")
    for size, shape in (("as learned", (32, 32)), ("resized", (16, 24)))
    for frozen in (True, False)
    for name, export in (("export", _exported), ("jit.trace", _traced), ("onnx", _onnx))
    # ONNX comes out of torch.export, and both take seconds: between them they have each size, and each frozen or not.
    if export is _traced or (size, frozen, export) in (("resized", True, _exported), ("as learned", False, _onnx))
]


@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporters
@pytest.mark.parametrize(("shape", "frozen", "export"), EXPORTS)
def test_an_exported_backbone_takes_any_batch(export, frozen, shape, tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=2, num_heads=3).eval().requires_grad_(not frozen)
    function = export(vit, torch.randn(5, 3, *shape), tmp_path)
    for n in (1, 5, 32):
        x = torch.randn(n, 3, *shape)
        torch.testing.assert_close(function(x), vit(x), rtol=1e-5, atol=1e-5)
