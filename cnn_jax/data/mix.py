"""MixUp and CutMix: an image and its label are mixed with another of the same batch.

MixUp (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", section 2) blends
two images. CutMix (Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong
Classifiers with Localizable Features", section 3.1) puts a box of one into the other. In
both, the label becomes a distribution over classes, in the proportion of the images.

Here every example draws for itself whether, how and in what proportion it is mixed. (The
papers' programs draw once for a whole batch.) Its partner is the example before it in the
batch, which in a shuffled stream is a random one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How often images are mixed, and in what proportions.

    Attributes:
      mixup_probability: Of an example to be mixed by MixUp, 0 to 1.
      mixup_alpha: Its share is drawn from Beta(alpha, alpha), alpha > 0: near 0 nearly all
        of one image is left, 1 makes all shares equally likely, more makes halves.
      cutmix_probability: Of an example to be mixed by CutMix; at most
        1 - mixup_probability.
      cutmix_alpha: As `mixup_alpha`.
    """

    mixup_probability: float = 0.0
    mixup_alpha: float = 0.2
    cutmix_probability: float = 0.0
    cutmix_alpha: float = 1.0

    @classmethod
    def from_config(cls, augment: Any) -> "Mixing":
        """From a configuration's section `augment`; one that is older has no such keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: augment[name] for name in names if name in augment})

    def is_identity(self) -> bool:
        return self.mixup_probability == self.cutmix_probability == 0

    def describe(self) -> str:
        """Such as "MixUp of 50% (alpha 0.2), CutMix of 50% (alpha 1)"; empty for none."""
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
    """What each example of a batch has drawn.

    Attributes:
      is_mixup: bool [B], whether it is mixed by MixUp.
      is_cutmix: bool [B], whether it is mixed by CutMix; never both.
      share: float32 [B], 0 to 1: what it is to keep of itself, lambda in the papers.
      centre: float32 [B, 2], of CutMix's box: y and x, in heights and widths, 0 to 1.
    """

    is_mixup: Bool[Array, " batch"]
    is_cutmix: Bool[Array, " batch"]
    share: Float[Array, " batch"]
    centre: Float[Array, "batch 2"]


def draw(key: PRNGKeyArray, mixing: Mixing, batch_size: int) -> Draws:
    """Draws for one batch, independent of each other."""
    for_method, for_share, for_centre = jax.random.split(key, 3)
    number = jax.random.uniform(for_method, (batch_size,))
    is_mixup = number < mixing.mixup_probability
    is_mixed = number < mixing.mixup_probability + mixing.cutmix_probability
    alpha = jnp.where(is_mixup, mixing.mixup_alpha, mixing.cutmix_alpha)
    # Beta is the distribution of Dirichlet for two, as which JAX compiles it in less time.
    share = jax.random.dirichlet(for_share, jnp.stack([alpha, alpha], axis=1))[:, 0]
    return Draws(
        is_mixup=is_mixup,
        is_cutmix=is_mixed & ~is_mixup,
        share=share,
        centre=jax.random.uniform(for_centre, (batch_size, 2)),
    )


def mixup_weights(
    share: Float[Array, " batch"], image_size: tuple[int, int]
) -> Float[Array, "batch height width"]:
    """The partner's weight in each pixel by MixUp: 1 - share."""
    return jnp.broadcast_to((1 - share)[:, None, None], (*share.shape, *image_size))


def cutmix_weights(
    share: Float[Array, " batch"], centre: Float[Array, "batch 2"], image_size: tuple[int, int]
) -> Float[Array, "batch height width"]:
    """The partner's weight in each pixel by CutMix: 1 in the box, 0 around it.

    The box is sqrt(1 - share) of the image high and wide, so that it has 1 - share of the
    pixels, or fewer where it reaches over the border. A pixel is inside if its middle is.
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
    """The partner's weight in each pixel, 0 to 1; exactly 0 if an example is not mixed."""
    by_mixup = mixup_weights(draws.share, image_size)
    by_cutmix = cutmix_weights(draws.share, draws.centre, image_size)
    weights = jnp.where(draws.is_cutmix[:, None, None], by_cutmix, 0)
    return jnp.where(draws.is_mixup[:, None, None], by_mixup, weights)


def blend(
    images: Float[Array, "batch height width channel"],
    targets: Float[Array, "batch classes"],
    weights: Float[Array, "batch height width"],
) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch classes"]]:
    """Mixes each example with the one before it; the first one with the last.

    Args:
      images: Of any range.
      targets: The probability of each class.
      weights: Of the partner in each pixel, 0 to 1.

    Returns:
      The images, and the targets with the partner's weighted by the mean of `weights`: by
      CutMix, by the share of the pixels that the partner really has. Where all weights are
      0, an example is exactly what it was.
    """
    partner_share = jnp.mean(weights, axis=(1, 2))
    return (
        _with_row_before(images, weights[..., None]),
        _with_row_before(targets, partner_share[:, None]),
    )


def _with_row_before(rows: Array, weights: Array) -> Array:
    """1 - weight times each row, and weight times the one before it."""
    return (1 - weights) * rows + weights * jnp.roll(rows, 1, axis=0)


def mix_batch(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channel"],
    targets: Float[Array, "batch classes"],
    mask: Bool[Array, " batch"],
    mixing: Mixing,
) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch classes"]]:
    """Draws and mixes one batch.

    Args:
      key: Of this batch alone.
      images: float32, of any range.
      targets: float32, the probability of each class.
      mask: Which rows are examples; no example is mixed with a row that is none.
      mixing: What to draw.

    Returns:
      The mixed images and targets. A batch of one stays as it is: its partner is itself.
    """
    batch_size, height, width, _ = images.shape
    weights = partner_weights(draw(key, mixing, batch_size), (height, width))
    has_partner = jnp.roll(mask, 1)
    return blend(images, targets, jnp.where(has_partner[:, None, None], weights, 0))
