"""FID, precision, recall, CLIP score and R-precision, computed from features."""

import torch
import torch.nn.functional as F

from common.cli import UserError

NEIGHBOURS = 3  # of precision and recall
CANDIDATES = 100  # captions among which R-precision looks for the right one
TIE = 1e-6  # rounding in float32 makes cosines of equal captions differ by less


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
    """The Fréchet distance between both halves of features [N, D], N ≥ 4.

    It falls as N grows, so compare it with distances between sets of N/2 images only. Of data with held-out pictures
    extract_real puts these first, so the halves differ more than random ones: for 1,000 emoji 215, not 191.
    """
    half = len(features) // 2
    return fid(features[:half], features[half : 2 * half])


def precision_recall(real, fake):
    """Features real [N, D] and fake [M, D] → precision, the share of fake images that lie among the real ones, and
    recall, the share of real images that lie among the fake ones (Kynkäänniemi et al. 2019, section 2).

    In float64, because cdist computes distances from products, which loses half of the digits.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric  # not at the top: training does not need it

    options = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(fake.double(), real.double(), **options)
    return found["precision"], found["recall"]


def clip_score(images, texts):
    """The mean cosine between the embeddings of images [N, D] and of their captions [N, D]."""
    return F.cosine_similarity(images.double(), texts.double()).mean().item()


def own_caption_first(images, texts, captions, candidates=CANDIDATES, seed=0, block=1024):
    """For each image, whether its own caption is nearer by cosine than `candidates` − 1 others → bool [N].

    images [N, D], texts [N, D]: the embeddings of N images and of their captions. The other captions have different
    texts and are drawn at random for each image, without repetition; if there are fewer, all are used. A tie is a miss.
    The mean is the R-precision of AttnGAN (Xu et al. 2018, section 4).
    """
    rng = torch.Generator().manual_seed(seed)
    rows = {caption: i for i, caption in enumerate(captions)}  # the last row of each text
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
    """Features [N, D] and [M, D] → FID, precision and recall. Raises UserError if both are equal."""
    if real.shape == fake.shape and torch.equal(real, fake):
        raise UserError("real and generated images are the same; give other --data")
    precision, recall = precision_recall(real, fake)
    return {"FID": fid(real, fake), "precision": precision, "recall": recall}


def compare_texts(images, texts, captions):
    """The embeddings of images and of their captions, both [N, D] → CLIP score and R-precision."""
    hits = own_caption_first(images, texts, captions)
    return {"CLIP score": clip_score(images, texts), "R-precision": hits.double().mean().item()}
