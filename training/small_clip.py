"""A small CLIP for any captioned pictures, trained in minutes on a CPU, where no weights are at hand.

    python -m training.small_clip --data emoji --out clip.safetensors

Its words are those of the captions. It is not a judge of anything else, and far from OpenAI's; it is what Aurora needs
to read captions and to be told how well a picture fits one.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip import BUILT_IN, FrozenClip, new_small, save_small
from common import distributed
from common.cli import HelpFormatter, UserError, check_file, natural_number, positive_int, told_in_one_line
from common.disk import atomically
from common.distributed import say
from data import sources
from layers import resize

RESOLUTIONS = (4, 8, 8, 16, 16, 32, 32, 32)  # of the pictures, an eighth of a batch each: the losses ask about all
LR = 2e-3
UNKNOWN = 0.03  # share of words hidden in training, so that the row of the unknown word means "some word"
MISLED_AFTER = 0.6  # share of the steps after which pictures are misled, see mislead
REACH = 0.1  # how far at the end
POOL = 16  # batches drawn at a time; half of them are runs of captions next to each other in the alphabet
STEPS = 1000, 4000  # at least and at most
MAX_PAIRS = 50_000  # held in memory


def train_small_clip(source, steps=None, batch=128, seed=0, device="cpu"):
    """Trains a small CLIP on the pairs of a source of 32×32 images → FrozenClip. The same seed gives the same weights.

    steps: by default as many as there are pairs, within STEPS. Raises UserError where all captions are the same.

    Half of the batches hold captions that differ in a word or two, as neighbours in the alphabet do: among captions
    drawn at random, telling a face from a flag would do, and skin tones and styles would not be read.
    """
    pairs = list(itertools.islice(source.examples(), MAX_PAIRS))
    if len({line for _, captions in pairs for line in captions}) < 2:
        raise UserError("a small CLIP cannot be trained: all captions are the same")
    steps = steps or min(max(len(pairs), STEPS[0]), STEPS[1])
    pixels = torch.stack([((image + 1) * 127.5).round().byte() for image, _ in pairs])
    captions = [lines for _, lines in pairs]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = new_small(vocabulary(captions)).to(device)
        model = clip.model.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
        batches = draw_batches(captions, batch)
        for step in tqdm(range(steps), desc="training a small CLIP", unit="step"):
            index, texts = next(batches)
            images = [x.to(device) for x in at_all_resolutions(pixels[index].float() / 127.5 - 1)]
            after = (step / steps - MISLED_AFTER) / (1 - MISLED_AFTER)
            learn(clip, optimizer, schedule, images, texts, UNKNOWN, REACH * after if after > 0 else None)
    return FrozenClip(model, "small", clip.kept_ids)


def clip_for(data, preset):
    """The preset's CLIP, or "train" where that is a small one and --data is not what it was trained on."""
    return "train" if preset.clip_model in BUILT_IN and data != preset.data else preset.clip_model


def ensure_small_clip(path, data, caption_key, seed, device):
    """Trains a small CLIP on the captions of a run's data and writes it to `path`, unless it is there already."""
    with distributed.together():
        if distributed.is_main() and not path.is_file():
            say("First a small CLIP learns to read these captions: about ten minutes on one CPU core.")
            clip = train_small_clip(sources.open_data(data, 32, seed, caption_key), seed=seed, device=device)
            atomically(path, lambda temporary: save_small(clip, temporary))


def learn(clip, optimizer, schedule, images, captions, unknown, reach):
    """One step → its loss. unknown: the share of words to hide. reach: how far to mislead images, or None."""
    ids = clip.tokenize(captions)
    hidden = (torch.rand(ids.shape) < unknown).to(ids.device)
    ids = ids.masked_fill(hidden & (ids > 1) & (ids < len(clip.kept_ids) - 1), 0)  # not padding, start and end
    text_features = clip.model.encode_text(ids, normalize=True)
    if reach is not None:
        images = mislead(clip, images, text_features.detach(), reach)
    loss = contrast(clip, images, text_features)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
    clip.model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP
    return loss


def contrast(clip, images, text_features):
    """open_clip's own loss between captions and images, these as a list of batches of several sizes."""
    image_features = F.normalize(clip.encode_image(*images), dim=-1)
    return open_clip.ClipLoss()(image_features, text_features, clip.logit_scale)


def mislead(clip, images, text_features, reach):
    """The images, every pixel moved so that the captions fit less, by up to `reach` of a range of 2.

    One step along the sign of the gradient (Goodfellow et al. 2015). Networks trained on such images have gradients
    that change what people see, not noise that they alone see (Santurkar et al. 2019).
    """
    images = [part.detach().requires_grad_() for part in images]
    gradients = torch.autograd.grad(contrast(clip, images, text_features), images)
    amounts = [reach * torch.rand(len(part), 1, 1, 1, device=part.device) for part in images]
    return [(x + amount * g.sign()).detach() for x, amount, g in zip(images, amounts, gradients, strict=True)]


def vocabulary(captions):
    """The token ids in lists of captions, with padding, start and end of the text; sorted."""
    tokenizer = open_clip.SimpleTokenizer()
    words = {word for lines in captions for line in lines for word in line.lower().split()}
    ids = {i for word in words for i in tokenizer.encode(word)}
    return sorted(ids | {0, tokenizer.sot_token_id, tokenizer.eot_token_id})


def draw_batches(captions, batch):
    """Endless (indices [b], texts) without the same text twice; every other batch is a run of similar texts."""
    while True:
        pool = torch.randint(len(captions), (POOL * batch,)).tolist()
        drawn = [(captions[i][torch.randint(len(captions[i]), ()).item()], i) for i in pool]
        half = len(drawn) // 2
        arranged = [*drawn[:half], *sorted(drawn[half:])]
        for part in torch.randperm(POOL).tolist():
            index_of = dict(arranged[part * batch : (part + 1) * batch])
            yield torch.tensor(list(index_of.values())), list(index_of)


def at_all_resolutions(images):
    """Images [B, 3, 32, 32] → a share of them at each of RESOLUTIONS, high ones first, in the images' order."""
    parts = zip(images.tensor_split(len(RESOLUTIONS)), RESOLUTIONS[::-1], strict=True)
    return [resize(part, r) for part, r in parts if len(part)]


@torch.no_grad()
def accuracy(clip, source, count=1000):
    """The share of `count` pairs whose picture is nearer to its own caption than to all others', of different text."""
    images, captions, _ = next(source.evaluation(count))
    index = list(dict(zip(captions, range(len(captions)), strict=True)).values())
    pictures = F.normalize(torch.cat([clip.encode_image(part) for part in images[index].split(100)]), dim=-1)
    texts = clip.read([captions[i] for i in index]).embedding
    return ((pictures @ texts.T).argmax(1) == torch.arange(len(index))).float().mean().item(), len(index)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--data", default="emoji", help="emoji, shapes, a folder or shards, as in train.py")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, for --clip of train.py")
    parser.add_argument("--steps", type=positive_int, default=4000)
    parser.add_argument("--seed", type=natural_number, default=0)
    args = parser.parse_args()
    with told_in_one_line():
        check_file(args.out)
        started = time.monotonic()
        source = sources.open_data(args.data, 32, args.seed)
        clip = train_small_clip(source, args.steps, seed=args.seed)
        save_small(clip, args.out)
        share, count = accuracy(clip, source)
    print(
        f"{(time.monotonic() - started) / 60:.0f} minutes; of {count} captions the right one first: {100 * share:.1f} %"
    )


if __name__ == "__main__":
    main()
