"""A map drawn over its image."""

import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# The weight of the map's colours; the image has the rest.
_OPACITY = 0.55


def draw_overlay(image: Image.Image, values: Float[np.ndarray, "height width"]) -> Image.Image:
    """Draws a map over the grey version of its image.

    Args:
      image: The image in its own resolution.
      values: The map. It is stretched to the image's size. Its smallest value gets the first
        colour and its largest value the last.

    Returns:
      An RGB image of the size of `image`.
    """
    value_range = float(np.ptp(values))
    levels = np.rint(255 * (values - values.min()) / (value_range or 1.0)).astype(np.uint8)
    stretched = Image.fromarray(levels).resize(image.size, Image.Resampling.BILINEAR)
    colours = Image.fromarray(_colour_table()[np.asarray(stretched)])
    return Image.blend(image.convert("L").convert("RGB"), colours, _OPACITY)


@functools.cache
def _colour_table() -> UInt8[np.ndarray, "256 3"]:
    """The colours of the levels 0 to 255 of a map."""
    import matplotlib  # Imported here because a server that draws no maps need not load it.

    return np.rint(255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).astype(np.uint8)
