"""Confident learning (Northcutt, Jiang and Chuang 2021): finds labels that are probably wrong.

A label is suspect if a network that was not trained on the image predicts another class with at
least the mean confidence that it has for images of that class.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

# Probabilities count as equal if they differ by less than this value, because float32 has only
# about seven significant digits.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Suspects:
    """The examples whose label is probably wrong, from the most to the least suspicious.

    Attributes:
      rows: The positions of the examples.
      suggested: The class that each example probably has.
      margin: The probability of the label minus that of the most probable other class; below 0.
    """

    rows: Int[np.ndarray, " suspects"]
    suggested: Int[np.ndarray, " suspects"]
    margin: Float[np.ndarray, " suspects"]


def thresholds(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " classes"]:
    """Returns the mean probability of each class over the images with the label of this class.

    The function `find` uses these means as thresholds. The threshold of a class without images is
    infinite, so that the class is never suggested.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, own, num_classes)
    return np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)


def find(probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> Suspects:
    """Finds the examples whose label is probably wrong, and sorts them by normalised margin.

    These are the off-diagonal examples of the confident joint in the paper.

    Args:
      probabilities: The predictions of a network that was not trained on these images; each row
        sums to 1.
      labels: The labels in the data.
    """
    rows = np.arange(len(labels))
    is_sure = probabilities >= thresholds(probabilities, labels) - _TOLERANCE
    suggested = np.where(is_sure, probabilities, -1.0).argmax(axis=1)
    others = probabilities.astype(np.float64)
    others[rows, labels] = -1
    margin = probabilities[rows, labels] - others.max(axis=1)
    # If the margin is above 0, the label is the most probable class, so the label is not suspect.
    is_suspect = is_sure.any(axis=1) & (suggested != labels) & (margin < 0)
    suspects = np.flatnonzero(is_suspect)
    suspects = suspects[np.argsort(margin[suspects], kind="stable")]
    return Suspects(suspects, suggested[suspects], margin[suspects])
