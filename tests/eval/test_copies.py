"""Features and whitening against their definitions; which image is whose copy."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import vit_nano
from fastdino.data.augment import normalize
from fastdino.data.sources import FolderSource
from fastdino.eval.copies import copy_features, copy_map, fit_whitening, nearest, originals_of


def test_features_are_cls_and_the_generalised_mean_of_the_patches(photo_folder):
    backbone = vit_nano(patch_size=8, img_size=[32])
    source = FolderSource(photo_folder)
    features, kept = copy_features(backbone, source, 40, batch_size=5, num_workers=2)
    assert kept.tolist() == list(range(len(source)))
    image = Image.open(photo_folder / source.paths[7]).resize((40, 40), Image.Resampling.BICUBIC)
    with torch.no_grad():
        pixels = normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
        tokens = backbone.eval().get_intermediate_layers(pixels)[0][0].double()
    means = [np.mean([max(x, 1e-6) ** 4 for x in channel]) ** 0.25 for channel in tokens[1:].T.tolist()]
    assert features[7].tolist() == pytest.approx([*tokens[0].tolist(), *means], abs=1e-5)


def test_whitened_features_are_uncorrelated_and_of_one_variance():
    """Where the mean is 0; the original does not subtract it from what it takes components of."""
    torch.manual_seed(0)
    features = torch.randn(500, 6) @ torch.randn(6, 6)
    features -= features.mean(0)
    white = fit_whitening(features)(features)
    assert torch.allclose(white.T @ white / 500, torch.eye(6), atol=1e-3)


def test_directions_without_variance_are_not_blown_up():
    torch.manual_seed(0)
    features = torch.randn(50, 6)
    features[:, 5] = 0
    matrix = fit_whitening(features).matrix
    largest = (features.T @ features / 50).double().svd().S[0]
    assert float(matrix.double().svd().S[0]) == pytest.approx(float(1 / (1e-5 * largest) ** 0.5), rel=1e-3)


def test_fewer_images_than_numbers_are_refused():
    with pytest.raises(ValueError, match="expected at least 6 images, as many as features have numbers, got 5"):
        fit_whitening(torch.randn(5, 6))


def test_copies_are_searched_by_cosine_among_the_twenty_nearest():
    torch.manual_seed(0)
    database = torch.randn(40, 8)
    queries = 3 * database[:12] + 2 * torch.randn(12, 8)
    found = nearest(queries, database)
    assert found.shape == (12, 20)
    areas = []
    for i, query in enumerate(queries):
        cosine = torch.nn.functional.cosine_similarity(query[None], database)
        rank = int((cosine > cosine[i]).sum())
        areas.append(0 if rank >= 20 else ((1 if rank == 0 else 0) + 1 / (rank + 1)) / 2)
    assert 0.2 < np.mean(areas) < 1
    assert copy_map(found, [[i] for i in range(12)]) == pytest.approx(np.mean(areas))
    assert nearest(queries, database[:3]).shape == (12, 3)


def test_names_tell_whose_copy_a_strong_one_is_and_places_the_others():
    originals = ["200000.jpg", "200100.jpg", "200200.jpg"]
    strong = ["200001.jpg", "200201.jpg", "200202.jpg"]
    assert originals_of("strong", strong, originals) == [[0], [2], [2]]
    assert originals_of("crops/10", ["a.jpg", "b.jpg", "c.jpg"], originals) == [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"crops/10: expected 3 images, a copy of each original, got 2"):
        originals_of("crops/10", ["a.jpg", "b.jpg"], originals)
    with pytest.raises(ValueError, match=r"strong: no original begins like 300000\.jpg"):
        originals_of("strong", ["300000.jpg"], originals)
