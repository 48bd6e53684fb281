"""DINOv2's and DINOv3's recipes in the one step: in every mode, in parts, and as a run of the command line.

Their numbers are held against the originals' in tests/test_v2_golden.py.
"""

import copy
import json
import signal

import pytest
import torch
from fake_device import no_host_sync
from masked_steps import N_LOCAL, NITER, make_network, make_networks, make_step, make_views
from train_steps import CountOps

from fastdino import DINOHead, VisionTransformer, load_backbone, load_checkpoint
from fastdino.data.masks import BatchMasks, BlockMasks
from fastdino.errors import UserError
from fastdino.model import MaskedMultiCrop
from fastdino.model.archs import recipe_options
from fastdino.objectives import koleo
from fastdino.train import build, loop
from fastdino.train.precision import low_precision_twin
from fastdino.train.schedules import ScheduleTable
from fastdino_kernels import LinearLogits, patch_loss

RECIPES = [
    ("dinov2", {}),
    ("dinov2", {"centering": "center", "amp_dtype": torch.bfloat16}),
    ("dinov2", {"drop_path_rate": 0.3, "drop_path_mode": "batch", "checkpointing": True}),
    ("dinov3", {"amp_dtype": torch.bfloat16}),
    ("dinov3", {"gram": True}),
]
IDS = ["v2", "v2-center-bf16", "v2-subsets", "v3-bf16", "v3-gram"]


@pytest.mark.parametrize(("recipe", "options"), RECIPES, ids=IDS)
def test_no_iteration_waits_for_the_device(recipe, options, monkeypatch, capsys):
    """While the freeze is lifted, with masks anew in each iteration: always the same launches of the same shapes."""
    empty = staticmethod(lambda values, device, dtype: torch.zeros(values.shape, device=device, dtype=dtype))
    monkeypatch.setattr(ScheduleTable, "_on_device", empty)
    networks = make_networks(recipe, **options)
    views = {i: make_views(i) for i in range(1, NITER + 2)}
    with no_host_sync() as device:
        step = make_step(recipe, device, networks, **options)
        counts = []
        for i in views:
            with CountOps() as ops:
                metrics = step([torch.empty(x.shape, dtype=x.dtype, device=device) for x in views[i]], i)
            counts.append(ops.n)
    assert metrics.loss.device.type == device.type
    assert len(set(counts[2:])) == 1


@pytest.fixture
def graphs(monkeypatch):
    """Nodes of each graph that a compiled step is given to compile; it refuses graph breaks."""
    nodes = []

    def counting(graph, inputs):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: compile_(f, backend=counting, fullgraph=kw["fullgraph"], dynamic=False)
    )
    torch._dynamo.reset()
    return nodes


@pytest.mark.parametrize(("recipe", "options"), RECIPES, ids=IDS)
def test_compiled_is_one_graph_for_all_iterations(recipe, options, graphs):
    step, plain = make_step(recipe, mode="compiled", say=pytest.fail, **options), make_step(recipe, **options)
    for i in (0, 1, NITER - 1, NITER):
        torch.manual_seed(i)
        ours = step(make_views(i), i)
        torch.manual_seed(i)
        expected = plain(make_views(i), i)
        if "amp_dtype" not in options:
            assert torch.allclose(ours.loss, expected.loss, rtol=1e-4), i
        elif i == 0:  # later ones are of weights that AdamW has taken apart
            assert torch.allclose(ours.loss, expected.loss, rtol=2e-2)
    assert len(graphs) == 1, graphs


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_until_gram_counts_nothing_of_it_is_computed(mode, graphs):
    """And then another graph is: in fp64 the run in which it was always computed, at first with weight 0."""
    options = {"gram": True, "gram_from": NITER + 1, "dtype": torch.float64}
    step, always = make_step("dinov3", mode=mode, say=pytest.fail, **options), make_step("dinov3", **options)
    always.loss.before_iteration = lambda iteration: False
    for i in range(NITER + 3):
        torch.manual_seed(i)  # positions are drawn in training
        ours = step(make_views(i, dtype=torch.float64), i)
        torch.manual_seed(i)
        expected = always(make_views(i, dtype=torch.float64), i)
        for name in ("loss", "ibot_loss", "grad_norm"):
            assert torch.allclose(getattr(ours, name), getattr(expected, name), rtol=1e-9), (i, name)
        assert expected.gram_loss > 0
        assert (ours.gram_loss > 0) == (i > NITER)
        assert len(graphs) == (0 if mode == "eager" else 1 if i <= NITER else 2)
    assert mode == "eager" or graphs[0] < graphs[1]


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
@pytest.mark.parametrize("n_parts", [2, 4])
def test_parts_have_the_gradient_of_the_whole_batch(n_parts, centering):
    """Sinkhorn, the centers and KoLeo do not see the parts: fp64, the same masks."""
    fp64 = torch.float64
    parts = make_step(dtype=fp64, centering=centering, accumulate=n_parts)
    whole = make_step(dtype=fp64, centering=centering)
    for i in range(6):
        views = make_views(i, batch=16, n_parts=n_parts, dtype=fp64)
        masks1, masks2, _, _ = views[2 + N_LOCAL :]
        masks = torch.cat((masks1, masks2))
        weights = (1 / masks.sum(-1).clamp(min=1).to(torch.float32)).repeat_interleave(masks.sum(-1))
        at_once = [*views[: 4 + N_LOCAL], masks.flatten().nonzero().flatten()[None], weights[None]]
        a, b = parts(views, i), whole(at_once, i)
        for name in ("loss", "ibot_loss", "koleo_loss", "kl", "grad_norm"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-10), (i, name)
    for p, q in zip(parts.student.parameters(), whole.student.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)


