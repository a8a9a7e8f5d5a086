"""Makes `emoji.tar.gz` from four npm packages: one shard of captioned pictures, as img2dataset writes it.

    npm pack emoji-datasource-google emoji-datasource-twitter fluentui-emoji emojibase-data
    pip install resvg-py
    python data/make_emoji.py FOLDER      # the folder with the four .tgz files

Every picture is `key.webp`, 64×64 on white, with `key.txt` and `key.json`. The lines of a `.txt` are captions, of which
each use of the picture draws one: half of them leave the style open. The `.json` holds the name, style, category, skin
tone and source; `weight`, the share of the passes over the shard that use the picture, which makes all names equally
frequent although people come in up to 26 skin tones; and `held_out`, "tone" or "style" for the pairs kept for
evaluation, of which each part is seen in other pictures. The shard is compressed, as half of a tar of small files is
empty.
"""

import argparse
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE = 64
PACKAGES = {"noto": "emoji-datasource-google", "twemoji": "emoji-datasource-twitter", "fluent": "fluentui-emoji"}
NAMES = "emojibase-data"  # names by Unicode's CLDR, which mend the standard's: "red", not "heavy black heart"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HELD_OUT_TONES, HELD_OUT_STYLES = 60, 40


@dataclass
class Emoji:
    """One character of Unicode, in one skin tone."""

    name: str  # in plain words, without the tone
    tone: str  # "dark skin tone", or "" for the yellow default
    aliases: tuple[str, ...]
    category: str
    code: str  # as "1f469-1f3ff-200d-1f680"


class Package:
    """The files of one .tgz that npm packed."""

    def __init__(self, folder, name):
        (path,) = folder.glob(f"{name}-[0-9]*.tgz")
        self.name = path.stem
        self.files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                if "/img/" not in member.name or re.search(r"/img/\w+/64/", member.name):  # no sprite sheets
                    self.files[member.name.removeprefix("package/")] = (
                        member.isfile() and tar.extractfile(member).read()
                    )

    def json(self, path):
        return json.loads(self.files[path])


def plain(label):
    """A name of CLDR as one would say it: "flag: Côte d’Ivoire" → "flag of côte d'ivoire"."""
    label = label.lower().replace("’", "'").replace("“", "").replace("”", "").replace("!", "")
    label = re.sub(r"^flag: ", "flag of ", label).replace("keycap: ", "keycap ")
    if re.search(r"o'clock$|-thirty$", label):
        label = f"clock at {label}"
    return label.replace(": ", ", ")


def tone_of(label, base):
    """What the label of a variation adds to its base: the skin tones, in words."""
    tones = re.findall(r"(medium-light|medium-dark|light|medium|dark) skin tone", label.removeprefix(base))
    return " and ".join(tones) + " skin tone" if tones else ""


def read_emoji(names, datasource):
    """Every emoji that Unicode names, from emojibase-data, with other names from emoji-datasource → list of Emoji."""
    short_names = {key(entry["unified"]): entry["short_names"] for entry in datasource.json("emoji.json")}
    categories = {key(entry["unified"]): entry["category"] for entry in datasource.json("emoji.json")}
    taken = Counter(plain(entry["label"]) for entry in names.json("en/data.json"))
    emoji = []
    for entry in names.json("en/data.json"):
        code, name = key(entry["hexcode"]), plain(entry["label"])
        if code not in categories or categories[code] == "Component":
            continue
        others = (n.replace("_", " ").replace("-", " ") for n in short_names[code])
        aliases = tuple(n for n in others if re.fullmatch(r"[a-z]{3,}( [a-z]{2,})*", n) and n != name and not taken[n])
        aliases = tuple(n for n in aliases if not n.startswith("flag "))
        for variation in (entry, *entry.get("skins", ())):
            tone = tone_of(variation["label"], entry["label"])
            emoji.append(Emoji(name, tone, aliases, categories[code], key(variation["hexcode"])))
    return emoji


def key(code):
    """A sequence of code points without the selector of emoji presentation, which the packages set differently."""
    return code.lower().replace("-fe0f", "")


def datasource_pictures(package):
    """{code: PNG} of an emoji-datasource package."""
    return {key(Path(path).stem): data for path, data in package.files.items() if path.endswith(".png")}


