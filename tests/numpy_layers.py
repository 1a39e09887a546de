"""Float64 layers in NumPy, with which tests compute a network's outputs independently.

The arrays of a layer are keyword arguments, so that `conv(x, **params["conv1"])` and
`norm(x, **params["norm1"], **stats["norm1"])` use the variables of a network.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np


def conv(x, kernel, bias=0.0, stride=1):
    """Returns the result of a convolution with an odd kernel size and zero padding on all sides."""
    batch, height, width, _ = x.shape
    size, half = len(kernel), len(kernel) // 2
    padded = np.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    out = np.zeros((batch, height, width, kernel.shape[-1]))
    for dy in range(size):
        for dx in range(size):
            out += padded[:, dy : dy + height, dx : dx + width] @ kernel[dy, dx]
    return out[:, ::stride, ::stride] + bias


def norm(x, scale, bias, mean, var, epsilon=1e-3):
    """Returns the result of BatchNorm in inference mode."""
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def pool(x):
    """Returns the largest value of each 2 x 2 window."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def dense(x, kernel, bias):
    """Returns the result of a dense layer."""
    return x @ kernel + bias


def random_variables(model, size):
    """Returns random float64 parameters and statistics, different from the initial values.

    Args:
      model: The network.
      size: The height and the width of the images.
    """
    variables = model.init(jax.random.key(0), jnp.zeros((1, *size, 3)))
    rng = np.random.default_rng(0)

    def randomize(path, leaf):
        if path[-1] in ("scale", "var"):
            return rng.uniform(0.5, 2, leaf.shape)
        return np.asarray(leaf, np.float64) + rng.normal(0, 0.05, leaf.shape)

    flat = flax.traverse_util.flatten_dict(variables)
    return flax.traverse_util.unflatten_dict({k: randomize(k, v) for k, v in flat.items()})


def as_float32(tree):
    """Converts the arrays of a pytree to float32 JAX arrays."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), tree)
