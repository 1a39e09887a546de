"""Functions for the tests of networks: Flax variables with random values, a drop path check."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(module, *inputs):
    """Returns random variables with which no layer of a module is the identity or zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(np.exp(rng.normal(0, 0.25, leaf.shape)), jnp.float32)
        # With this scale, the kernels preserve the order of magnitude of the activations.
        is_kernel = path[-1].key == "kernel"
        scale = math.sqrt(2 / math.prod(leaf.shape[:-1])) if is_kernel else 0.2
        return jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *inputs))


def assert_images_skip_at_random(make, shape, zero=None):
    """Checks the drop path of the block that `make(drop_path, is_training)` returns.

    In training, a quarter of the images skips the block, and the others get its change divided by
    0.75. Therefore the mean stays the same. In inference, no image skips the block.

    Args:
      make: A function of the two fields that returns the block.
      shape: The shape of one input.
      zero: The name of a layer whose parameters become 0, because the block has another layer
        that images skip separately.
    """
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    images = jnp.broadcast_to(x, (4000, *shape))
    variables = random_variables(make(0.0, False), images)
    if zero:
        params = variables["params"]
        params[zero] = jax.tree.map(jnp.zeros_like, params[zero])
    expected = np.asarray(make(0.0, False).apply(variables, images[:1])[0])
    np.testing.assert_array_equal(make(0.25, False).apply(variables, images[:1])[0], expected)

    rngs = {"dropout": jax.random.key(0)}
    output = np.asarray(make(0.25, True).apply(variables, images, rngs=rngs))
    is_skipped = (output == x[None]).all(axis=tuple(range(1, output.ndim)))
    assert abs(is_skipped.mean() - 0.25) < 0.03
    changed = x + (expected - x) / 0.75
    error = np.abs(output[~is_skipped] - changed[None])
    assert error.max() < 1e-4
