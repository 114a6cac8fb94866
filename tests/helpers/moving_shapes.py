"""Makes videos whose class is the direction of a movement, so that classes differ only in the order of frames.

Every clip of one class is a clip of the opposite class played backwards: no frame and no set of frames separates them.
"""

import math
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

OPPOSITES = {"right": "left", "clockwise": "counter"}  # class -> class of the same clip played backwards
FRAMES, SIDE = 8, 64
Frames = list[Image.Image]


def draw_clip(motion: str, draw: np.random.Generator) -> Frames:
    """A bright disc that leaves at the right and enters at the left again, or moves clockwise on a circle."""
    color, background = draw.integers(200, 256, 3), draw.integers(0, 40, 3)
    start, speed, radius = draw.uniform(0, 1), draw.uniform(0.1, 0.15), draw.uniform(9, 11)
    height, orbit = draw.uniform(0.25, 0.75) * SIDE, draw.uniform(14, 20)
    frames = []
    for turn in start + speed * np.arange(FRAMES):
        place = turn % 1 * SIDE, height
        if motion == "clockwise":  # the y axis points down
            place = SIDE / 2 + orbit * math.cos(2 * math.pi * turn), SIDE / 2 + orbit * math.sin(2 * math.pi * turn)
        frames.append(_disc(*place, radius, tuple(color.tolist()), tuple(background.tolist())))
    return frames


def _disc(x: float, y: float, radius: float, color: tuple[int, ...], background: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), background)
    for center in (x - SIDE, x, x + SIDE):  # a part that leaves on one side enters on the other
        ImageDraw.Draw(image).ellipse((center - radius, y - radius, center + radius, y + radius), fill=color)
    return image


def write_clip(path: Path, frames: Frames) -> None:
    """Write H.264 with no loss but that of yuv420p: artifacts of previous frames would reveal the order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES, options={"qp": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def write_videos(root: Path, train: int, test: int) -> Path:
    """Write root/<split>/<class>/<number>.mp4; opposite classes have the same frames under the same number.

    Args:
        root: the folder.
        train: number of training videos of every class.
        test: number of test videos of every class.
    """
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            for motion, backwards in OPPOSITES.items():
                frames = draw_clip(motion, draw)
                write_clip(root / split / motion / f"{number:03}.mp4", frames)
                write_clip(root / split / backwards / f"{number:03}.mp4", frames[::-1])
    return root
