"""Distances between sets of images, in the space of some network's features: FID, precision and recall."""

import torch

from common import distributed
from layers import resize


def statistics(features):
    """Features [N, D] → their mean [D] and covariance [D, D] in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½) between two pairs (μ, Σ) in float64 (Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace).clamp(min=0).item()


def fid(a, b):
    """The Fréchet distance between two sets of features, [N, D] and [M, D]."""
    return frechet_distance(statistics(a), statistics(b))


@torch.no_grad()
def precision_recall(real, fake, neighbours=3, block=4096):
    """The share of samples that lie among real images, and of real images that lie among samples, in feature space.

    real [N, D], fake [M, D]. A point lies among a set where it is no farther from any of the set's points than that
    one's k-th nearest neighbour in the set, itself not counted (Kynkäänniemi et al. 2019, section 2).
    """
    return share_among(fake, real, neighbours, block), share_among(real, fake, neighbours, block)


def share_among(points, others, neighbours, block):
    """The share of `points` that lie among `others`; in float64, as distances by products lose half of the digits."""
    points, others = points.double(), others.double()
    near = [torch.cdist(part, others).topk(neighbours + 1, largest=False).values for part in others.split(block)]
    radii = torch.cat(near)[:, -1]
    inside = [(torch.cdist(part, others) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).float().mean().item()


@torch.no_grad()
def clip_features(clip, images):
    """The features the FID is measured in, [B, D]: the CLIP's image embedding."""
    return clip.encode_image(images).float()


@torch.no_grad()
def real_features(clip, batches, count, resolutions):
    """Features of the first `count` real images of a source's batches: {resolution: [N, D]}, and the captions."""
    features, captions = {r: [] for r in resolutions}, []
    for images, texts, _ in batches:
        images = images.to(clip.device)
        for r in resolutions:
            features[r].append(clip_features(clip, resize(images, r)))
        captions += texts
        if len(captions) >= count:
            break
    return {r: torch.cat(f)[:count] for r, f in features.items()}, captions[:count]


@torch.no_grad()
def outputs(generator, clip, captions, z, resolution=None, batch=64):
    """Yields the generator's Output for every `batch` captions and their latents z [N, z_dim]."""
    for first in range(0, len(captions), batch):
        text = clip.encode_text(clip.tokenize(captions[first : first + batch]))
        yield generator(z[first : first + batch].to(clip.device), text.tokens, text.eot, resolution)


def expert_counts(config, routes):
    """How many points each expert took, {router: [E]}, from the routes of an aurora.Output."""
    experts = {level.resolution: level.num_experts for level in config.levels}
    return {n: index.flatten().bincount(minlength=experts[int(n.split(".")[0])]) for n, index in routes.items()}


def fake_features(generator, clip, captions, resolution, seed):
    """Features of one sample for each caption at a resolution, [N, D]; the ranks share the work, z comes from seed."""
    z = torch.randn(len(captions), generator.config.z_dim, generator=torch.Generator().manual_seed(seed))
    share = -(-len(captions) // distributed.world_size())
    # Every rank takes an equal share, the last ones wrapping around, so that the features can be gathered.
    mine = torch.arange(distributed.rank() * share, (distributed.rank() + 1) * share) % len(captions)
    samples = outputs(generator, clip, [captions[i] for i in mine], z[mine], resolution)
    features = [clip_features(clip, output.image.clamp(-1, 1)) for output in samples]
    return distributed.gather(torch.cat(features))[: len(captions)]
