import jax
import jax.numpy as jnp
import numpy as np
from networks import assert_images_skip_at_random, random_variables

from cnn_jax.models.convnext import ConvNeXtBlock, convnext_tiny
from cnn_jax.models.network import count_parameters


def test_the_number_of_parameters_is_the_papers():
    # Table 9 of the paper states 28.6 million parameters for 1,000 classes.
    assert count_parameters(convnext_tiny(num_classes=1000), (32, 32)) == 28_589_128


def test_images_skip_a_block_at_random_in_training_only():
    def make(drop_path, is_training):
        return ConvNeXtBlock(drop_path, is_training, jnp.dtype("float32"))

    assert_images_skip_at_random(make, (2, 2, 4))


def test_the_mean_of_the_maps_is_normalized_for_the_embedding():
    model = convnext_tiny(num_classes=3).clone(blocks=(1, 1), features=(4, 6))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    variables = random_variables(model, image)
    outputs = jax.jit(lambda image: model.apply(variables, image, method="stages"))(image)
    mean = np.asarray(outputs["stages_1"], np.float64).mean((1, 2))
    centred = mean - mean.mean(1, keepdims=True)
    norm = jax.tree.map(np.asarray, variables["params"]["norm"])
    expected = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-6) * norm["scale"]
    np.testing.assert_allclose(outputs["embedding"], expected + norm["bias"], atol=1e-4)
