"""Statistics of an image that need no network: brightness, sharpness and contrast."""

import numpy as np
from jaxtyping import UInt8


def image_statistics(image: UInt8[np.ndarray, "height width 3"]) -> tuple[float, float, float]:
    """Returns the brightness, the sharpness and the contrast of an image.

    The request log and the reference statistics of a bundle both use this function, so that their
    values can be compared.

    Returns:
      The mean of the grey levels, 0 to 255; the standard deviation of the Laplacian of the grey
      levels; and the standard deviation of the grey levels.
    """
    import cv2  # Prediction must not import OpenCV, whose import takes long.

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    brightness, contrast = cv2.meanStdDev(grey)
    _, sharpness = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return brightness.item(), sharpness.item(), contrast.item()