def fluent_pictures(package, emoji):
    """{code: SVG} of fluentui-emoji, whose files are named by CLDR: "woman-astronaut-medium-dark.svg"."""
    pictures = {}
    for e in emoji:
        slug = re.sub(r"[^a-z0-9]+", "-", e.name.replace("'", "")).strip("-")
        tone = e.tone.removesuffix(" skin tone") or "default"
        for stem in (slug, f"{slug}-{tone}") if not e.tone else (f"{slug}-{tone}",):
            if data := package.files.get(f"icons/modern/{stem}.svg"):
                pictures[e.code] = data
    return pictures


def rasterize(data):
    """A PNG or SVG → RGB, SIZE × SIZE, on white."""
    if data.lstrip()[:4] in (b"<svg", b"<?xm"):
        import resvg_py  # here, as nothing else needs it

        data = resvg_py.svg_to_bytes(svg_string=data.decode(), width=4 * SIZE, height=4 * SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def captions(emoji, style):
    """The lines of a .txt: half without the style; where there are other names, one line in four is such a one."""
    aliases = emoji.aliases[:1]
    lines = [emoji.name] * (3 if aliases else 1) + list(aliases)
    lines = [f"{line}, {emoji.tone}" if emoji.tone else line for line in lines]
    return lines + [f"{line}, {style} style" for line in lines]


def hold_out(pairs, rng):
    """{(code, style): "tone" or "style"} of some pairs; each name, tone and style is seen in other pictures."""
    variations, styles = defaultdict(list), defaultdict(list)
    for e, style in pairs:
        styles[e.code].append(style)
        if e.tone in [f"{tone} skin tone" for tone in TONES] and e.code not in variations[e.name]:
            variations[e.name].append(e.code)
    toned = [name for name, codes in variations.items() if len(codes) == len(TONES)]
    single = [e.code for e, _ in pairs if e.name not in variations and len(styles[e.code]) == len(PACKAGES)]
    single = list(dict.fromkeys(single))
    held_out = {}
    for name in rng.choice(toned, HELD_OUT_TONES, replace=False):
        code = rng.choice(variations[name])
        held_out |= {(code, style): "tone" for style in styles[code]}
    for code in rng.choice(single, HELD_OUT_STYLES, replace=False):
        held_out[code, rng.choice(styles[code])] = "style"
    return held_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the .tgz files of the four packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji.tar.gz")
    args = parser.parse_args()
    packages = {style: Package(args.folder, name) for style, name in PACKAGES.items()}
    emoji = read_emoji(Package(args.folder, NAMES), packages["noto"])
    pictures = {
        "noto": datasource_pictures(packages["noto"]),
        "twemoji": datasource_pictures(packages["twemoji"]),
        "fluent": fluent_pictures(packages["fluent"], emoji),
    }
    pairs = [(e, style) for e in emoji for style in PACKAGES if e.code in pictures[style]]
    rng = np.random.default_rng(0)
    held_out = hold_out(pairs, rng)
    of_name, styles = Counter(e.name for e, _ in pairs), defaultdict(set)
    for e, style in pairs:
        styles[e.name].add(style)
    with tarfile.open(args.out, "w:gz") as tar:
        for number, index in enumerate(tqdm(rng.permutation(len(pairs)), desc="rasterizing", unit="picture")):
            e, style = pairs[index]
            webp = io.BytesIO()
            rasterize(pictures[style][e.code]).save(webp, "WEBP", quality=90, method=6)
            facts = {name: value for name, value in asdict(e).items() if name != "aliases"}
            facts |= {"style": style, "source": packages[style].name, "held_out": held_out.get((e.code, style))}
            facts["weight"] = round(len(styles[e.name]) / of_name[e.name], 4)
            text = "\n".join(captions(e, style)) + "\n"
            parts = {"webp": webp.getvalue(), "txt": text.encode(), "json": json.dumps(facts).encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    counts = Counter(style for _, style in pairs)
    print(f"{len(pairs)} pictures, {dict(counts)}, of {len(of_name)} names; held out: {Counter(held_out.values())}")


if __name__ == "__main__":
    main()
