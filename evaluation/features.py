"""Features of real and of generated images, by several frozen networks at once, and what is measured with them.

The ranks share the images. Of N images a rank takes those numbered rank, rank + world_size, … All ranks return the
features of all.
"""

import collections

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import distributed
from common.cli import UserError
from evaluation.metrics import compare_images, compare_texts, fid, fid_of_halves
from layers import resize
from sampling import latent
from sampling.pictures import to_bytes

BATCH = 64
OTHERS = "FID to other real images"
AS_READ = "the same, seen by what reads captions"


def own_resolution(generator, resolution):
    """`resolution` if the generator has an output of that size, else the highest that it has."""
    resolutions = [level.resolution for level in generator.config.levels]
    return resolution if resolution in resolutions else resolutions[-1]


def to_pixels(images, resolution):
    """Images [B, 3, R, R] in [−1, 1] → uint8 [B, 3, resolution, resolution], as an image file holds them."""
    if images.shape[-1] != resolution:
        images = F.interpolate(images, resolution, mode="bicubic", antialias=True)
    return to_bytes(images)


def real_pixels(images, resolution):
    """As to_pixels, but averaged down as the discriminator's real images are in training."""
    return to_pixels(resize(images, resolution), resolution)


@torch.no_grad()
def extract(batches, extractors, total=None):
    """Batches of pixels, uint8 [B, 3, R, R] → {extractor: list of features [B, D] on the CPU}."""
    features = {name: [] for name in extractors}
    for pixels in tqdm(batches, total=total, unit="batch", leave=False, disable=not distributed.is_main()):
        for name, extractor in extractors.items():
            features[name].append(extractor.images(pixels).cpu())
    return features


def gather(labels, features):
    """One label for each image of this rank's share, and its features of `extract` → those of all images, by number."""
    shares = distributed.collect((labels, features))
    numbers = [rank + i * len(shares) for rank, (share, _) in enumerate(shares) for i in range(len(share))]
    order = torch.tensor(numbers).argsort()
    labels = [label for share, _ in shares for label in share]
    features = {name: torch.cat([part for _, share in shares for part in share[name]]) for name in features}
    return [labels[i] for i in order], {name: values[order] for name, values in features.items()}


def extract_real(source, count, resolution, extractors):
    """Features of the first 2·count images of a source, or of all if it holds fewer; those held out come first.

    → captions, {extractor: features [N, D]}, and how many pairs were skipped, by cause. Raises UserError if there are
    fewer than `count`.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    quota = len(range(rank, 2 * count, world_size))
    captions, skipped = [], collections.Counter()

    def batches():
        for batch in source.evaluation_pairs(min(BATCH, quota), rank, world_size) if quota else ():
            skipped.update(batch.skipped)
            left = quota - len(captions)
            captions.extend(batch.captions[:left])
            yield real_pixels(batch.images[:left], resolution)
            if len(captions) == quota:
                return

    with distributed.together():
        features = extract(batches(), extractors)
    captions, features = gather(captions, features)
    if len(captions) < count:
        with distributed.together():
            raise UserError(f"--count {count}: the data holds {len(captions)} usable images; ask for no more")
    return captions, features, sum(distributed.collect(skipped), collections.Counter())


def share(items):
    """What this rank takes of N items."""
    return items[distributed.rank() :: distributed.world_size()]


def drawing(generator, clip, resolution, psi=1.0):
    """A Generator as a function of all captions and a seed, which yields the images of this rank's share in batches.

    They are its own output at `resolution` if it has one, else its highest. psi: the truncation.
    """
    own = own_resolution(generator, resolution)

    def draw(captions, seed):
        z = share(latent.noise(generator, len(captions), seed))
        for output in latent.generate(generator, clip, share(captions), z, own, psi, BATCH):
            yield output.image

    return draw


def extract_generated(draw, captions, seed, resolution, extractors):
    """Features {extractor: [N, D]} of one generated image for each caption. draw: see drawing."""
    mine = share(captions)
    pixels = (to_pixels(images, resolution) for images in draw(captions, seed))
    return gather(mine, extract(pixels, extractors, -(-len(mine) // BATCH)))[1]


@torch.no_grad()
def embed(extractor, captions):
    """The embeddings [N, D] of captions, on the CPU."""
    parts = (captions[i : i + BATCH] for i in range(0, len(captions), BATCH))
    return torch.cat([extractor.texts(part).cpu() for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# All measures of a generator. The extractors are called "images", for distances, and "texts", which reads captions.


def measure(draw, captions, real, count, seed, resolution, extractors):
    """Draws an image for each of the first `count` captions → {measure: number}.

    captions, real: of extract_real. The FID is to the real images whose captions are drawn, as in the field. The one to
    other real images can be compared with that between two sets of real images, which have no captions in common
    either. It is measured by both networks, since a system that learned through one of them is flattered by it
    (Kynkäänniemi et al. 2022).
    """
    own, device = captions[:count], real["images"].device
    made = {name: x.to(device) for name, x in extract_generated(draw, own, seed, resolution, extractors).items()}
    result = compare_images(real["images"][:count], made["images"])
    if len(captions) == 2 * count:
        result[OTHERS] = fid(real["images"][count:], made["images"])
        result[AS_READ] = fid(real["texts"][count:], made["texts"])
    return result | compare_texts(made["texts"], embed(extractors["texts"], own).to(device), own)


def measure_real(captions, real, count, extractors):
    """The same of real images, as far as it can be told: distances are between the two halves of them."""
    own = captions[:count]
    texts = embed(extractors["texts"], own).to(real["texts"].device)
    distances = {OTHERS: fid_of_halves(real["images"]), AS_READ: fid_of_halves(real["texts"])}
    return distances | compare_texts(real["texts"][:count], texts, own)


# ----------------------------------------------------------------------------------------------------------------------
# The features that training measures its FID in.


@torch.no_grad()
def extract_clip_features(clip, images):
    """The CLIP's embeddings [B, D] of images [B, 3, R, R] in [−1, 1], in float32."""
    return clip.encode_image(images).float()


def extract_fake_features(generator, clip, captions, resolution, seed, given=()):
    """CLIP features [N, D] of one generated image for each caption at a resolution; z comes from the seed.

    given: of an upsampler, its inputs, see upsampler.given_images.

    Each rank generates a share of the images, and all ranks return the features of all.
    """
    z = latent.noise(generator, len(captions), seed)
    share = -(-len(captions) // distributed.world_size())
    # Every rank takes an equal share, the last ones wrapping around, so that the features can be gathered.
    mine = torch.arange(distributed.rank() * share, (distributed.rank() + 1) * share) % len(captions)
    captions_of_mine, given = [captions[i] for i in mine], tuple(images[mine] for images in given)
    batch = max(1, BATCH * 64 // max(64, resolution))  # large images take memory
    outputs = latent.generate(generator, clip, captions_of_mine, z[mine], resolution, batch=batch, given=given)
    features = [extract_clip_features(clip, output.image.clamp(-1, 1)) for output in outputs]
    return distributed.gather(torch.cat(features))[: len(captions)]
