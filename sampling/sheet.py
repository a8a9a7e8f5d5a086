"""Pictures side by side as one image, which feature point is where in it, and SVG to lay over it."""

import base64
import io
import math
from typing import NamedTuple

from PIL import Image

from sampling.pictures import COLORS

GAP = 2  # pixels between pictures


class Point(NamedTuple):
    """A feature point of a picture."""

    picture: int
    index: int  # in N


class Sheet(NamedTuple):
    """`num` pictures of side × side pixels, in about as many rows as columns."""

    num: int
    side: int

    @property
    def columns(self):
        return math.ceil(math.sqrt(self.num))

    @property
    def size(self):
        rows = -(-self.num // self.columns)
        return tuple(count * (self.side + GAP) - GAP for count in (self.columns, rows))

    def corner(self, picture):
        """The pixel that is the left upper corner of a picture."""
        row, column = divmod(picture, self.columns)
        return column * (self.side + GAP), row * (self.side + GAP)

    def point_at(self, x, y, points_a_side):
        """The Point at a pixel, in the router's grid of points_a_side²; None between the pictures."""
        (column, x), (row, y) = (divmod(value, self.side + GAP) for value in (x, y))
        picture = int(row) * self.columns + int(column)
        if not (0 <= column < self.columns and 0 <= picture < self.num and x < self.side and y < self.side):
            return None
        cell = self.side / points_a_side
        return Point(picture, int(y / cell) * points_a_side + int(x / cell))

    def joined(self, pictures):
        """PIL images → one, as a data URL."""
        sheet = Image.new("RGB", self.size, "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, self.corner(i))
        file = io.BytesIO()
        sheet.save(file, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def squares(self, mask):
        """A mask of feature points [num, N] → the outline of all of them, as an SVG path has it."""
        points_a_side = round(mask.shape[1] ** 0.5)
        cell = self.side / points_a_side
        path = []
        for picture, index in mask.nonzero().tolist():
            (left, top), (row, column) = self.corner(picture), divmod(index, points_a_side)
            path.append(f"M{left + column * cell:g} {top + row * cell:g}h{cell:g}v{cell:g}h-{cell:g}z")
        return "".join(path)

    def experts(self, expert_index, num_experts, seen=None):
        """Who took each point [num, N], in the experts' colors; the points of the expert `seen` stand out."""
        return "".join(
            f'<path d="{self.squares(expert_index == expert)}" fill="{COLORS[expert % len(COLORS)]}" '
            f'fill-opacity="{0.4 if seen is None else 0.7 if expert == seen else 0.1}"/>'
            for expert in range(num_experts)
        )

    def marks(self, mask):
        """A frame around each of some points [num, N]."""
        path, width = self.squares(mask), self.side / 64
        return "".join(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{thickness * width:g}"/>'
            for color, thickness in (("black", 2), ("white", 1))
        )

    def picked(self, picture):
        """A frame around a whole picture."""
        (left, top), side = self.corner(picture), self.side
        return f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="black"/>'
