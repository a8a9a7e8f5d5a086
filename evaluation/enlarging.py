"""How well small pictures are enlarged: averages real pictures down, enlarges them and compares with the originals.

    python -m evaluation.enlarging models/emoji_upsampler.safetensors --data emoji --count 256

The perceptual distance is a mean over the pictures, from EfficientNet's feature maps; it favours a network trained with
this distance. The Fréchet distance is between EfficientNet's features of enlarged and of true pictures at 224×224.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip import load_text
from common import distributed
from common.cli import Parser, UserError, a_path, add_data, errors_in_one_line, positive_int
from data import sources
from evaluation.extractors import efficientnet
from evaluation.features import share, to_pixels
from evaluation.metrics import fid
from layers import resize
from losses import perceptual_distance
from sampling import inference, latent
from sampling.pictures import in_range
from weights.efficientnet import load_efficientnet
from weights.generator_file import generator_of, load_ours, load_upsampler

BATCH = 8


def bicubic(images, captions, resolution):
    return F.interpolate(images, resolution, mode="bicubic")


def enlarge(upsampler, text, images, captions, z, psi=1.0):
    """Small images [B, 3, R, R], their captions and z [B, z_dim] → large images, as sampling draws them."""
    given = latent.inputs(upsampler, images)
    outputs = latent.generate(upsampler, text, captions, z, None, psi, BATCH, given)
    return torch.cat([output.image for output in outputs])


def enlarger(upsampler, text):
    """An Upsampler → a function for `compare`."""
    rng = torch.Generator().manual_seed(0)

    def enlarge_some(images, captions, _):  # it has one resolution
        z = torch.randn(len(images), upsampler.config.z_dim, generator=rng)
        return enlarge(upsampler, text, images, captions, z)

    return enlarge_some


def enlarged(draw, upsampler, text, psi=1.0):
    """Like features.drawing: `draw`, whose images an upsampler enlarges with the z that the first stage had."""

    def draw_large(captions, seed):
        mine, z, first = share(captions), share(latent.noise(upsampler, len(captions), seed)), 0
        for images in draw(captions, seed):
            some = slice(first, first + len(images))
            yield enlarge(upsampler, text, in_range(images), mine[some], z[some], psi)
            first += len(images)

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
        for name, function in enlargers.items():
            made = function(resize(true, small), batch.captions, large).clamp(-1, 1)
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
        if args.count < 2:
            raise UserError("--count 1: give 2 or more, as a Fréchet distance needs a covariance")
        device = distributed.start(args.device)
        _, text_name, _ = load_ours(generator_of(args.upsampler[0]))
        text = load_text(text_name, device)
        networks = {path: inference.prepare(load_upsampler(path, text, device)) for path in args.upsampler}
        sizes = {(network.config.input_resolution, network.config.resolutions[-1]) for network in networks.values()}
        if len(sizes) > 1:
            raise UserError("the upsamplers enlarge from or to different sizes; compare those of one size")
        small, large = sizes.pop()
        source = sources.open_data(args.data, large, 0, args.caption_key)
        source.announce()
        enlargers = {"bicubic": bicubic} | {path: enlarger(network, text) for path, network in networks.items()}
        for name, values in compare(enlargers, source, small, large, args.count, device).items():
            print(f"{name}: perceptual distance {values['perceptual']:.4f}, Fréchet distance {values['fd']:.1f}")


if __name__ == "__main__":
    main()
