"""The preprocessing that converts an image of any size to the network's input."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Num

MAX_PIXELS = 50_000_000
RESIZES = ("stretch", "crop", "pad")
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The parameters of preprocessing, which are also stored in a bundle.

    Attributes:
      image_size: (height, width) of the network's input, in pixels.
      mean: The grey levels, 0 to 255, that are subtracted from R, G and B.
      std: The grey levels by which R, G and B are then divided.
      max_pixels: The largest width times height of an image that is decoded.
      white_level: The value that is white (grey level 255) in images of more than 8
        bits, of signed integers and of floats, such as 4095 or 1.0. 0: the largest
        value of the type, for unsigned integers of at most 16 bits; other types are
        refused. Images of 8 bits or fewer do not depend on it.
      resize: How an image becomes `image_size`; one of `RESIZES`. "stretch" changes its
        aspect ratio. "crop" scales it until it covers the size, and cuts out the centre.
        "pad" scales it until it fits, and fills the rest with grey.
      crop_ratio: For "crop" only, above 0 to 1: the side of the centre crop as a fraction
        of the side that the scaled image covers, as timm's `crop_pct`.
      interpolation: One of `INTERPOLATIONS`; the names of Pillow's filters, which apply
        antialiasing when an image is reduced.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    max_pixels: int = MAX_PIXELS
    white_level: float = 0.0
    resize: str = "stretch"
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"

    @classmethod
    def from_config(cls, data: Any) -> "Preprocessing":
        """Returns the parameters in the section `data` of a resolved configuration."""
        values: dict[str, Any] = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        tuples: dict[str, Any] = {
            name: tuple(values[name]) for name in ("image_size", "mean", "std")
        }
        return cls(**(values | tuples))


def unscaled(preprocessing: Preprocessing) -> Preprocessing:
    """Returns the preprocessing of images that already have the size of the network's input."""
    return dataclasses.replace(preprocessing, resize="stretch", crop_ratio=1.0)


# The default preprocessing: 224 x 224 pixels, and inputs in [-1, 1].
SPECIFICATION = Preprocessing()


def normalize(
    images: Num[Any, "batch height width 3"], preprocessing: Preprocessing
) -> Float[Any, "batch height width 3"]:
    """Returns (images - mean) / std in float32; the images are in grey levels, 0 to 255.

    The images are an array of JAX or NumPy, and so is the result.
    """
    parameters = np.array([preprocessing.mean, preprocessing.std], np.float32)
    mean, std = parameters.reshape(2, 1, 1, 1, 3)
    return (images.astype(np.float32) - mean) / std
