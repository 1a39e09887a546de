"""Draws a saliency map over its image."""

import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import view

# The weight of the map's colours when they are blended with the image. The weight of the image is 1
# minus this value.
_OPACITY = 0.55
# The brightness of the image outside the network's input is multiplied by this factor.
_UNSEEN_BRIGHTNESS = 0.4


def draw_overlay(
    image: Image.Image,
    values: Float[np.ndarray, "height width"],
    preprocessing: Preprocessing | None = None,
) -> Image.Image:
    """Draws a saliency map over a grey version of its image.

    Args:
      image: The whole image in any resolution.
      values: The map of the network's input. Its smallest value gets the first colour and its
        largest value the last.
      preprocessing: The preprocessing from the image to the network's input. The map is drawn
        on the part of the image that the network saw; the rest of the image is darkened. None
        if the image is the network's input.

    Returns:
      An RGB image of the size of `image`.
    """
    value_range = float(np.ptp(values))
    levels = np.rint(255 * (values - values.min()) / (value_range or 1.0)).astype(np.uint8)
    grey = image.convert("L").convert("RGB")
    box = (0, 0, image.width, image.height)
    if preprocessing is not None:
        seen = view((image.height, image.width), preprocessing)
        left, top, right, bottom = seen.input_box
        levels = levels[top:bottom, left:right]
        left, top, right, bottom = map(round, seen.image_box)
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
    stretched = Image.fromarray(levels).resize(
        (box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR
    )
    colours = Image.fromarray(_colour_table()[np.asarray(stretched)])
    overlay = grey.point(lambda level: level * _UNSEEN_BRIGHTNESS)
    overlay.paste(Image.blend(grey.crop(box), colours, _OPACITY), box[:2])
    return overlay


@functools.cache
def _colour_table() -> UInt8[np.ndarray, "256 3"]:
    """Returns the RGB colours for the levels 0 to 255 of a map."""
    # Matplotlib is imported here, so that a server without maps does not load Matplotlib.
    import matplotlib

    return np.rint(255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).astype(np.uint8)
