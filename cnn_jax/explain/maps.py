"""Which parts of an image speak for a class.

Each method is a pure function of a predictor, images of its size and a class for each, that
gives a map of each image: float32 [batch, height, width], finite and not negative, the larger
the more a pixel speaks for the class. Maps of different images or methods are on different
scales.

What is explained is the class's logit. The gradients need no hooks: the network takes offsets
to its stages (`models.stages`), and the gradient by an offset of zeros is that by the stage.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.predictor import Predictor
from cnn_jax.models.network import feature_map_shape, forward, stages
from cnn_jax.system import runtime

Images = UInt8[np.ndarray, "batch height width 3"]
Classes = Int[np.ndarray, " batch"]
Maps = Float[np.ndarray, "batch height width"]
Method = Callable[[Predictor, Images, Classes], Maps]

# Pixels that go through the network at once, with all that its gradient keeps of them.
_PIXELS_AT_ONCE = 2**18
# Of integrated gradients, and noisy copies of SmoothGrad.
_STEPS = 32
_COPIES = 16
# SmoothGrad's standard deviation, as a share of the range of grey levels (its paper: 0.1 to 0.2).
_NOISE = 0.15
# Occlusion: patches of an eighth of a side, half a patch apart.
_PATCHES_A_SIDE = 8

# How a map is made of feature maps, the gradients by them, and the head's weights of the class.
Combine = Callable[[Array, Array, Array], Array]
# What is compiled: (variables, images, classes) -> arrays, whose first dimension is the images'.
_Function = Callable[..., PyTree]


def grad_cam(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """Grad-CAM (Selvaraju et al. 2017): maps weighed by their mean gradients, what is positive."""
    return _by_feature_maps(_grad_cam, predictor, images, classes)


def grad_cam_plus_plus(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """Grad-CAM++ (Chattopadhay et al. 2018, equations 10 and 19, with the class's exp(logit))."""
    return _by_feature_maps(_grad_cam_plus_plus, predictor, images, classes)


def layer_cam(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """Layer-CAM (Jiang et al. 2021): each pixel of a map weighed by its own positive gradient."""
    return _by_feature_maps(_layer_cam, predictor, images, classes)


def cam(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """The class activation map (Zhou et al. 2016): maps weighed by the head's weights.

    Raises:
      ValueError: The network has a hidden layer between its feature maps and its head.
    """
    if not allows_cam(predictor):
        raise ValueError(
            "cam needs a head right on the mean feature maps (model.dense=0); grad_cam does not"
        )
    return _by_feature_maps(_cam, predictor, images, classes)


def integrated_gradients(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """Integrated gradients (Sundararajan et al. 2017): |sum over channels|, from mean grey."""
    attributions = integrated_gradients_by_channel(predictor, images, classes)
    return np.abs(attributions.sum(axis=-1))


def integrated_gradients_by_channel(
    predictor: Predictor, images: Images, classes: Classes
) -> Float[np.ndarray, "batch height width 3"]:
    """What each number of an image adds to the logit, from an image of mean grey levels.

    They sum to the difference of the logits of both, but for the error of the midpoint rule
    with 32 points.
    """
    difference = images - _mean(predictor)
    total = np.zeros_like(difference)
    for share in (np.arange(_STEPS) + 0.5) / _STEPS:
        between = _mean(predictor) + np.float32(share) * difference
        total += _in_parts(_input_gradients, predictor, between, classes)
    return difference * total / _STEPS


def smooth_grad(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """SmoothGrad (Smilkov et al. 2017): |mean gradient| over noisy copies, largest of channels."""
    rng = np.random.default_rng(0)
    total = np.zeros(images.shape, np.float32)
    for _ in range(_COPIES):
        # The same noise for all, so that a map does not depend on the other images.
        noise = 255 * _NOISE * rng.standard_normal(images.shape[1:], np.float32)
        total += _in_parts(_input_gradients, predictor, images + noise, classes)
    return np.abs(total / _COPIES).max(axis=-1)


def occlusion(predictor: Predictor, images: Images, classes: Classes) -> Maps:
    """Occlusion (Zeiler and Fergus 2014): what the logit loses where a grey patch lies.

    Each pixel has the mean over the patches on it; what the logit gains counts 0.
    """
    whole = _in_parts(_logits_of_classes, predictor, images, classes)
    lost, count = np.zeros(images.shape[:3], np.float32), np.zeros(images.shape[1:3], np.float32)
    for rows, columns in _patches(images.shape[1:3]):
        occluded = images.astype(np.float32)
        occluded[:, rows, columns] = _mean(predictor)
        loss = whole - _in_parts(_logits_of_classes, predictor, occluded, classes)
        lost[:, rows, columns] += np.maximum(loss, 0)[:, None, None]
        count[rows, columns] += 1
    return lost / count


def _mean(predictor: Predictor) -> Float[np.ndarray, " 3"]:
    """The grey levels that become zeros."""
    return np.array(predictor.preprocessing.mean, np.float32)


def _patches(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of squares that overlap by half and together cover an image."""

    def spans(side: int) -> list[slice]:
        length = -(-side // _PATCHES_A_SIDE)
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
        integrated_gradients,
        smooth_grad,
        occlusion,
    )
}


def method_named(text: str) -> str | None:
    """The method of a name, however it is spelt: grad_cam, grad-cam, GradCAM, gradcam.

    None if there is none of this name.
    """

    def folded(name: str) -> str:
        return name.lower().replace("++", "plusplus").replace("-", "").replace("_", "")

    return next((name for name in METHODS if folded(name) == folded(text)), None)


def allows_cam(predictor: Predictor) -> bool:
    """Whether the head is linear in the mean feature maps."""
    return getattr(predictor.model, "dense", None) == 0


def methods_for(predictor: Predictor) -> dict[str, Method]:
    """The methods that this predictor's network allows."""
    return {
        name: method
        for name, method in METHODS.items()
        if method is not cam or allows_cam(predictor)
    }


def maps_by_method(
    predictor: Predictor, images: Images, classes: Classes, methods: Mapping[str, Method]
) -> dict[str, Maps]:
    """The maps of several methods, by name; those made of feature maps share one gradient."""
    combine = {name: _COMBINE[method] for name, method in methods.items() if method in _COMBINE}
    found = {}
    if combine:
        stacked = _in_parts(_of_feature_maps, predictor, images, classes, tuple(combine.values()))
        found = {name: stacked[:, position] for position, name in enumerate(combine)}
    return {
        name: found[name] if name in found else method(predictor, images, classes)
        for name, method in methods.items()
    }


# From here on: what is compiled. Arrays in, arrays out.


def _class_logits(logits: Float[Array, "batch classes"], classes: Int[Array, " batch"]) -> Array:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _feature_maps_and_gradients(
    variables: PyTree,
    images: Num[Array, "batch height width 3"],
    classes: Int[Array, " batch"],
    model: nn.Module,
    preprocessing: Preprocessing,
) -> tuple[Array, Array]:
    """The last feature maps, and the gradient of each image's class by them; float32."""

    def evaluate(offsets: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        found = stages(model, variables, images, preprocessing, offsets)
        # An image's logit depends on no other image, so the sum's gradient is that of each.
        return _class_logits(found["logits"], classes).sum(), found

    name, shape = feature_map_shape(model, variables, preprocessing.image_size)
    zeros = {name: jnp.zeros((len(images), *shape))}
    gradients, found = jax.grad(evaluate, has_aux=True)(zeros)
    return found[name].astype(jnp.float32), gradients[name].astype(jnp.float32)


def _grad_cam(maps: Array, gradients: Array, head: Array) -> Array:
    weights = jnp.mean(gradients, axis=(1, 2), keepdims=True)
    return nn.relu(jnp.sum(weights * maps, axis=-1))


def _grad_cam_plus_plus(maps: Array, gradients: Array, head: Array) -> Array:
    # The powers of exp(logit) that its derivatives share cancel but for one, the same for
    # all pixels.
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


_COMBINE: dict[Method, Combine] = {
    grad_cam: _grad_cam,
    grad_cam_plus_plus: _grad_cam_plus_plus,
    layer_cam: _layer_cam,
    cam: _cam,
}


def _of_feature_maps(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    combine: tuple[Combine, ...],
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Float[Array, "batch methods height width"]:
    maps, gradients = _feature_maps_and_gradients(variables, images, classes, model, preprocessing)
    head = variables["params"]["head"]["kernel"].T[classes]
    combined = jnp.stack([method(maps, gradients, head) for method in combine], axis=1)
    batch, height, width = images.shape[:3]
    return jax.image.resize(combined, (batch, len(combine), height, width), "bilinear")


def _logits_of_classes(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Float[Array, " batch"]:
    return _class_logits(forward(model, variables, images, preprocessing), classes)


def _input_gradients(
    variables: PyTree,
    images: Array,
    classes: Array,
    *,
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Float[Array, "batch height width 3"]:
    """The gradient of each image's logit by its grey levels."""

    def logits(images: Array) -> Array:
        options = {"model": model, "preprocessing": preprocessing}
        return _logits_of_classes(variables, images, classes, **options).sum()

    return jax.grad(logits)(images)


@functools.cache
def _compiled(
    function: _Function,
    model: nn.Module,
    preprocessing: Preprocessing,
    combine: tuple[Combine, ...] | None,
) -> _Function:
    options = {"model": model, "preprocessing": preprocessing}
    if combine is not None:
        options["combine"] = combine
    return jax.jit(
        functools.partial(function, **options), compiler_options=runtime.compiler_options()
    )


def _by_feature_maps(
    combine: Combine, predictor: Predictor, images: Images, classes: Classes
) -> Maps:
    return _in_parts(_of_feature_maps, predictor, images, classes, (combine,))[:, 0]


def _in_parts(
    function: _Function,
    predictor: Predictor,
    images: Num[np.ndarray, "batch height width 3"],
    classes: Classes,
    combine: tuple[Combine, ...] | None = None,
) -> np.ndarray:
    """Applies a function to so many images at a time, the last ones repeated to fill a part."""
    run = _compiled(function, predictor.model, predictor.preprocessing, combine)
    height, width = predictor.preprocessing.image_size
    at_once = max(_PIXELS_AT_ONCE // (height * width), 1)
    at_once = min(at_once, 1 << max(len(images) - 1, 0).bit_length())
    if not len(images):
        one = jax.ShapeDtypeStruct((1, height, width, 3), images.dtype)
        shape = jax.eval_shape(run, predictor.variables, one, np.zeros(1, np.int32)).shape
        return np.empty((0, *shape[1:]), np.float32)
    parts = []
    for start in range(0, len(images), at_once):
        part, of = images[start : start + at_once], classes[start : start + at_once]
        missing = at_once - len(part)
        padded = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
        found = run(predictor.variables, padded, np.pad(of, (0, missing), mode="edge"))
        parts.append(np.asarray(jax.device_get(found))[: len(part)])
    # Weights that overflow have no gradients; a map is finite all the same.
    return np.nan_to_num(np.concatenate(parts), nan=0.0, posinf=0.0, neginf=0.0)
