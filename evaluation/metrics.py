"""What is measured: FID, precision, recall, CLIP score and R-precision, as formulas of features; and the features that
training measures its FID in.
"""

import torch
import torch.nn.functional as F

from common import distributed
from common.cli import UserError
from sampling import latent

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


# ----------------------------------------------------------------------------------------------------------------------
# Generated images, and the features that training measures its FID in.


@torch.no_grad()
def generate(generator, clip, captions, z, resolution=None, psi=1.0, batch=64):
    """Yields the generator's Output for every `batch` of N captions and of their z [N, z_dim].

    resolution: the one to stop at, by default the highest. psi: the truncation; 1 is none.
    """
    for first in range(0, len(captions), batch):
        prompt = latent.read(generator, clip, captions[first : first + batch])
        w = generator.mapping(z[first : first + batch].to(clip.device), prompt.global_text)
        if psi != 1:
            w = latent.truncate(w, latent.mean_code(generator, prompt.global_text), psi)
        yield generator.synthesis(w, prompt.local_text, resolution)


def count_points(expert_index, num_experts):
    """How many feature points each expert takes: indices of any shape → [E]. No host sync, which bincount needs."""
    return (expert_index.flatten()[:, None] == torch.arange(num_experts, device=expert_index.device)).sum(0)


def expert_counts(config, routes):
    """How many points each expert took, {router: [E]}, from the routes of an aurora.Output."""
    experts = {level.resolution: level.num_experts for level in config.levels}
    return {name: count_points(index, experts[int(name.split(".")[0])]) for name, index in routes.items()}


@torch.no_grad()
def extract_clip_features(clip, images):
    """The CLIP's embeddings [B, D] of images [B, 3, R, R] in [−1, 1], in float32."""
    return clip.encode_image(images).float()


def extract_fake_features(generator, clip, captions, resolution, seed):
    """CLIP features [N, D] of one generated image for each caption at a resolution; z comes from the seed.

    Each rank generates a share of the images, and all ranks return the features of all.
    """
    z = latent.noise(generator, len(captions), seed)
    share = -(-len(captions) // distributed.world_size())
    # Every rank takes an equal share, the last ones wrapping around, so that the features can be gathered.
    mine = torch.arange(distributed.rank() * share, (distributed.rank() + 1) * share) % len(captions)
    outputs = generate(generator, clip, [captions[i] for i in mine], z[mine], resolution)
    features = [extract_clip_features(clip, output.image.clamp(-1, 1)) for output in outputs]
    return distributed.gather(torch.cat(features))[: len(captions)]
