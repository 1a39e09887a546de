"""Saliency maps, which show the evidence for a class in an image.

Each method is a pure function of a bundle's predictor, images of the predictor's size and one
class for each image. It returns one map for each image: float32 [batch, height, width], finite
and not negative. A larger value means more evidence for the class. The scales of different
images and methods cannot be compared.

The methods explain the logit of the class. They need no hooks for gradients: the network accepts
offsets that it adds to its stages (`models.network.stages`), and the gradient with respect to an
offset of zeros is the gradient with respect to the stage.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.batching import map_batches, next_power_of_two, split_batches
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import Network, feature_map_shapes, forward, stages
from cnn_jax.system import runtime

Images = UInt8[np.ndarray, "batch height width 3"]
Classes = Int[np.ndarray, " batch"]
Maps = Float[np.ndarray, "batch height width"]
Method = Callable[[BundlePredictor, Images, Classes], Maps]

# The maximum number of pixels in a batch, which limits the memory that gradients need. It is
# smaller for methods that use feature maps: they compute one gradient for each image, so smaller
# batches are hardly slower. For images of 224 x 224 pixels, their batch is one image, so the
# randomization check can use the same compiled program.
_PIXELS_PER_BATCH = 2**18
_FEATURE_MAP_PIXELS_PER_BATCH = 2**16
# The number of points at which `integrated_gradients` evaluates the gradient.
_STEPS = 32
# The number of noisy copies of each image that SmoothGrad averages over.
_COPIES = 16
# The standard deviation of SmoothGrad's noise, as a fraction of the range of grey levels. The paper
# uses 0.1 to 0.2.
_NOISE = 0.15
# Each side of an occlusion patch is one eighth of the side of the image. Neighbouring patches
# overlap by half.
_PATCHES_PER_SIDE = 8

# A function that computes a saliency map from feature maps, their gradients, and the last layer's
# weights for the class.
Combine = Callable[[Array, Array, Array], Array]
# A function that JAX compiles. It takes (variables, images, classes) and returns arrays with one
# row for each image.
_Function = Callable[..., PyTree]


def grad_cam(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Grad-CAM (Selvaraju et al. 2017): a sum of feature maps, weighted by their mean gradients."""
    return _maps_by_combination(_grad_cam, predictor, images, classes)


def mean_grad_cam(predictors: Sequence[BundlePredictor], images: Images, classes: Classes) -> Maps:
    """Returns the mean of the Grad-CAM maps of several networks.

    The scales of the networks differ, so each map is divided by its largest value first.
    """
    found = np.stack([grad_cam(predictor, images, classes) for predictor in predictors])
    if len(predictors) > 1:
        largest = found.max(axis=(2, 3), keepdims=True)
        found = np.divide(found, largest, out=np.zeros_like(found), where=largest > 0)
    return found.mean(axis=0)