def test_parts_alone_would_have_another_gradient():
    """What the test above would not notice, if KoLeo and Sinkhorn were those of the parts: they differ."""
    views = make_views(batch=16, n_parts=4, dtype=torch.float64)
    step = make_step(dtype=torch.float64, accumulate=4)
    step(views, 0)
    alone = make_step(dtype=torch.float64)
    koleos = [alone([view.chunk(4)[i] for view in views], 0).koleo_loss for i in range(4)]
    assert abs(sum(koleos) / 4 - step._metrics[step.metric_names.index("koleo_loss")]) > 1e-2


def test_parts_draw_the_same_twice():
    """Drop-path and rescaled positions: the second pass over a part sees the numbers of the first."""
    options = {"drop_path_rate": 0.5, "drop_path_mode": "batch", "dtype": torch.float64}
    seen = []
    step = make_step("dinov3", accumulate=2, **options)
    learn = step.loss.learn

    def watching(student, views):
        learned = learn(student, views)
        seen.append(learned.cls.detach())
        return learned

    step.loss.learn = watching
    step(make_views(batch=8, n_parts=2, dtype=torch.float64), 0)
    first, second = seen[:2], seen[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_masked_patches_alone_are_as_of_all():
    """The last block computes CLS and the masked rows only."""
    torch.manual_seed(0)
    for recipe in ("dinov2", "dinov3"):
        network = make_network(recipe, 2).double().train()
        if network.backbone.rope_embed is not None:
            network.backbone.rope_embed.rescale = None
        crops, (mask1, mask2, indices, _) = make_views(dtype=torch.float64)[:4], make_views(dtype=torch.float64)[4:]
        masks = torch.cat((mask1, mask2))
        short = network(crops, indices.flatten(), masks)
        long = network(crops, indices.flatten(), masks, with_patches=True)
        assert long.patches.shape == (16, 16, 32)
        for a, b in zip(short[:3], long[:3]):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_rows_of_a_dropped_image_keep_what_they_were(mode):
    """The mean over many draws is the whole block's; an image is in, scaled up, or out, with all of its rows."""
    from fastdino.model.attention import Packing
    from fastdino.model.drop_path import of_rows

    packing = Packing(((4, 3), (6, 2)))
    images = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 3])
    torch.manual_seed(0)
    draws = torch.stack([of_rows(mode, 0.5, packing, images, torch.zeros(1)).scale[:, 0] for _ in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(draws.mean(0), torch.ones(13), atol=0.15)
    assert torch.equal(draws[:, 0], draws[:, 10])
    if mode == "batch":
        assert set(draws[:, :4].sum(1).tolist()) == {4.0}


@pytest.mark.parametrize("exact", [True, False])
def test_masks_of_a_batch_depend_on_their_seed_alone(exact):
    generator = BlockMasks(height=14, width=14, max_patches=98, exact=exact)
    maker = BatchMasks(generator, 0.5, (0.1, 0.5), n_parts=2)
    a, again, b = maker.draw(8, 0, 3, 17), maker.draw(8, 0, 3, 17), maker.draw(8, 0, 3, 18)
    assert all(torch.equal(x, y) for x, y in zip(a, again))
    assert not torch.equal(a[0], b[0])
    assert [x.shape for x in a] == [x.shape for x in b]
    masks1, masks2, indices, weights = a
    for part in range(2):
        rows = slice(4 * part, 4 * part + 4)
        masks = torch.cat((masks1[rows], masks2[rows]))
        counted = indices[part][weights[part] > 0]
        assert torch.equal(counted, masks.flatten().nonzero().flatten())
        assert float(weights[part].sum()) == pytest.approx(int(masks.any(-1).sum()))
        if exact:
            assert (weights[part] > 0).all()


FLAGS = {"ibot_out_dim": 40, "warmup_teacher_temp_epochs": 1}


@pytest.mark.parametrize("recipe", ["dinov2", "dinov3"])
def test_a_run_stopped_and_resumed_is_the_run(tiny, few_digits, tmp_path, recipe):
    """To the bit: weights, moments, centers; and what it leaves behind is a backbone."""
    flags = {"recipe": recipe, "epochs": 3, "gram_start": 1, "gram_update_epochs": 1, **FLAGS, **few_digits}
    flags |= {"gram_crops_size": 48} if recipe == "dinov3" else {}
    whole = loop.train(tiny(output_dir=str(tmp_path / "whole"), **flags))
    assert whole.epochs == 3

    class Stopping(build.Sink):
        """Ctrl-C in the middle of the second epoch."""

        n_steps = 0

        def step(self, entry):
            self.n_steps += 1
            if self.n_steps == n_epoch + 2:
                signal.raise_signal(signal.SIGINT)

    n_epoch = load_checkpoint(tmp_path / "whole" / "checkpoint.pth")["progress"]["niter"]
    assert n_epoch > 3
    stopped = loop.train(tiny(output_dir=str(tmp_path / "parts"), **flags), build.Own(callbacks=[Stopping()]))
    assert stopped.interrupted
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pth")["iteration"] == n_epoch + 2
    loop.train(tiny(output_dir=str(tmp_path / "parts"), **flags))
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for key in ("student", "teacher", "dino_loss"):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key]), key
    backbone = load_backbone(tmp_path / "whole" / "backbone.pth")
    assert backbone(torch.rand(1, 3, 16, 16)).isfinite().all()
    entry = json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[-1])
    assert {"train_ibot_loss", "train_koleo_loss", "train_gram_loss"} <= entry.keys()


