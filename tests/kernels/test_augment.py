"""multi_crop_augment has Pillow's levels, bit for bit: against the installed Pillow and its integer specification."""

import re
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from augment_cases import MEAN, STD, STEPS, Image, by_pillow, by_replica, crop, levels_of, packed, random_crop, table
from fake_device import run_launcher
from PIL import Image as PillowImage
from PIL import ImageFilter
from torch import Tensor

from fastdino_kernels import launch
from fastdino_kernels.augment import CropTable, PackedImages, _multi_crop_augment_, multi_crop_augment
from fastdino_kernels.augment.blur import aot_cases, blur
from fastdino_kernels.augment.color import _turn_hue
from fastdino_kernels.augment.reference import turn_hue
from fastdino_kernels.launch import tl, triton

CPU = torch.device("cpu")
FACTORS = {"brightness": 1.31, "contrast": 0.67, "saturation": 1.18, "hue": -0.083}


@pytest.fixture(scope="session")
def small(photos) -> dict[str, Image]:
    """Small, because the interpreter walks over their pixels one by one."""
    rng = np.random.default_rng(0)
    return {
        "photo": np.ascontiguousarray(photos[2][::22, ::47]),  # 24 x 11
        "flower": np.ascontiguousarray(photos[1][::36, ::46]),  # 12 x 14
        "noise": rng.integers(0, 256, (9, 14, 3), np.uint8),
        "saturated": rng.integers(0, 2, (8, 7, 3)).astype(np.uint8) * 255,
        "tiny": rng.integers(0, 256, (4, 5, 3), np.uint8),
        "tinier": rng.integers(0, 2, (3, 4, 3)).astype(np.uint8) * 255,
        "gray": np.repeat(rng.integers(0, 256, (9, 16, 1), np.uint8), 3, 2),
        "column": rng.integers(0, 256, (17, 1, 3), np.uint8),
        "row": rng.integers(0, 256, (1, 19, 3), np.uint8),
        "pixel": np.array([[[200, 17, 90]]], np.uint8),
    }


def whole(images: list[Image], image: int, **alterations) -> dict:
    height, width, _ = images[image].shape
    return crop(image, (0, 0, width, height), **alterations)


def assert_pillows_levels(images: list[Image], crops: list[dict], size: int, device: torch.device) -> None:
    out = multi_crop_augment(packed(images, device), table(crops, device), size)
    assert out.shape == (len(crops), 3, size, size)
    ours, truth = levels_of(out), by_pillow(images, crops, size)
    wrong = [c for c, got, expected in zip(crops, ours, truth) if not torch.equal(got, expected)]
    assert not wrong, f"{wrong[:3]}: off by {(ours - truth).abs().max()}"
    assert torch.equal(ours, by_replica(images, crops, size))


def test_resize_shrinks_and_grows_as_pillow(small, device):
    images = list(small.values())
    crops = [whole(images, i, flip=i % 2 == 1) for i in range(len(images))]
    crops += [
        crop(0, (1, 5, 9, 16)),
        crop(2, (0, 5, 14, 1), flip=True),
        crop(0, (10, 0, 1, 24)),
        crop(1, (2, 1, 8, 8)),
    ]
    assert_pillows_levels(images, crops, 9, device)


def test_several_tiles_are_pillows(small, device):
    images = [small["tiny"], small["tinier"]]
    crops = [whole(images, 0, blur=1.0), whole(images, 1, flip=True, blur=2.0)]
    assert_pillows_levels(images, crops, 34, device)


@pytest.mark.parametrize(("name", "size"), [("photo", 2), ("noise", 1)], ids=["24-to-2", "14-to-1"])
def test_resize_of_many_taps_is_pillows(small, name, size, device):
    """49 and 56 taps, where the table holds 48; with them a crop that fits."""
    images = [small[name], small["tiny"]]
    crops = [whole(images, 0, jitter=[("contrast", 1.4)]), whole(images, 0, flip=True), whole(images, 1)]
    assert_pillows_levels(images, crops, size, device)


def test_every_order_of_the_color_steps_is_pillows(small, device):
    images = [small["flower"], small["saturated"]]
    orders = list(permutations(STEPS))
    crops = [
        crop(i % 2, (1, 2, 6, 5), jitter=[(name, FACTORS[name]) for name in order]) for i, order in enumerate(orders)
    ]
    assert len(crops) == 24
    assert_pillows_levels(images, crops, 8, device)


