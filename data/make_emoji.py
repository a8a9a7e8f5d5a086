"""Makes `emoji.tar.gz` from npm packages: one shard of captioned vector pictures, in the layout of img2dataset.

    npm pack emojibase-data @iconify-json/{noto,noto-v1,twemoji,fluent-emoji-flat,emojione,fxemoji,streamline-emojis}
    python data/make_emoji.py FOLDER      # the folder with the .tgz files

Every picture is `key.svg` with `key.txt` and `key.json`. Each use of a picture draws one line of its `.txt`: the name,
another word for it, or a short phrase; one line in five names the style. In the `.json`, `aurora_weight` says how often
training draws the picture, compared with others. It makes every name equally frequent although people have up to 26
skin tones. `aurora_held_out` marks the pictures that training never sees: "tone" and "style" are pairs whose parts
occur in other pictures, "name" is a name that occurs in no other picture.
"""

import argparse
import io
import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

NAMES = "emojibase-data"  # Unicode's names and tags, in English
# npm's name of a set: its name in captions. Fluent's other set has colour gradients, which take ten times as long.
STYLES = {
    "noto": "noto",
    "noto-v1": "old noto",
    "twemoji": "twemoji",
    "fluent-emoji-flat": "fluent",
    "emojione": "emojione",
    "fxemoji": "firefox",
    "streamline-emojis": "streamline",
}
GROUPS = ("smileys", "people", "component", "nature", "food", "travel", "activities", "objects", "symbols", "flags")
IMAGINABLE = ("smileys", "nature", "food", "travel", "activities", "objects")  # whose names say how they look
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HELD_OUT_TONES, HELD_OUT_STYLES, HELD_OUT_NAMES = 60, 40, 60
MAX_TAGS = 5  # of an emoji that captions use
COMMON = 40  # names; a tag that more names share, such as "flag" or "person", is left out


@dataclass
class Emoji:
    """One emoji of Unicode, in one skin tone."""

    name: str  # in plain words, without the tone
    tone: str  # "dark skin tone", or "" for the yellow default
    tags: tuple[str, ...]  # other words for it
    group: str
    code: str  # such as "1f469-1f3ff-200d-1f680"


def read_package(folder, name, *paths):
    """JSON files of a .tgz from npm pack → their contents, {} for a missing file, and the package with its version."""
    found = sorted(folder.glob(f"{name}-[0-9]*.tgz"))
    if len(found) != 1:
        sys.exit(f"error: {folder} has {len(found)} files {name}-*.tgz, and needs one; get it with npm pack")
    (archive,) = found
    with tarfile.open(archive) as tar:
        there = set(tar.getnames())
        files = [f"package/{path}" for path in paths]
        return [json.load(tar.extractfile(file)) if file in there else {} for file in files], archive.stem


def plain(label):
    """A name of Unicode in spoken words: "flag: Côte d’Ivoire" → "flag of côte d'ivoire"."""
    label = label.lower().replace("’", "'").replace("“", "").replace("”", "").replace("!", "")
    label = re.sub(r"^flag: ", "flag of ", label).replace("keycap: ", "keycap ")
    if re.search(r"o'clock$|-thirty$", label):
        label = f"clock at {label}"
    return label.replace(": ", ", ")


def tone_of(label, base):
    """The skin tones, in words, that the label of a variation adds to its base."""
    tones = re.findall(r"(medium-light|medium-dark|light|medium|dark) skin tone", label.removeprefix(base))
    return " and ".join(tones) + " skin tone" if tones else ""


def code_of(hexcode):
    """A sequence of code points without U+FE0F, which not all sets write."""
    return hexcode.lower().replace("-fe0f", "")


def read_emoji(entries):
    """The entries of emojibase-data → {code: Emoji} and {slug of its name: code}."""
    emoji, code_of_slug = {}, {}
    shared = Counter(tag for entry in entries for tag in entry.get("tags", ()))
    for entry in entries:
        if "group" not in entry or GROUPS[entry["group"]] == "component":
            continue
        name = plain(entry["label"])
        tags = [tag for tag in entry.get("tags", ()) if tag != name and shared[tag] <= COMMON]
        tags = tuple(tag for tag in tags if re.fullmatch(r"[a-z][a-z' -]{2,}", tag))  # no symbols, no country codes
        for variation in (entry, *entry.get("skins", ())):
            code, tone = code_of(variation["hexcode"]), tone_of(variation["label"], entry["label"])
            emoji[code] = Emoji(name, tone, tags, GROUPS[entry["group"]], code)
            code_of_slug[slug_of(variation["label"])] = code
    return emoji, code_of_slug


