"""Features of real and of generated images from several frozen networks, and the measures computed from them.

The ranks share the images: a rank processes the images rank, rank + world_size, …, and all ranks return the features of
all images.
"""

import collections

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import distributed
from common.cli import UserError
from evaluation.metrics import compare_images, compare_texts, fid, fid_of_halves
from sampling import latent
from sampling.pictures import to_bytes

BATCH = 64
OTHERS = "FID to other real images"
READ_BY_CLIP = f"{OTHERS}, by the network of the CLIP score"


def own_resolution(generator, resolution):
    """`resolution` if the generator has an output of that size, else its highest."""
    resolutions = generator.config.resolutions
    return resolution if resolution in resolutions else resolutions[-1]


def to_pixels(images, resolution):
    """Images [B, 3, R, R] in [−1, 1] → uint8 [B, 3, resolution, resolution], as in an image file."""
    if images.shape[-1] != resolution:
        images = F.interpolate(images, resolution, mode="bicubic", antialias=True)
    return to_bytes(images)


@torch.no_grad()
def extract(batches, extractors, total=None):
    """Batches of pixels, uint8 [B, 3, R, R] → {extractor: list of features [B, D] on the CPU}."""
    features = {name: [] for name in extractors}
    for pixels in tqdm(batches, total=total, unit="batch", leave=False, disable=not distributed.is_main()):
        for name, extractor in extractors.items():
            features[name].append(extractor.images(pixels).cpu())
    return features


def gather(labels, features):
    """Labels and features (see `extract`) of this rank's images → those of all images, in order."""
    shares = distributed.collect((labels, features))
    numbers = [rank + i * len(shares) for rank, (share, _) in enumerate(shares) for i in range(len(share))]
    order = torch.tensor(numbers).argsort()
    labels = [label for share, _ in shares for label in share]
    features = {name: torch.cat([part for _, share in shares for part in share[name]]) for name in features}
    return [labels[i] for i in order], {name: values[order] for name, values in features.items()}


def extract_real(source, count, resolution, extractors):
    """Features of the first 2·count images of a source, or of all if it has fewer; held-out ones come first.

    → captions, {extractor: features [N, D]}, {cause: number of skipped pairs}. Raises UserError for fewer than `count`.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    captions, skipped = [], collections.Counter()

    def batches():
        for batch in source.held_out_first(BATCH, rank, world_size, 2 * count):
            skipped.update(batch.skipped)
            captions.extend(batch.captions)
            yield to_pixels(batch.images, resolution)

    with distributed.together():
        features = extract(batches(), extractors)
    captions, features = gather(captions, features)
    if len(captions) < count:
        with distributed.together():
            raise UserError(f"--count {count}: the data has {len(captions)} usable images; ask for no more")
    return captions, features, sum(distributed.collect(skipped), collections.Counter())


def share(items):
    """The items that this rank processes."""
    return items[distributed.rank() :: distributed.world_size()]


def drawing(generator, text_encoder, resolution, psi=1.0):
    """A Generator → draw(captions, seed), a function of all captions that yields this rank's images in batches.

    The images are the output at `resolution` if it has one, else its highest. psi: the truncation.
    """
    own = own_resolution(generator, resolution)

    def draw(captions, seed):
        z = share(latent.noise(generator, len(captions), seed))
        for output in latent.generate(generator, text_encoder, share(captions), z, own, psi, BATCH):
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


def measure(draw, captions, real, count, seed, resolution, extractors):
    """Draws an image for each of the first `count` captions → {measure: number}. The extractor "fid" is for
    distances, "clip" compares images with captions.

    captions, real: see extract_real. The FID is to the real images of the same captions, as usual. That to other real
    images is comparable to the FID between two sets of real images, which have no captions in common either. Both
    networks measure it, because a network favours generators that were trained with it (Kynkäänniemi et al. 2022).
    """
    own, device = captions[:count], real["fid"].device
    made = {name: x.to(device) for name, x in extract_generated(draw, own, seed, resolution, extractors).items()}
    result = compare_images(real["fid"][:count], made["fid"])
    if len(captions) == 2 * count:
        result[OTHERS] = fid(real["fid"][count:], made["fid"])
        result[READ_BY_CLIP] = fid(real["clip"][count:], made["clip"])
    return result | compare_texts(made["clip"], embed(extractors["clip"], own).to(device), own)


def measure_real(captions, real, count, extractors):
    """The measures of real images: distances between their two halves, and how well they match their captions."""
    own = captions[:count]
    texts = embed(extractors["clip"], own).to(real["clip"].device)
    distances = {OTHERS: fid_of_halves(real["fid"]), READ_BY_CLIP: fid_of_halves(real["clip"])}
    return distances | compare_texts(real["clip"][:count], texts, own)


@torch.no_grad()
def extract_clip_features(clip, images):
    """The CLIP's embeddings [B, D] of images [B, 3, R, R] in [−1, 1], in float32."""
    return clip.encode_image(images).float()


def extract_fake_features(generator, clip, captions, resolution, seed, given=()):
    """CLIP features [N, D], on the CPU, of one generated image for each caption at a resolution; for training's FID.

    given: for an Upsampler, its inputs from upsampler.given_images.
    """
    z, mine = share(latent.noise(generator, len(captions), seed)), share(captions)
    given = tuple(share(images) for images in given)
    batch = max(1, BATCH * 64 // max(64, resolution))  # large images need memory
    outputs = latent.generate(generator, clip, mine, z, resolution, batch=batch, given=given)
    features = [extract_clip_features(clip, output.image.clamp(-1, 1)).cpu() for output in outputs]
    return gather(mine, {"clip": features})[1]["clip"]
