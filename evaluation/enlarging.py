"""How well small pictures are enlarged: averages real pictures down, enlarges them and compares with the originals.

    python -m evaluation.enlarging models/emoji_upsampler.safetensors --data emoji --count 256

The perceptual distance is a mean over the pictures, from EfficientNet's feature maps; it favours a network trained with
this distance. The Fréchet distance is between EfficientNet's features of enlarged and of true pictures at 224×224.
"""

import itertools

import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip import load_minilm
from common import distributed
from common.cli import Parser, UserError, a_path, add_data, errors_in_one_line, positive_int
from data import sources
from evaluation.extractors import efficientnet
from evaluation.features import share, to_pixels
from evaluation.metrics import fid
from losses import perceptual_distance
from sampling import latent
from sampling.pictures import in_range
from upsampler import draw_input_noise, given_images
from weights.efficientnet import load_efficientnet
from weights.generator_file import load_upsampler

BATCH = 8


def bicubic(images, captions, resolution):
    return F.interpolate(images, resolution, mode="bicubic")


def enlarger(upsampler, text, seed=0):
    """An Upsampler → a function of small images [B, 3, R, R], captions and a resolution that enlarges them."""
    config, rng = upsampler.config, torch.Generator().manual_seed(seed)

    def enlarge(images, captions, resolution):
        given = given_images(config, images, draw_input_noise(config, len(images), rng))
        z = torch.randn(len(images), config.z_dim, generator=rng)
        outputs = latent.generate(upsampler, text, captions, z, resolution, batch=BATCH, given=given)
        return torch.cat([output.image for output in outputs])

    return enlarge


def enlarged(draw, enlarge, resolution):
    """Like features.drawing: `draw`, whose images the function `enlarge` of `enlarger` enlarges to a resolution."""

    def draw_large(captions, seed):
        mine = iter(share(captions))
        for images in draw(captions, seed):
            yield enlarge(in_range(images), list(itertools.islice(mine, len(images))), resolution)

    return draw_large


@torch.no_grad()
def compare(enlargers, source, small, large, count, device="cpu"):
    """{name: function(images, captions, resolution)} → {name: {"perceptual", "fd"}} over `count` pictures.

    source: of pictures of large × large, held-out ones first. small: the side that they are averaged down to. Raises
    UserError if it has fewer pictures.
    """
    network, features_of = load_efficientnet(features_only=True).to(device), efficientnet(device).images
    of_true, distances, features = [], {name: [] for name in enlargers}, {name: [] for name in enlargers}
    for batch in tqdm(source.held_out_first(BATCH, count=count), leave=False):
        true = batch.images.to(device)
        maps = network(true)
        of_true.append(features_of(to_pixels(true, large)).cpu())
        for name, enlarge in enlargers.items():
            made = enlarge(F.interpolate(true, small, mode="area"), batch.captions, large).clamp(-1, 1)
            distances[name].append(perceptual_distance(network(made), maps).cpu())
            features[name].append(features_of(to_pixels(made, large)).cpu())
    of_true, results = torch.cat(of_true), {}
    if len(of_true) < count:
        raise UserError(f"--count {count}: the data has {len(of_true)} usable images; ask for no more")
    for name in enlargers:
        distance = fid(torch.cat(features[name]), of_true)
        results[name] = {"perceptual": torch.cat(distances[name]).mean().item(), "fd": distance}
    return results


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("upsampler", type=a_path, nargs="+", help="runs, or their generator_ema.safetensors")
    add_data(parser.add_argument)
    parser.add_argument("--count", type=positive_int, default=256)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with errors_in_one_line():
        device, text = distributed.start(args.device), load_minilm()
        networks = {path: load_upsampler(path, text, device) for path in args.upsampler}
        config = next(iter(networks.values())).config
        source = sources.open_data(args.data, config.resolutions[-1], 0, args.caption_key)
        source.announce()
        enlargers = {"bicubic": bicubic} | {path: enlarger(network, text) for path, network in networks.items()}
        small, large = config.input_resolution, config.resolutions[-1]
        for name, values in compare(enlargers, source, small, large, args.count, device).items():
            print(f"{name}: perceptual distance {values['perceptual']:.4f}, Fréchet distance {values['fd']:.1f}")


if __name__ == "__main__":
    main()
