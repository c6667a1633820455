"""Draws `examples/data/shapes/<class>/*.png`: 20 images each of a disc, a square and a triangle. Needs Pillow."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 32
HERE = Path(__file__).parent / "shapes"


def draw(kind: str, drawn: random.Random) -> Image.Image:
    """One shape of any colour, size and place on a background of another colour."""
    back, front = drawn.sample([(r, g, b) for r in (30, 130, 230) for g in (30, 130, 230) for b in (30, 130, 230)], 2)
    image = Image.new("RGB", (SIDE, SIDE), back)
    size = drawn.randint(10, 20)
    x, y = drawn.randint(2, SIDE - size - 3), drawn.randint(2, SIDE - size - 3)
    pen = ImageDraw.Draw(image)
    if kind == "disc":
        pen.ellipse((x, y, x + size, y + size), fill=front)
    elif kind == "square":
        pen.rectangle((x, y, x + size, y + size), fill=front)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=front)
    return image


if __name__ == "__main__":
    drawn = random.Random(0)
    for kind in ("disc", "square", "triangle"):
        (HERE / kind).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            draw(kind, drawn).quantize(4).save(HERE / kind / f"{number:02}.png", optimize=True)