def slug_of(name):
    """A name in the form that all sets share: "Flag: Japan", "flag-for-japan" → "flagjapan"."""
    name = re.sub(r"-\d+$", "", name.lower()).replace("flag-for-flag", "flag").replace("flag-for", "flag")
    return re.sub(r"skin.tone|[^a-z0-9]", "", name)


def draw_set(icons):
    """The icons.json of a set → {name: SVG}."""
    pictures = {}
    for name, icon in icons["icons"].items():
        box = [icon.get(side, icons.get(side, default)) for side, default in BOX.items()]
        pictures[name] = SVG.format(box=" ".join(map(str, box)), body=icon["body"])
    return pictures


BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'


def with_article(phrase):
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def captions(emoji, style, rng):
    """The ten lines of a .txt: eight do not name the style, and four of these do not contain the whole name."""
    tags = list(rng.permutation(emoji.tags))[:MAX_TAGS] or [emoji.name]
    head = emoji.name.split()[-1]  # "grinning face": a happy face
    phrases = [with_article(f"{tag} {head}") for tag in tags if head not in tag and head.isalpha()] or tags
    lines = [emoji.name, emoji.name, with_article(emoji.name), f"{emoji.name}, {tags[0]}"]
    lines += [tags[0], tags[-1], ", ".join(tags[:2]), phrases[0]]
    lines += [f"{emoji.name}, {style} style", f"{tags[len(tags) // 2]}, {style} style"]
    return [f"{line}, {emoji.tone}" if emoji.tone else line for line in lines]


def hold_out(pairs, rng):
    """Pairs (Emoji, style) → {(code, style): "tone", "style" or "name"} of the held-out pairs."""
    styles, variations = defaultdict(list), defaultdict(set)
    for e, style in pairs:
        styles[e.code].append(style)
        if e.tone in [f"{tone} skin tone" for tone in TONES]:
            variations[e.name].add(e.code)
    toned = sorted(name for name, codes in variations.items() if len(codes) == len(TONES))
    single = [e for e in {e.code: e for e, _ in pairs}.values() if not variations[e.name] and len(styles[e.code]) >= 4]
    names = rng.permutation([e.code for e in single if e.group in IMAGINABLE])[:HELD_OUT_NAMES]
    held_out = {(code, style): "name" for code in names for style in styles[code]}
    for name in rng.choice(toned, HELD_OUT_TONES, replace=False):
        code = rng.choice(sorted(variations[name]))
        held_out |= {(code, style): "tone" for style in styles[code]}
    for code in rng.choice([e.code for e in single if e.code not in names], HELD_OUT_STYLES, replace=False):
        held_out[code, rng.choice(styles[code])] = "style"
    return held_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="contains the .tgz files of the packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji.tar.gz")
    args = parser.parse_args()
    (entries,), _ = read_package(args.folder, NAMES, "en/data.json")
    emoji, code_of_slug = read_emoji(entries)
    sets = {}
    for package, style in STYLES.items():
        (icons, chars), source = read_package(args.folder, f"iconify-json-{package}", "icons.json", "chars.json")
        code_of_slug |= {slug_of(name): code_of(code) for code, name in chars.items() if code_of(code) in emoji}
        sets[style] = draw_set(icons), source
    pictures = {}  # (code, style): SVG, the first in the set with this name
    for style, (drawn, _) in sets.items():
        for name, svg in sorted(drawn.items()):
            if code := code_of_slug.get(slug_of(name)):
                pictures.setdefault((code, style), svg)
    pairs = [(emoji[code], style) for code, style in sorted(pictures)]
    rng = np.random.default_rng(0)
    held_out = hold_out(pairs, rng)
    of_name, styles = Counter(e.name for e, _ in pairs), defaultdict(set)
    for e, style in pairs:
        styles[e.name].add(style)
    with tarfile.open(args.out, "w:gz") as tar:
        for number, index in enumerate(rng.permutation(len(pairs))):
            e, style = pairs[index]
            facts = asdict(e) | {"style": style, "source": sets[style][1]}
            facts["aurora_held_out"] = held_out.get((e.code, style))
            facts["aurora_weight"] = round(len(styles[e.name]) / of_name[e.name], 4)
            text = "\n".join(captions(e, style, rng)) + "\n"
            for suffix, data in (("svg", pictures[e.code, style]), ("txt", text), ("json", json.dumps(facts))):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data.encode())
                tar.addfile(member, io.BytesIO(data.encode()))
    counts = Counter(style for _, style in pairs)
    print(f"{len(pairs)} pictures, {dict(counts)}, of {len(of_name)} names; held out: {Counter(held_out.values())}")


if __name__ == "__main__":
    main()
