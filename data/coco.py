"""COCO for evaluation. The field uses one caption of each of 30,000 images of the 2014 validation set."""

import collections
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import center_crop

from common.cli import UserError, first_line
from data.pairs import FORMATS, to_tensor
from data.sources import Source

RESIZER = f"centre crop, then Pillow's Lanczos (Pillow {Image.__version__})"


class Coco(Source):
    """Random images of COCO 2014 val with one random caption each: `count` different images, then up to as many others,
    for the distance between two sets of real images. For evaluation only.

    annotations: captions_val2014.json. folder: of the images, by default val2014 next to the folder of the JSON. Raises
    UserError for a file of another kind or split, and for missing images.
    """

    def __init__(self, annotations, folder, resolution, count, seed):
        super().__init__(str(annotations), resolution, seed)
        folder, rng = Path(folder or Path(annotations).parent.parent / "val2014"), np.random.default_rng(seed)
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8-sig"))
            names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
            captions = collections.defaultdict(list)
            for annotation in content["annotations"]:
                captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
            chosen = rng.permutation(sorted(captions))[: 2 * count]
            self.pairs = [(folder / names[i], str(rng.choice(captions[i]))) for i in chosen]
        except OSError as error:
            raise UserError(f"--data {annotations} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"--data {annotations} is not a captions file in COCO's format ({first_line(error)})"
            raise UserError(f"{message}; use captions_val2014.json") from error
        if any("val2014" not in name for name in names.values()):
            raise UserError(f"--data {annotations} is not of COCO 2014 val; use captions_val2014.json")
        if missing := next((path for path, _ in self.pairs if not path.is_file()), None):
            raise UserError(f"no image {missing}; download it again, or name the folder val2014 with --images")

    def examples(self, held_out=False, rank=0, world_size=1):
        for path, caption in () if held_out else self.pairs[rank::world_size]:
            yield read_image(path, self.resolution), [caption]


def read_image(path, resolution):
    """An image file → its centre square [3, R, R] in [−1, 1]. Smaller images are enlarged, as in the field."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            square = center_crop(image.convert("RGB"), min(image.size))
    except Exception as error:  # on broken files Pillow raises errors of every kind
        raise UserError(f"{path} cannot be read as an image ({first_line(error)}); download it again") from error
    return to_tensor(square.resize((resolution, resolution), Image.Resampling.LANCZOS))
