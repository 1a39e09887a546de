"""A map over the image that it explains."""

import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# The weight of a map's colours over the image.
_OPACITY = 0.55


def under_map(image: Image.Image, values: Float[np.ndarray, "height width"]) -> Image.Image:
    """An image in grey under the colours of a map, from its least value to its largest.

    The map is of the image as the network saw it, stretched to another shape.
    """
    reach = float(np.ptp(values))
    levels = np.rint(255 * (values - values.min()) / (reach or 1.0)).astype(np.uint8)
    stretched = Image.fromarray(levels).resize(image.size, Image.Resampling.BILINEAR)
    over = Image.fromarray(_colours()[np.asarray(stretched)])
    return Image.blend(image.convert("L").convert("RGB"), over, _OPACITY)


@functools.cache
def _colours() -> UInt8[np.ndarray, "256 3"]:
    """Of the levels of a map, from its least value to its largest."""
    import matplotlib  # Who draws no map need not load it.

    return np.rint(255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).astype(np.uint8)
