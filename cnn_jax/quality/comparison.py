"""The result of a comparison of two classifiers, in a module that is quick to import."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of a candidate with a reference classifier on the same images.

    Attributes:
      is_not_worse: The decision: the score test passes, and no class is worse.
      images: The number of images.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
      level: The level of both tests.
      candidate_correct: The number of images that the candidate classifies correctly.
      reference_correct: The number of images that the reference classifies correctly.
      gains: The number of images that only the candidate classifies correctly.
      losses: The number of images that only the reference classifies correctly.
      p_value: The p-value of the score test.
      worse_classes: The classes in which the candidate is worse than the reference.
      classes: The number of images, gains and losses of each class with gains or losses.
      images_needed: The number of images with which an equal candidate passes the score test 80 %
        of the time, if the same fraction of the images is a gain or a loss.
    """

    is_not_worse: bool
    images: int
    margin: float
    level: float
    candidate_correct: int
    reference_correct: int
    gains: int
    losses: int
    p_value: float
    worse_classes: tuple[str, ...]
    classes: dict[str, tuple[int, int, int]]
    images_needed: int
