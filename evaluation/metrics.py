"""What is measured: FID, precision, recall, CLIP score and R-precision by formulas of features; shares of experts."""

import torch
import torch.nn.functional as F

from common.cli import UserError

NEIGHBOURS = 3  # of precision and recall
CANDIDATES = 100  # captions of which R-precision asks for the right one
TIE = 1e-6  # cosines of equal captions differ by less, as float32 is rounded


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


def fid_of_halves(features):
    """The Fréchet distance between the first half of features [N, D] and the second: what equal distributions reach.

    It falls as N grows, so it bounds only a distance between sets of N/2 images. N is at least 4.
    """
    half = len(features) // 2
    return fid(features[:half], features[half : 2 * half])


@torch.no_grad()
def precision_recall(real, fake, neighbours=NEIGHBOURS, block=4096):
    """Precision: the share of generated images that lie among the real ones. Recall: the share of real images that lie
    among the generated ones. Both in feature space, real [N, D] and fake [M, D].

    Each image of a set has a ball around its features. The radius is the distance to its k-th nearest neighbour in the
    same set, not counting itself. A point lies among the set if it is in any of these balls (Kynkäänniemi et al. 2019,
    section 2).
    """
    return share_among(fake, real, neighbours, block), share_among(real, fake, neighbours, block)


def share_among(points, others, neighbours, block):
    """The share of `points` that lie among `others`, see precision_recall. In float64: cdist computes distances by
    products, which cancels half of the digits.
    """
    points, others = points.double(), others.double()
    near = [torch.cdist(part, others).topk(neighbours + 1, largest=False).values for part in others.split(block)]
    radii = torch.cat(near)[:, -1]
    inside = [(torch.cdist(part, others) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).float().mean().item()


def clip_score(images, texts):
    """The mean cosine between the embeddings of images [N, D] and of their captions [N, D]."""
    return F.cosine_similarity(images.double(), texts.double()).mean().item()


def own_caption_first(images, texts, captions, candidates=CANDIDATES, seed=0, block=1024):
    """For each image, whether its own caption is nearer to it than `candidates` − 1 others → bool [N].

    images [N, D], texts [N, D]: the embeddings of N images and of their captions; nearer is by cosine, and a tie is not
    nearer. The other captions are drawn at random for each image, from those of different text, without repetition. If
    there are fewer, all of them are taken. The mean is the R-precision of AttnGAN (Xu et al. 2018, section 4).
    """
    rng = torch.Generator().manual_seed(seed)
    rows = {caption: i for i, caption in enumerate(captions)}  # where each text stands last
    column_of = {text: column for column, text in enumerate(rows)}
    columns = torch.tensor([column_of[caption] for caption in captions])[:, None]
    choices = F.normalize(texts.double(), dim=1)[list(rows.values())]
    first = []
    for part, own in zip(images.split(block), columns.split(block), strict=True):
        cosines = F.normalize(part.double(), dim=1) @ choices.T  # [block, texts]
        order = torch.rand(cosines.shape, generator=rng).scatter(1, own, -1).argsort(1).to(images.device)
        cosines = cosines.gather(1, order[:, :candidates])  # its own caption comes first in this order
        first.append((cosines[:, :1] > cosines[:, 1:] + TIE).all(1))
    return torch.cat(first)


def compare_images(real, fake):
    """Features of both sides, [N, D] and [M, D] → FID, precision and recall. Raises UserError if both are the same."""
    if real.shape == fake.shape and torch.equal(real, fake):
        raise UserError("real and generated images are the same, so their distance says nothing; give other --data")
    precision, recall = precision_recall(real, fake)
    return {"FID": fid(real, fake), "precision": precision, "recall": recall}


def compare_texts(images, texts, captions):
    """The embeddings of images and of their captions, both [N, D] → CLIP score and R-precision."""
    hits = own_caption_first(images, texts, captions)
    return {"CLIP score": clip_score(images, texts), "R-precision": hits.double().mean().item()}


def expert_counts(routings):
    """How many points each expert took, {router: [E]}, from the routings of an aurora.Output."""
    return {name: F.one_hot(r.expert_index, r.logits.shape[-1]).sum((0, 1)) for name, r in routings.items()}
