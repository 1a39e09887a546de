"""Labels that are probably wrong: confident learning (Northcutt, Jiang and Chuang 2021).

A network that has not seen an image in training, and is as sure that it is of another class as
it usually is of images that have that label, casts doubt on the label.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

# Probabilities that differ by less are equal: float32 carries seven digits.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Suspects:
    """Examples whose label is probably wrong, the most suspicious first.

    Attributes:
      rows: Their positions.
      suggested: The class that each of them probably has.
      margin: Probability of the label less that of the likeliest other class, below 0.
    """

    rows: Int[np.ndarray, " suspects"]
    suggested: Int[np.ndarray, " suspects"]
    margin: Float[np.ndarray, " suspects"]


def thresholds(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " classes"]:
    """How sure the network is, on average, of the class of images that have its label.

    Infinite for a class without images, of which nobody can say what sure means.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, own, num_classes)
    return np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)


def find(probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> Suspects:
    """The off-diagonal of the confident joint, ranked by normalised margin.

    Args:
      probabilities: Of images that were not trained on; rows sum to 1.
      labels: What the data says they are.
    """
    rows = np.arange(len(labels))
    is_sure = probabilities >= thresholds(probabilities, labels) - _TOLERANCE
    suggested = np.where(is_sure, probabilities, -1.0).argmax(axis=1)
    others = probabilities.astype(np.float64)
    others[rows, labels] = -1
    margin = probabilities[rows, labels] - others.max(axis=1)
    # Of a label that is the likeliest class after all nobody need think twice.
    is_suspect = is_sure.any(axis=1) & (suggested != labels) & (margin < 0)
    suspects = np.flatnonzero(is_suspect)
    suspects = suspects[np.argsort(margin[suspects], kind="stable")]
    return Suspects(suspects, suggested[suspects], margin[suspects])
