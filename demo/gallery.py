"""The bundled images: ``python -m demo.gallery`` composes them again from held-out scans."""

from pathlib import Path

import numpy as np
from PIL import Image

from demo import pictures, scans

FOLDER = Path(__file__).with_name("pictures")
PICTURES = {  # name: seed, rows and columns, whether digits are scattered
    "grid.png": (4, (3, 4), False),
    "scattered.png": (19, (4, 5), True),
    "pens.png": (6, (3, 4), False),
}
ENLARGED = 2  # easier on human eyes; the processor shrinks them again


def compose(name: str) -> pictures.Picture:
    """One of PICTURES."""
    seed, grid, loose = PICTURES[name]
    rng, pool = np.random.default_rng(seed), scans.load("held_out")
    plan = pictures.make_plan(rng, pool, loose, grid)
    height, width = plan.size
    size = (ENLARGED * int(height), ENLARGED * int(width))
    return pictures.draw(rng, pool, pictures.scaled(plan, size))


def main() -> None:
    """Write every image to ``demo/pictures``."""
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        Image.fromarray(compose(name).pixels).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
