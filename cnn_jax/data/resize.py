"""The project's only resize function, which converts an image to the network's input size.

Sizes and positions are those of torchvision and timm for "crop", and those of
ultralytics' LetterBox for "pad".
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cnn_jax.data.preprocessing import Preprocessing

# Because of the underscores, jaxtyping lets two images in one signature differ in size.
Pixels = UInt8[np.ndarray, "_height _width 3"]

# The grey level of the padding around an image, as in ultralytics. It is close to the mean pixel
# value of photographs (0.449 * 255 in ImageNet), so the padding is close to 0 after normalization.
PADDING = 114
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# If the scaled image would have more pixels than this number, only its visible part is computed.
# For example, an image of 1 x 1,000,000 pixels could become an image of 224 x 224,000,000 pixels.
_MAX_SCALED_PIXELS = 2**24
# The largest radius of a resampling filter. The unit is a pixel of the output if the image is
# reduced, and a pixel of the image if it is enlarged.
_SUPPORT = 2

# A rectangle (left, top, right, bottom) in pixels.
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class View:
    """The visible part of an image, and the position of this part in the network's input.

    Attributes:
      image_box: The box of the visible part in the image.
      input_box: The box of the visible part in the network's input. Padding lies outside the box.
    """

    image_box: Box
    input_box: tuple[int, int, int, int]


def view(size: tuple[int, int], preprocessing: Preprocessing) -> View:
    """Returns the part of an image that the network sees; `size` is the image's (height, width)."""
    (scaled_height, scaled_width), (top, left) = _scaled_size_and_offset(size, preprocessing)
    y_range = _visible_range(size[0], scaled_height, top, preprocessing.image_size[0])
    x_range = _visible_range(size[1], scaled_width, left, preprocessing.image_size[1])
    (y_image, y_input), (x_image, x_input) = y_range, x_range
    return View(
        image_box=(x_image[0], y_image[0], x_image[1], y_image[1]),
        input_box=(x_input[0], y_input[0], x_input[1], y_input[1]),
    )


def resize(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Resizes an image to `preprocessing.image_size` with the method `preprocessing.resize`.

    Args:
      image: uint8 [height, width, 3] of any size.
      preprocessing: `image_size`, `resize`, `crop_ratio` and `interpolation` are used.

    Returns:
      uint8 [height, width, 3]; the image itself if it already has the size and is not
      scaled.
    """
    height, width = preprocessing.image_size
    scaled, (top, left) = _scaled_size_and_offset(image.shape[:2], preprocessing)
    if scaled == image.shape[:2] == (height, width):
        return image
    interpolation = _FILTERS[preprocessing.interpolation]
    if math.prod(scaled) > _MAX_SCALED_PIXELS and preprocessing.resize == "crop":
        return _crop_and_scale(image, preprocessing)
    pixels = np.asarray(Image.fromarray(image).resize((scaled[1], scaled[0]), interpolation))
    if scaled == (height, width):
        return pixels
    if preprocessing.resize == "crop":
        return np.ascontiguousarray(pixels[-top : height - top, -left : width - left])
    padded = np.full((height, width, 3), PADDING, np.uint8)
    padded[top : top + scaled[0], left : left + scaled[1]] = pixels
    return padded


def _scaled_size_and_offset(
    size: tuple[int, ...], preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the (height, width) and (top, left) of the scaled image in the network's input.

    The offset is negative where the scaled image is cropped.
    """
    height, width = preprocessing.image_size
    if preprocessing.resize == "stretch":
        return (height, width), (0, 0)
    if preprocessing.resize == "pad":
        scale = min(height / size[0], width / size[1])
        scaled = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
        # If the number of padding rows or columns is odd, the extra row or column is at the bottom
        # or right.
        return scaled, ((height - scaled[0]) // 2, (width - scaled[1]) // 2)
    covered_height = math.floor(height / preprocessing.crop_ratio)
    covered_width = math.floor(width / preprocessing.crop_ratio)
    if covered_height * size[1] >= covered_width * size[0]:
        scaled = covered_height, covered_height * size[1] // size[0]
    else:
        scaled = covered_width * size[0] // size[1], covered_width
    # Python's `round` rounds a half to the nearest even number, and so does torchvision's
    # CenterCrop.
    return scaled, (-round((scaled[0] - height) / 2), -round((scaled[1] - width) / 2))


def _visible_range(
    side: int, scaled: int, offset: int, input_side: int
) -> tuple[tuple[float, float], tuple[int, int]]:
    """Returns the visible range of one axis, first in the image, then in the network's input."""
    start, stop = max(offset, 0), min(offset + scaled, input_side)
    return ((start - offset) * side / scaled, (stop - offset) * side / scaled), (start, stop)


def _crop_and_scale(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Scales only the visible part of an image.

    Except for rounding, the result is the same as if the whole image were scaled and cropped.
    """
    left, top, right, bottom = view((image.shape[0], image.shape[1]), preprocessing).image_box
    height, width = preprocessing.image_size
    x_margin = math.ceil(_SUPPORT * max((right - left) / width, 1)) + 1
    y_margin = math.ceil(_SUPPORT * max((bottom - top) / height, 1)) + 1
    # Pillow's boxes are float32, which cannot represent fractions of large numbers. So positions
    # are relative to the start of the part that is read.
    x_start, y_start = max(math.floor(left) - x_margin, 0), max(math.floor(top) - y_margin, 0)
    x_stop, y_stop = math.ceil(right) + x_margin, math.ceil(bottom) + y_margin
    part = Image.fromarray(np.ascontiguousarray(image[y_start:y_stop, x_start:x_stop]))
    box = (left - x_start, top - y_start, right - x_start, bottom - y_start)
    return np.asarray(part.resize((width, height), _FILTERS[preprocessing.interpolation], box=box))
