"""Data sets in the form of those that the original's programs evaluate on, made of digits and photographs."""

import pickle
from functools import cache

import numpy as np
from PIL import Image
from sklearn import datasets

load_digits = cache(datasets.load_digits)


def digit(i):
    """One of scikit-learn's digits as a picture, no two of the same size."""
    small = Image.fromarray((load_digits().images[i] * 255 / 16).astype(np.uint8))
    return small.resize((160 + 8 * (i % 5), 200), Image.Resampling.BICUBIC).convert("RGB")


def oxford(folder):
    """Forty digits of four kinds. Queries are among them, as junk; two have nothing that is hard."""
    (folder / "roxford5k/jpg").mkdir(parents=True)
    target = load_digits().target
    kinds = [np.flatnonzero(target == kind)[:10] for kind in range(4)]
    shown = np.random.default_rng(0).permutation(np.concatenate(kinds))
    names = [f"image_{i:04}" for i in shown]
    for i, name in zip(shown, names):
        digit(i).save(folder / f"roxford5k/jpg/{name}.jpg")
    queries, gnd = [], []
    for q in range(8):
        first, *others = np.flatnonzero(target[shown] == q % 4)[q // 4 :]
        queries.append(names[first])
        hard = [] if q > 5 else others[3:6]
        junk = np.array([first, *others[6:7]])
        gnd.append({"bbx": [1.5, 2.0, 90.0, 99.5], "easy": np.array(others[:3]), "hard": hard, "junk": junk})
    with (folder / "roxford5k/gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump({"imlist": names, "qimlist": queries, "gnd": gnd}, file)


def copydays(folder, n=157, n_strong=229, n_whitening=450):
    """n digits, their copies (compressed, cut), n_strong noisy ones, as many for some; others to whiten with."""
    attacks = [f"jpegqual/{q}" for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
    attacks += [f"crops/{s}" for s in (10, 15, 20, 30, 40, 50, 60, 70, 80)]
    rng = np.random.default_rng(0)
    pictures = [digit(i).resize((48, 48)) for i in range(n)]
    for name in ("original", "strong", *attacks):
        (folder / name).mkdir(parents=True)
        kind, _, strength = name.partition("/")
        for i in range(n_strong if name == "strong" else n):
            copy = pictures[i % n]
            if kind == "crops":
                cut = int(strength) / 5
                copy = copy.crop((cut, cut, 48, 48))
            if name == "strong":
                copy = Image.fromarray((np.asarray(copy) * 0.5 + rng.integers(0, 128, (48, 48, 3))).astype(np.uint8))
            quality = int(strength) if kind == "jpegqual" else 90
            copy.save(folder / name / f"{2000 + i % n}{i // n:02}.jpg", quality=quality)
    for name, of, count in (("whitening", 400, n_whitening), ("distractors", 1000, 60)):
        (folder / name).mkdir()
        for i in range(count):
            digit(of + i).resize((48, 48)).save(folder / name / f"{i}.png")


def davis(folder, photos):
    """Two films of twelve frames: two parts of photographs cross a third one that moves, too; one, upright."""
    for name in ("JPEGImages/480p", "Annotations/480p", "ImageSets/2017"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("wide\nhigh\n")
    for film, (width, height), n_objects in (("wide", (270, 160), 2), ("high", (150, 170), 1)):
        for name in ("JPEGImages", "Annotations"):
            (folder / name / "480p" / film).mkdir()
        for i in range(12):
            frame = photos[0][100 + i : 100 + i + height, 50 + 2 * i : 50 + 2 * i + width].copy()
            mask = np.zeros((height, width), np.uint8)
            for number in range(1, n_objects + 1):
                y, x = (20 + 4 * i, 15 + 6 * i) if number == 1 else (100 - 5 * i, 200 - 11 * i)
                inside = np.hypot(*(np.indices((50, 60)) - np.array([25, 30])[:, None, None])) < 24
                frame[y : y + 50, x : x + 60][inside] = photos[2 + number][60:110, 90:150][inside]
                mask[y : y + 50, x : x + 60][inside] = number
            Image.fromarray(frame).save(folder / f"JPEGImages/480p/{film}/{i:05}.jpg", quality=95)
            Image.fromarray(mask).save(folder / f"Annotations/480p/{film}/{i:05}.png")