BAD = [
    ({"recipe": "dinov2", "local_crops_number": 0}, "--local_crops_number: expected 1 or more with --recipe dinov2"),
    ({"recipe": "dino", "koleo_weight": 0.2}, "--koleo_weight: is for --recipe dinov2 or dinov3"),
    ({"recipe": "dinov2", "optimizer": "sgd"}, "--optimizer: expected adamw with --recipe dinov2"),
    ({"recipe": "dinov2", "arch": "timm:resnet18"}, "timm"),
    ({"recipe": "dinov2", "arch": "dinov3_vits16"}, "--arch: dinov3_vits16 is trained by --recipe dinov3, got dinov2"),
    ({"arch": "dinov2_vits14"}, "--arch: dinov2_vits14 is trained by --recipe dinov2, got dino"),
    ({"recipe": "dinov2", "gram_teacher": "x.pth"}, "--gram_teacher: says nothing without --gram_start"),
    ({"recipe": "dinov3", "gram_crops_size": 32}, "--gram_crops_size: says nothing without --gram_start"),
    (
        {"recipe": "dinov3", "gram_start": 1, "gram_crops_size": 8},
        "--gram_crops_size: expected at least --global_crops_size=24, got 8",
    ),
    ({"recipe": "dinov3", "gram_update_epochs": 1}, "--gram_update_epochs: says nothing without --gram_start"),
    ({"recipe": "dinov3", "gram_start": 2, "epochs": 2}, "--gram_start: expected less than --epochs=2, got 2"),
    (
        {"recipe": "dinov3", "gram_start": 1, "gram_teacher": "nowhere.pth"},
        "^--gram_teacher: no checkpoint at nowhere.pth",
    ),
    ({"recipe": "dinov2", "mask_probability": 0.0}, "--mask_probability: expected a value above 0"),
    ({"recipe": "dinov2", "centering": "softmax"}, "--centering: expected one of center, sinkhorn, got 'softmax'"),
    ({"recipe": "dinov4"}, "--recipe: expected one of dino, dinov2, dinov3, got 'dinov4'"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[words[:34] for _, words in BAD])
def test_what_contradicts_the_recipe_is_one_line(tiny, flags, words):
    with pytest.raises((ValueError, UserError), match=words.replace("(", r"\(")) as raised:
        loop.train(tiny(**flags))
    assert "\n" not in str(raised.value)


def test_a_backbone_of_ones_own_without_a_mask_token_is_refused(tiny):
    with pytest.raises(
        UserError, match="expected one for --recipe dinov2, got VisionTransformer: it has no mask token"
    ):
        loop.train(
            tiny(recipe="dinov2", **FLAGS),
            build.Own(backbone=VisionTransformer([16], 8, embed_dim=24, depth=1, num_heads=2)),
        )


def test_koleo_has_its_gradient_at_the_start_in_bf16():
    """With LayerScale at 1e-5 a batch's features agree to 1e-5: bf16 weights need a residual stream in fp32."""
    torch.manual_seed(0)
    backbone = VisionTransformer(
        [56], 14, embed_dim=384, depth=12, num_heads=6, **recipe_options("dinov2", 0, 1e-5, "mlp")
    )
    network = MaskedMultiCrop(backbone, DINOHead(384, 16, hidden_dim=16, bottleneck_dim=16))
    crops, indices = [torch.randn(8, 3, 56, 56)], torch.zeros(1, dtype=torch.int64)

    def gradient(of):
        dtype = next(of.parameters()).dtype
        grads = torch.autograd.grad(
            koleo(of([x.to(dtype) for x in crops], indices).cls), list(of.backbone.blocks.parameters())
        )
        return torch.cat([grad.double().flatten() for grad in grads])

    def cosine(of):
        return float(torch.cosine_similarity(gradient(of), true, 0))

    true = gradient(copy.deepcopy(network).double())
    low, _ = low_precision_twin(network, torch.bfloat16)
    assert cosine(low) > 0.99
    low.backbone.fp32_residual = False
    assert cosine(low) < 0.5


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("recipe", ["dinov2", "dinov3"])
def test_a_student_that_leaves_products_to_the_loss_has_the_same_gradients(recipe, n_heads, ops):
    views, gradients = make_views(), []
    indices = views[6].flatten()
    for whole in (False, True):
        student = make_networks(recipe)[0]
        student.whole_logits, student.ibot_head = whole, student.ibot_head if n_heads == 2 else None
        made = student(views[:4], indices, torch.cat(views[4:6]))
        assert isinstance(made.patch_logits, LinearLogits) == (ops == "kernels" and not whole)
        k = 40 if n_heads == 2 else 48
        teacher = torch.linspace(-1, 1, len(indices) * k).view(-1, k)
        loss = patch_loss(made.patch_logits, teacher, torch.zeros(k), torch.ones(len(indices)), 0.1, 0.07)
        (loss + made.logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()), msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "options"),
    [r for r in RECIPES if not r[1].get("amp_dtype")] + [("dinov3", {"gram": True, "gram_from": NITER})],
    ids=["v2", "subsets", "gram", "gram later"],
)
def test_graph_equals_eager_with_masks(recipe, options):
    """Four epochs: the freeze, the schedules, masks anew in every step. Draws differ between modes: without them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {k: v for k, v in options.items() if k != "drop_path_rate"} | {"attention_backend": "sdpa"}
    steps = []
    for mode in ("graph", "eager"):
        networks = tuple(network.cuda() for network in make_networks(recipe, **options))
        if recipe == "dinov3":
            networks[0].backbone.rope_embed.rescale = None
        step = make_step(recipe, networks=networks, mode=mode, say=pytest.fail, **options)
        step.loss.cuda()
        steps.append(step)
    graph, eager = steps
    for i in range(4 * NITER):
        views = [x.cuda() for x in make_views(i)]
        a, b = graph(views, i), eager(views, i)
        assert torch.allclose(a.loss, b.loss, rtol=1e-4), i
    assert graph.mode == "graph"
