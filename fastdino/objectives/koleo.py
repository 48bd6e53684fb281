"""KoLeo, which spreads features over the sphere: each is pushed away from its nearest neighbours in the batch.

    z = x / |x|      loss = -mean over i and its k nearest j of log(|z[i] - z[j] + 1e-8| + 1e-8)

Spreading vectors for similarity search (arXiv:1806.03198), equation 2; DINOv2 (arXiv:2304.07193), section 4, with one
neighbour; DINOv3 (arXiv:2508.10104) takes several. Axes: B images, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo(x: Tensor, topk: int = 1) -> Tensor:
    """The loss of one global crop's CLS features, before the head; () fp32 (fp64 for fp64 features).

    x: (B, D), in fp32 as the residual stream is: with LayerScale's first value the features of a batch agree to 1e-5,
    which bf16 does not hold. topk: neighbours of each. Computed in fp32 under autocast too; duplicates are finite. The
    gradient flows into both ends of a pair, none through the choice of neighbours.
    Raises ValueError where B is not above topk.
    """
    if x.ndim != 2 or not 1 <= topk < len(x):
        raise ValueError(f"x: expected shape (B, D) with B above topk={topk}, got {tuple(x.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        z = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), eps=EPS)
        # By differences and not by products: those of neighbours 1e-5 apart are all 1 in fp32.
        distances = torch.cdist(z.detach(), z.detach(), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.fill_diagonal_(torch.inf).topk(topk, largest=False).indices  # (B, topk)
        apart = torch.linalg.vector_norm(z[:, None] - z[nearest] + EPS, dim=-1)
        return -torch.log(apart + EPS).mean()