def test_every_color_step_alone_is_pillows(small, device):
    """Factors of 0 and 1 and beyond what is drawn, so that blends are cut at both ends; hue to either side."""
    images = [small["photo"], small["saturated"], small["gray"]]
    values = {name: (0.0, 0.6, 1.0, 1.9) for name in STEPS[:3]} | {"hue": (-0.5, -0.1, -0.001, 0.004, 0.1, 0.5)}
    steps = [(name, value) for name, some in values.items() for value in some]
    crops = [crop(i % 3, (0, 0, 7, 6), jitter=[step]) for i, step in enumerate(steps)]
    assert_pillows_levels(images, crops, 8, device)


def test_gray_and_solarize_are_pillows(small, device):
    images = [small["tiny"], small["flower"]]
    flags = [dict(zip(("gray", "solarize", "blur"), x)) for x in np.ndindex(2, 2, 2)]
    crops = [
        whole(images, i % 2, **{k: bool(v) for k, v in f.items()} | {"blur": 1.3 * f["blur"]})
        for i, f in enumerate(flags)
    ]
    assert_pillows_levels(images, crops, 11, device)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_blur_is_pillows_up_to_its_borders(small, size, device):
    """Radii to either side of sqrt(2), where a box grows from one whole tap to three."""
    images = [small["tiny"], small["tinier"]]
    radii = (0.1, 1.0, 1.41, 1.4143, 2.0, 2.4)
    assert_pillows_levels(images, [whole(images, i % 2, blur=r) for i, r in enumerate(radii)], size, device)


def blurred(levels: Tensor, radii: list[float], exact: bool) -> Tensor:
    """Levels (n, 3, S, S) uint8, by the blur kernels alone."""
    crops = table([crop(0, (0, 0, 1, 1), blur=radius) for radius in radii], levels.device)
    out = torch.full(levels.shape, torch.nan, device=levels.device)
    scale_and_shift = [1 / (255 * s) for s in STD] + [-m / s for m, s in zip(MEAN, STD)]
    blur(levels, out, crops, scale_and_shift, exact)
    return levels_of(out)


def blurred_by_pillow(levels: Tensor, radii: list[float]) -> Tensor:
    images = [PillowImage.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in levels]
    filtered = [np.asarray(im.filter(ImageFilter.GaussianBlur(radius))) for im, radius in zip(images, radii)]
    return torch.from_numpy(np.stack(filtered)).permute(0, 3, 1, 2).long()


@pytest.fixture
def few_tiles(monkeypatch, device) -> None:
    """Of 32 rows, for the interpreter: 80 pixels are then three tiles, of which one reaches no border."""
    if device.type == "cpu":
        monkeypatch.setattr(sys.modules[aot_cases.__module__], "ROWS", 32)


def test_blur_away_from_borders_is_pillows_too(few_tiles, device):
    radii = [0.3, 2.0]
    levels = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8, device=device)
    assert torch.equal(blurred(levels, radii, exact=True), blurred_by_pillow(levels, radii))


