"""MixUp and CutMix: an image and its label are mixed with another example of the batch.

MixUp (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2) blends
two images. CutMix (Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong
Classifiers with Localizable Features", section 3.1) replaces a box of one image by the same
box of the other. In both, the label becomes a distribution over classes, in the proportion
of the images.

This module draws the method and the proportion for each example; the authors' programs draw them
once per batch. The partner of an example is the example before it in the batch, which is random
because the stream is shuffled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The probabilities and the Beta distributions of MixUp and CutMix.

    Attributes:
      mixup_probability: The probability that an example is mixed by MixUp, 0 to 1.
      mixup_alpha: The weight of an example is drawn from Beta(alpha, alpha), alpha > 0. Near
        0 the weight is nearly 0 or 1; with 1 it is uniform; above 1 it is near 1/2.
      cutmix_probability: The probability that an example is mixed by CutMix; at most
        1 - mixup_probability.
      cutmix_alpha: The same as `mixup_alpha`, for CutMix.
    """

    mixup_probability: float = 0.0
    mixup_alpha: float = 0.2
    cutmix_probability: float = 0.0
    cutmix_alpha: float = 1.0

    @classmethod
    def from_config(cls, augment: Any) -> "Mixing":
        """Creates a `Mixing` from the section `augment` of a configuration.

        Missing keys get their defaults.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: augment[name] for name in names if name in augment})

    def is_identity(self) -> bool:
        """Returns whether no example is mixed."""
        return self.mixup_probability == self.cutmix_probability == 0

    def describe(self) -> str:
        """Returns a description such as "MixUp of 50% (alpha 0.2)"; "" if no example is mixed."""
        methods = (
            ("MixUp", self.mixup_probability, self.mixup_alpha),
            ("CutMix", self.cutmix_probability, self.cutmix_alpha),
        )
        return ", ".join(
            f"{name} of {100 * probability:g}% (alpha {alpha:g})"
            for name, probability, alpha in methods
            if probability
        )


NO_MIXING = Mixing()


class Draws(NamedTuple):
    """The random parameters of MixUp and CutMix for each example of a batch.

    Attributes:
      is_mixup: bool [B], whether the example is mixed by MixUp.
      is_cutmix: bool [B], whether the example is mixed by CutMix; never both.
      share: float32 [B], 0 to 1, the weight of the example itself; lambda in the papers.
      centre: float32 [B, 2], y and x of the centre of CutMix's box, 0 to 1.
    """

    is_mixup: Bool[Array, " batch"]
    is_cutmix: Bool[Array, " batch"]
    share: Float[Array, " batch"]
    centre: Float[Array, "batch 2"]


def draw(key: PRNGKeyArray, mixing: Mixing, batch_size: int) -> Draws:
    """Draws the random parameters of one batch, independently for each example.

    Args:
      key: The random key of this batch.
      mixing: The probabilities and proportions.
      batch_size: The number of examples, B.
    """
    for_method, for_share, for_centre = jax.random.split(key, 3)
    number = jax.random.uniform(for_method, (batch_size,))
    is_mixup = number < mixing.mixup_probability
    is_mixed = number < mixing.mixup_probability + mixing.cutmix_probability
    alpha = jnp.where(is_mixup, mixing.mixup_alpha, mixing.cutmix_alpha)
    # A Beta distribution is a Dirichlet distribution with two components. JAX compiles `dirichlet`
    # faster than `beta`.
    share = jax.random.dirichlet(for_share, jnp.stack([alpha, alpha], axis=1))[:, 0]
    return Draws(
        is_mixup=is_mixup,
        is_cutmix=is_mixed & ~is_mixup,
        share=share,
        centre=jax.random.uniform(for_centre, (batch_size, 2)),
    )


def cutmix_weights(
    share: Float[Array, " batch"], centre: Float[Array, "batch 2"], image_size: tuple[int, int]
) -> Float[Array, "batch height width"]:
    """Returns the weight of the partner image in each pixel for CutMix: 1 inside the box, else 0.

    The box's height and width are sqrt(1 - share) of the image's, so the box covers 1 - share
    of the pixels, or fewer if it extends over the border. A pixel is inside the box if its centre
    is.

    Args:
      share: The weight of the example itself, 0 to 1.
      centre: y and x of the centre of the box, as fractions of the height and the width.
      image_size: (height, width) in pixels.
    """
    side = jnp.sqrt(1 - share)[:, None]

    def is_within(axis: int) -> Bool[Array, "batch pixels"]:
        pixels = image_size[axis]
        middles = (jnp.arange(pixels)[None] + 0.5) / pixels
        return jnp.abs(middles - centre[:, axis, None]) < side / 2

    return (is_within(0)[:, :, None] & is_within(1)[:, None, :]).astype(jnp.float32)


def partner_weights(
    draws: Draws, image_size: tuple[int, int]
) -> Float[Array, "batch height width"]:
    """Returns the weight of the partner image in each pixel, 0 to 1; exactly 0 without mixing."""
    cutmix = cutmix_weights(draws.share, draws.centre, image_size)
    weights = jnp.where(draws.is_cutmix[:, None, None], cutmix, 0)
    # The weight of MixUp is equal in all pixels.
    return jnp.where(draws.is_mixup[:, None, None], (1 - draws.share)[:, None, None], weights)


def blend(
    images: Float[Array, "batch height width channel"],
    targets: Float[Array, "batch classes"],
    weights: Float[Array, "batch height width"],
) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch classes"]]:
    """Mixes each example with the example before it, and the first example with the last.

    Args:
      images: float32, in any range.
      targets: The probability of each class.
      weights: The partner's weight in each pixel, 0 to 1.

    Returns:
      The mixed images and the mixed targets. The weight of the partner's target is the mean of
      `weights`; under CutMix, that is the fraction of pixels that come from the partner.
      An example whose weights are 0 is unchanged, bit for bit.
    """
    partner_share = jnp.mean(weights, axis=(1, 2))
    return (
        _with_row_before(images, weights[..., None]),
        _with_row_before(targets, partner_share[:, None]),
    )


def _with_row_before(rows: Array, weights: Array) -> Array:
    """Returns (1 - weight) * row + weight * previous row for each row."""
    return (1 - weights) * rows + weights * jnp.roll(rows, 1, axis=0)


def mix_batch(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channel"],
    targets: Float[Array, "batch classes"],
    mask: Bool[Array, " batch"],
    mixing: Mixing,
) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch classes"]]:
    """Draws the random parameters of one batch, and mixes the examples of the batch.

    Args:
      key: The random key of this batch.
      images: float32, in any range.
      targets: float32, the probability of each class.
      mask: True for examples, False for padding. No example is mixed with padding.
      mixing: The probabilities and proportions.

    Returns:
      The mixed images and targets. A batch of one example is unchanged: the example is its
      own partner.
    """
    batch_size, height, width, _ = images.shape
    weights = partner_weights(draw(key, mixing, batch_size), (height, width))
    has_partner = jnp.roll(mask, 1)
    return blend(images, targets, jnp.where(has_partner[:, None, None], weights, 0))