def grad_cam_plus_plus(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Grad-CAM++ (Chattopadhay et al. 2018): feature maps, weighted by their positive gradients.

    The weights follow equations 10 and 19 of the paper, with exp(logit) as the score of the class.
    """
    return _maps_by_combination(_grad_cam_plus_plus, predictor, images, classes)


def layer_cam(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Layer-CAM (Jiang et al. 2021): feature maps, weighted at each pixel by positive gradients."""
    return _maps_by_combination(_layer_cam, predictor, images, classes)


def cam(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Class activation maps (Zhou et al. 2016): feature maps, weighted by the last layer's weights.

    Raises:
      ValueError: The head of the network does not receive the mean feature maps.
    """
    if not allows_cam(predictor):
        raise ValueError(why_no_cam(predictor))
    return _maps_by_combination(_cam, predictor, images, classes)


def hires_cam(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """HiResCAM (Draelos and Carin 2020): feature maps, weighted at each pixel by gradients.

    The method uses the last stage whose feature maps are larger than the final feature maps. If no
    stage has larger maps, the method uses the final ones. (With the final feature maps, HiResCAM
    equals Grad-CAM if the embedding is the mean feature map.)
    """
    return _maps_by_combination(_hires_cam, predictor, images, classes)


def integrated_gradients(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Integrated gradients (Sundararajan et al. 2017): the contribution of each pixel to the logit.

    The contributions are relative to a mean grey image. The value of a pixel is the absolute value
    of the sum over its three channels.
    """
    attributions = integrated_gradients_by_channel(predictor, images, classes)
    return np.abs(attributions.sum(axis=-1))


def integrated_gradients_by_channel(
    predictor: BundlePredictor, images: Images, classes: Classes
) -> Float[np.ndarray, "batch height width 3"]:
    """Returns integrated gradients: the contribution of each channel of each pixel to the logit.

    The contributions are relative to a mean grey image. They add up to the difference between the
    logits of the image and of the grey image, up to the error of the midpoint rule with 32 points.
    """
    difference = images - _mean(predictor)
    total = np.zeros_like(difference)
    for fraction in (np.arange(_STEPS) + 0.5) / _STEPS:
        point = _mean(predictor) + np.float32(fraction) * difference
        total += _map_images(_input_gradients, predictor, point, classes)
    return difference * total / _STEPS


def smooth_grad(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """SmoothGrad (Smilkov et al. 2017): the absolute mean gradient over noisy copies of an image.

    The value of a pixel is the largest of its three channels.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(images.shape, np.float32)
    for _ in range(_COPIES):
        # The noise is the same for all images, so that the map of an image does not depend on the
        # other images.
        noise = 255 * _NOISE * rng.standard_normal(images.shape[1:], np.float32)
        total += _map_images(_input_gradients, predictor, images + noise, classes)
    return np.abs(total / _COPIES).max(axis=-1)


def occlusion(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """Occlusion (Zeiler and Fergus 2014): the decrease of the logit under a grey patch.

    The value of a pixel is the mean over the patches that cover it. If the logit increases under
    a patch, its decrease counts as 0.
    """
    whole = _map_images(_logits_by_class, predictor, images, classes)
    total, count = np.zeros(images.shape[:3], np.float32), np.zeros(images.shape[1:3], np.float32)
    for rows, columns in _patches(images.shape[1:3]):
        occluded = images.astype(np.float32)
        occluded[:, rows, columns] = _mean(predictor)
        loss = whole - _map_images(_logits_by_class, predictor, occluded, classes)
        total[:, rows, columns] += np.maximum(loss, 0)[:, None, None]
        count[rows, columns] += 1
    return total / count


def _mean(predictor: BundlePredictor) -> Float[np.ndarray, " 3"]:
    """Returns the R, G and B values that the normalisation of images converts to 0."""
    return np.array(predictor.preprocessing.mean, np.float32)


def _patches(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Returns the rows and columns of overlapping patches that together cover an image."""

    def spans(side: int) -> list[slice]:
        length = -(-side // _PATCHES_PER_SIDE)
        starts = {*range(0, side - length, max(length // 2, 1)), side - length}
        return [slice(start, start + length) for start in sorted(starts)]

    return [(rows, columns) for rows in spans(size[0]) for columns in spans(size[1])]


METHODS: dict[str, Method] = {
    method.__name__: method
    for method in (
        grad_cam,
        grad_cam_plus_plus,
        layer_cam,
        cam,
        hires_cam,
        integrated_gradients,
        smooth_grad,
        occlusion,
    )
}


def allows_cam(predictor: BundlePredictor) -> bool:
    """Returns whether the method `cam` works: the last layer must receive the feature-map means."""
    return predictor.model.embedding_is_mean_map


def why_no_cam(predictor: BundlePredictor) -> str:
    """Returns the error message for a network for which the method `cam` does not work."""
    # The key `dense` is the number of units of a hidden layer before the head.
    hint = " (model.dense=0)" if hasattr(predictor.model, "dense") else ""
    return (
        f"cam needs a network whose head receives the mean feature maps{hint}; grad_cam works for "
        "any network"
    )


def methods_for(predictor: BundlePredictor) -> dict[str, Method]:
    """Returns the methods that work for the predictor's network, by the name of the method."""
    return {
        name: method
        for name, method in METHODS.items()
        if method is not cam or allows_cam(predictor)
    }


def maps_by_method(
    predictor: BundlePredictor, images: Images, classes: Classes, methods: Mapping[str, Method]
) -> dict[str, Maps]:
    """Returns the maps of several methods, by the name of the method.

    Methods that use the feature maps share one computation of the gradient.
    """
    combine = {name: _COMBINE[method] for name, method in methods.items() if method in _COMBINE}
    found = {}
    if combine:
        stacked = _map_images(
            _combined_feature_maps, predictor, images, classes, tuple(combine.values())
        )
        found = {name: stacked[:, position] for position, name in enumerate(combine)}
    return {
        name: found[name] if name in found else method(predictor, images, classes)
        for name, method in methods.items()
    }


# JAX compiles the functions from here to `_input_gradients`. They take and return arrays.


def _class_logits(logits: Float[Array, "batch classes"], classes: Int[Array, " batch"]) -> Array:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _feature_maps_and_gradients(
    variables: PyTree,
    images: Num[Array, "batch height width 3"],
    classes: Int[Array, " batch"],
    names: Iterable[str],
    model: Network,
    preprocessing: Preprocessing,
) -> dict[str, tuple[Array, Array]]:
    """Returns feature maps, and the gradients of the logits with respect to these maps.

    Args:
      variables: The variables of the network.
      images: Grey levels from 0 to 255.
      classes: The class of each image.
      names: The stages with the feature maps.
      model: The network.
      preprocessing: The mean and the standard deviation of the normalisation.

    Returns:
      The feature maps and the gradients by the name of the stage, all float32.
    """

    def evaluate(offsets: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        found = stages(model, variables, images, preprocessing, offsets)
        # Each logit depends on only one image, so the gradient of the sum of the logits contains
        # the gradient of each image's logit.
        return _class_logits(found["logits"], classes).sum(), found

    shapes = feature_map_shapes(model, variables, preprocessing.image_size)
    zeros = {name: jnp.zeros((len(images), *shapes[name])) for name in names}
    gradients, found = jax.grad(evaluate, has_aux=True)(zeros)
    return {
        name: (found[name].astype(jnp.float32), gradients[name].astype(jnp.float32))
        for name in zeros
    }


def _explained_stages(
    model: Network, variables: PyTree, image_size: tuple[int, int]
) -> tuple[str, str]:
    """Returns the last stage, and the last stage whose feature maps are larger, or the last one."""
    shapes = feature_map_shapes(model, variables, image_size)
    final = list(shapes)[-1]
    larger = [name for name, shape in shapes.items() if shape[:2] > shapes[final][:2]]
    return final, (larger or [final])[-1]


def _grad_cam(maps: Array, gradients: Array, head: Array) -> Array:
    weights = jnp.mean(gradients, axis=(1, 2), keepdims=True)
    return nn.relu(jnp.sum(weights * maps, axis=-1))


def _grad_cam_plus_plus(maps: Array, gradients: Array, head: Array) -> Array:
    # The factor exp(logit) of all derivatives of exp(logit) is left out: it cancels in `alpha`, and
    # it multiplies all pixels of the map by the same number.
    squares = gradients**2
    sums = jnp.sum(maps, axis=(1, 2), keepdims=True)
    denominator = 2 * squares + sums * gradients**3
    alpha = jnp.where(denominator != 0, squares / jnp.where(denominator != 0, denominator, 1), 0)
    weights = jnp.sum(alpha * nn.relu(gradients), axis=(1, 2), keepdims=True)
    return nn.relu(jnp.sum(weights * maps, axis=-1))


def _layer_cam(maps: Array, gradients: Array, head: Array) -> Array:
    return nn.relu(jnp.sum(nn.relu(gradients) * maps, axis=-1))


def _cam(maps: Array, gradients: Array, head: Array) -> Array:
    return nn.relu(jnp.sum(head[:, None, None] * maps, axis=-1))


def _hires_cam(maps: Array, gradients: Array, head: Array) -> Array:
    return nn.relu(jnp.sum(gradients * maps, axis=-1))


_COMBINE: dict[Method, Combine] = {
    grad_cam: _grad_cam,
    grad_cam_plus_plus: _grad_cam_plus_plus,
    layer_cam: _layer_cam,
    cam: _cam,
    hires_cam: _hires_cam,
}


def _combined_feature_maps(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    combine: tuple[Combine, ...],
    model: Network,
    preprocessing: Preprocessing,
) -> Float[Array, "batch methods height width"]:
    final, larger = _explained_stages(model, variables, preprocessing.image_size)
    names = [larger if method is _hires_cam else final for method in combine]
    found = _feature_maps_and_gradients(
        variables, images, classes, dict.fromkeys(names), model, preprocessing
    )
    head = variables["params"]["head"]["kernel"].T[classes]
    size = images.shape[:3]
    combined = [
        jax.image.resize(method(*found[name], head), size, "bilinear")
        for method, name in zip(combine, names, strict=True)
    ]
    return jnp.stack(combined, axis=1)


def _logits_by_class(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    model: Network,
    preprocessing: Preprocessing,
) -> Float[Array, " batch"]:
    return _class_logits(forward(model, variables, images, preprocessing), classes)


def _input_gradients(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    model: Network,
    preprocessing: Preprocessing,
) -> Float[Array, "batch height width 3"]:
    """Returns the gradient of each image's logit with respect to the image's grey levels."""

    def logits(images: Array) -> Array:
        options = {"model": model, "preprocessing": preprocessing}
        return _logits_by_class(variables, images, classes, **options).sum()

    return jax.grad(logits)(images)


@functools.cache
def _compiled(
    function: _Function,
    model: Network,
    preprocessing: Preprocessing,
    combine: tuple[Combine, ...] | None,
) -> _Function:
    options = {"model": model, "preprocessing": preprocessing}
    if combine is not None:
        options["combine"] = combine
    return jax.jit(
        functools.partial(function, **options), compiler_options=runtime.compiler_options()
    )


def _maps_by_combination(
    combine: Combine, predictor: BundlePredictor, images: Images, classes: Classes
) -> Maps:
    return _map_images(_combined_feature_maps, predictor, images, classes, (combine,))[:, 0]


def _map_images(
    function: _Function,
    predictor: BundlePredictor,
    images: Num[np.ndarray, "batch height width 3"],
    classes: Classes,
    combine: tuple[Combine, ...] | None = None,
) -> np.ndarray:
    """Compiles a function and applies it to images in batches; non-finite values become 0."""
    run = _compiled(function, predictor.model, predictor.preprocessing, combine)
    height, width = predictor.preprocessing.image_size
    if not len(images):
        one = jax.ShapeDtypeStruct((1, height, width, 3), images.dtype)
        shape = jax.eval_shape(run, predictor.variables, one, np.zeros(1, np.int32)).shape
        return np.empty((0, *shape[1:]), np.float32)
    pixels = _PIXELS_PER_BATCH if combine is None else _FEATURE_MAP_PIXELS_PER_BATCH
    batch_size = max(pixels // (height * width), 1)
    batch_size = min(batch_size, next_power_of_two(len(images)))
    batches = split_batches((images, classes), batch_size)
    results = map_batches(lambda batch: run(predictor.variables, *batch), batches, batch_size)
    # Gradients can overflow if the weights are very large, but maps must be finite.
    return np.nan_to_num(np.concatenate(list(results)), nan=0.0, posinf=0.0, neginf=0.0)