def test_blur_that_is_not_exact_is_off_by_three_levels_at_most(photos, few_tiles, device):
    """Noise of black and white, stripes of them, and a photograph; a quarter of a level in the mean."""
    noise = torch.randint(0, 2, (3, 80, 80)) * 255
    stripes = (torch.arange(80) // 3 % 2 * 255).expand(3, 80, 80)
    photo = torch.from_numpy(photos[2][100:180, 200:280].copy()).permute(2, 0, 1)
    levels, radii = torch.stack([noise, stripes, photo]).to(device, torch.uint8), [0.5, 1.1, 2.0]
    difference = (blurred(levels, radii, exact=False) - blurred_by_pillow(levels, radii)).abs()
    assert 0 < difference.max() <= 3
    assert difference.double().mean((1, 2, 3)).max() <= 0.25


def test_everything_at_once_is_pillows(small, device):
    images, rng = list(small.values()), np.random.default_rng(1)
    assert_pillows_levels(images, [random_crop(rng, images, i % len(images)) for i in range(14)], 8, device)


def test_plain_path_is_pillows_on_photographs(photos, monkeypatch):
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    rng = np.random.default_rng(2)
    for size in (48, 96):
        crops = [random_crop(rng, photos, i % len(photos)) for i in range(36)]
        assert_pillows_levels(photos, crops, size, CPU)


def test_a_box_over_a_hundred_times_as_tall_as_wide_is_summed_along_x_first_too(photos, monkeypatch):
    """Where one shrinks, Pillow sums its rows first, and rounds other numbers to 8 bits between the passes."""
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    crops = [crop(0, (300, 10, 4, 400)), crop(0, (300, 10, 3, 400))]
    ours = levels_of(multi_crop_augment(packed(photos[:1], CPU), table(crops, CPU), 96))
    assert torch.equal(ours, by_replica(photos, crops, 96))
    assert [torch.equal(*pair) for pair in zip(ours, by_pillow(photos, crops, 96))] == [True, False]


@triton.jit
def _turn_every_kernel(rgb_ptr, out_ptr, shift, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, g, b = (tl.load(rgb_ptr + at), tl.load(rgb_ptr + n + at), tl.load(rgb_ptr + 2 * n + at))
    r, g, b = _turn_hue(r, g, b, shift)
    tl.store(out_ptr + at, r)
    tl.store(out_ptr + n + at, g)
    tl.store(out_ptr + 2 * n + at, b)


def turned_by_pillow(rgb: Tensor, shift: int) -> Tensor:
    """(n, 3) uint8."""
    hue, *rest = PillowImage.fromarray(rgb.cpu().numpy()[None]).convert("HSV").split()
    turned = PillowImage.merge("HSV", (hue.point([(level + shift) % 256 for level in range(256)]), *rest))
    return torch.from_numpy(np.array(turned.convert("RGB"))[0]).to(rgb.device)


def turned_by_kernel(rgb: Tensor, shift: int) -> Tensor:
    planes, block = rgb.T.int().contiguous(), 2**16 if rgb.device.type == "cpu" else 1024
    out = torch.empty_like(planes)
    _turn_every_kernel[(rgb.shape[0] // block,)](planes, out, shift, rgb.shape[0], block, enable_fp_fusion=False)
    return out.T.byte()


@pytest.mark.parametrize("shift", [0, 7, 231])
def test_hue_is_pillows_for_every_pair_of_differences(shift, device):
    """H depends on the differences of the channels alone: all colours with a channel at 0, in each of its 3 places."""
    pair = torch.cartesian_prod(torch.arange(256), torch.arange(256)).byte()
    zero = torch.zeros_like(pair[:, :1])
    rgb = torch.cat([torch.cat([zero, pair], 1).roll(i, 1) for i in range(3)])
    rgb = torch.cat([rgb, torch.randint(0, 256, (2**16, 3), dtype=torch.uint8)]).to(device)
    truth = turned_by_pillow(rgb, shift)
    assert torch.equal(turned_by_kernel(rgb, shift), truth)
    assert torch.equal(turn_hue(rgb.cpu().int(), shift).byte(), truth.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 7, 231])
def test_hue_is_pillows_for_every_color(shift, device):
    every = torch.arange(256, dtype=torch.uint8, device=device)
    rgb = torch.cartesian_prod(every, every, every)
    assert torch.equal(turned_by_kernel(rgb, shift), turned_by_pillow(rgb, shift))


def assert_is_rounded(low: Tensor, full: Tensor) -> None:
    """To the nearest; the interpreter cuts bf16 off instead, which is one unit in the last place at most."""
    interpreted = full.device.type == "cpu" and "cpu" in launch.TRITON_DEVICES
    ulp = torch.finfo(low.dtype).eps if interpreted and low.dtype == torch.bfloat16 else 0.0
    assert ((low - full.to(low.dtype)).abs() <= ulp * full.abs()).all()


def test_levels_are_normalised_and_rounded_once(small, ops):
    """fp32 within two roundings of the truth; bf16 and fp16 are that, rounded."""
    images = [small["tiny"]]
    crops = [whole(images, 0), whole(images, 0, blur=1.0)]
    tables = packed(images, CPU), table(crops, CPU)
    mean, std = (0.5, 0.3, 0.1), (0.2, 0.25, 0.5)
    full = multi_crop_augment(*tables, 12, mean=mean, std=std)
    as_column = [torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std)]
    truth = (by_pillow(images, crops, 12).double() / 255 - as_column[0]) / as_column[1]
    assert (full.double() - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        low = multi_crop_augment(*tables, 12, mean=mean, std=std, dtype=dtype)
        assert low.dtype == dtype
        assert_is_rounded(low, full)
    near_borders = multi_crop_augment(*tables, 12, mean=mean, std=std, exact=False)
    assert torch.equal(near_borders, full)  # where there is no cheaper way


def test_out_is_filled_whatever_its_strides(small, ops):
    images = [small["tiny"], small["tinier"]]
    tables = packed(images, CPU), table([whole(images, i % 2, blur=0.9 * (i > 1)) for i in range(3)], CPU)
    expected = multi_crop_augment(*tables, 9)
    for out in (
        torch.full((3, 3, 9, 9), torch.nan),
        torch.full((3, 9, 9, 3), torch.nan).permute(0, 3, 1, 2),
        torch.full((5, 3, 9, 9), torch.nan)[1:4],
    ):
        assert multi_crop_augment(*tables, 9, out=out) is out
        assert torch.equal(out, expected)
    low = torch.full((3, 3, 9, 9), torch.nan, dtype=torch.bfloat16)
    assert_is_rounded(multi_crop_augment(*tables, 9, dtype=torch.float32, out=low), expected)


def test_tables_may_be_strided_and_pixels_a_view(small, ops):
    images, device = [small["tiny"], small["tinier"]], CPU
    rng = np.random.default_rng(4)
    tables = packed(images, device), table([random_crop(rng, images, i % 2) for i in range(3)], device)
    spread = [[torch.stack([x, x], -1)[..., 0] for x in values] for values in tables]
    assert not spread[0][0].is_contiguous()
    views = PackedImages(*spread[0]), CropTable(*spread[1])
    assert torch.equal(multi_crop_augment(*views, 8), multi_crop_augment(*tables, 8))


def test_boxes_and_radii_out_of_range_are_cut(small, ops):
    images, device = [small["photo"]], CPU  # 24 high, 11 wide
    asked = [crop(0, (8, 20, 9, 9)), crop(0, (-2, 30, 5, 5)), crop(0, (0, 0, 0, 99)), crop(0, (0, 0, 9, 9), blur=7.0)]
    given = [crop(0, (8, 20, 3, 4)), crop(0, (0, 23, 5, 1)), crop(0, (0, 0, 1, 24)), crop(0, (0, 0, 9, 9), blur=2.4)]
    ours, expected = (multi_crop_augment(packed(images, device), table(c, device), 6) for c in (asked, given))
    assert torch.equal(ours, expected)


def test_no_crops_make_no_pixels(small, ops):
    device = CPU
    none = CropTable(*(x[:0] for x in table([crop(0, (0, 0, 2, 2))], device)))
    assert multi_crop_augment(packed([small["photo"]], device), none, 5).shape == (0, 3, 5, 5)


BAD = {  # what is said: the fields of the tables, the size and the options that are wrong
    "images.pixels: expected torch.uint8, got torch.float32": {"pixels": lambda x: x.float()},
    "images.pixels: expected shape (bytes), got (1, ": {"pixels": lambda x: x[None]},
    "images.offset: expected torch.int64, got torch.int32": {"offset": lambda x: x.int()},
    "images.stride: expected shape (1), got (2,)": {"stride": lambda x: x.repeat(2)},
    "images.width: expected a tensor, got int": {"width": lambda x: 21},
    "images.width: expected to be on cpu like images.pixels, got meta": {"width": lambda x: x.to("meta")},
    "crops.box: expected torch.int32, got torch.int64": {"box": lambda x: x.long()},
    "crops.box: expected shape (2, 4), got (1, 4)": {"box": lambda x: x[:1]},
    "crops.factor: expected shape (2, 3), got (2, 6)": {"factor": lambda x: x.repeat(1, 2)},
    "crops.flip: expected torch.bool, got torch.int32": {"flip": lambda x: x.int()},
    "crops.blur: expected torch.float32, got torch.float64": {"blur": lambda x: x.double()},
    "crops: expected to be on cpu like images, got meta": dict.fromkeys(CropTable._fields, lambda x: x.to("meta")),
    "size: expected 1 to 2048 pixels, got 0": {"size": 0},
    "size: expected 1 to 2048 pixels, got 2049": {"size": 2049},
    "mean: expected 3 values, got 1": {"mean": (0.5,)},
    "std: expected values above 0, got (0.5, 0.0, 0.5)": {"std": (0.5, 0.0, 0.5)},
    "out: expected shape (2, 3, 5, 5), got (2, 3, 6, 6)": {"size": 5},
}


@pytest.mark.parametrize(("message", "wrong"), BAD.items(), ids=[message.split(",")[0] for message in BAD])
def test_bad_arguments_are_value_errors_and_write_nothing(small, message, wrong):
    images = [small["photo"]]
    tables = packed(images, CPU), table([whole(images, 0), whole(images, 0, blur=1.0)], CPU)
    spoilt = [t._replace(**{f: wrong[f](getattr(t, f)) for f in t._fields if f in wrong}) for t in tables]
    options = {name: value for name, value in wrong.items() if name in ("mean", "std")}
    out = torch.full((2, 3, 6, 6), 7.0)
    with pytest.raises(ValueError, match=re.escape(message)):
        multi_crop_augment(*spoilt, wrong.get("size", 6), out=out, **options)
    assert (out == 7).all()


def test_bad_dtypes_are_value_errors(small):
    images = [small["photo"]]
    tables = packed(images, CPU), table([whole(images, 0)], CPU)
    with pytest.raises(ValueError, match=r"dtype: expected fp32, bf16 or fp16, got torch.float64"):
        multi_crop_augment(*tables, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"out: expected fp32, bf16 or fp16, got torch.uint8"):
        multi_crop_augment(*tables, 6, out=torch.zeros(1, 3, 6, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"out: expected to be on cpu like images, got meta"):
        multi_crop_augment(*tables, 6, out=torch.zeros(1, 3, 6, 6, device="meta"))


def test_opcheck(small, device):
    images = [small["tiny"]]
    tables = [*packed(images, device), *table([whole(images, 0, blur=0.5)], device)]
    torch.library.opcheck(_multi_crop_augment_, (torch.zeros(1, 3, 4, 4, device=device), tables, MEAN, STD, True))


def test_compiled_fullgraph_equals_eager(small, device):
    images = [small["tiny"]]
    rng = np.random.default_rng(5)
    tables = packed(images, device), table([random_crop(rng, images, 0) for _ in range(2)], device)

    def crops(images: PackedImages, crops: CropTable) -> Tensor:
        return multi_crop_augment(images, crops, 4, dtype=torch.bfloat16).view(2, 1, 3, 4, 4)

    compiled = torch.compile(crops, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tables), crops(*tables))


whole_number, flag, real = torch.int32, torch.bool, torch.float32
IMAGE_COLUMNS = [((), torch.int64), ((), whole_number), ((), whole_number), ((), whole_number)]
CROP_COLUMNS = [
    ((), whole_number),
    ((4,), whole_number),
    ((), flag),
    ((4,), torch.int8),
    ((3,), real),
    ((), whole_number),
    ((), flag),
    ((), real),
    ((), flag),
]


def columns(device: torch.device, kinds: list[tuple[tuple[int, ...], torch.dtype]], n: int) -> list[Tensor]:
    return [torch.zeros(n, *shape, dtype=dtype, device=device) for shape, dtype in kinds]


def test_nothing_waits_for_the_device(fakegpu):
    """The op by its fake, then the launcher itself, on tensors that have no values to give."""
    images = PackedImages(torch.zeros(99, dtype=torch.uint8, device=fakegpu), *columns(fakegpu, IMAGE_COLUMNS, 2))
    crops = CropTable(*columns(fakegpu, CROP_COLUMNS, 4))
    out = multi_crop_augment(images, crops, 32, dtype=torch.bfloat16)
    assert (out.shape, out.dtype, out.device.type) == ((4, 3, 32, 32), torch.bfloat16, fakegpu.type)
    run_launcher(_multi_crop_augment_, out, [*images, *crops], MEAN, STD, True)
    strided = torch.zeros(4, 32, 32, 3, device=fakegpu).permute(0, 3, 1, 2)
    run_launcher(_multi_crop_augment_, strided, [*images, *crops], MEAN, STD, True)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 96])
def test_full_size_crops_of_photographs_are_pillows(photos, size, device):
    rng = np.random.default_rng(6)
    images = [*photos, np.kron(photos[0], np.ones((6, 6, 1), np.uint8))]  # 3840 x 2562: more taps than the table holds
    assert_pillows_levels(images, [random_crop(rng, images, i % len(images)) for i in range(84)], size, device)


@pytest.mark.gpu
def test_captured_call_follows_its_tables(photos, device):
    rng = np.random.default_rng(7)
    images = packed(photos, device)
    batches = [table([random_crop(rng, photos, i % len(photos)) for i in range(12)], device) for _ in range(3)]
    static, out = CropTable(*(x.clone() for x in batches[0])), torch.empty(12, 3, 96, 96, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        multi_crop_augment(images, static, 96, out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multi_crop_augment(images, static, 96, out=out)
    for crops in batches:
        for x, new in zip(static, crops):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, multi_crop_augment(images, crops, 96))
    assert_is_rounded(multi_crop_augment(images, crops, 96, dtype=torch.bfloat16), out)
