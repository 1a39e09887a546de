"""The base classes of all networks, and the functions that construct and apply a network."""

import abc
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models import NETWORKS
from cnn_jax.system.errors import ConfigError, did_you_mean

# The collection of the variables that `gate` reads. Only pruning sets them.
GATES = "gates"


class Stages:
    """Collects the outputs of a network's stages; an offset can be added to each output.

    The gradient with respect to an offset of zeros is the gradient with respect to the output
    of that stage.

    Attributes:
      outputs: The outputs by stage, in the order of the stages.
    """

    def __init__(self, offsets: Mapping[str, Array] | None):
        """Creates an empty collection; `offsets` maps names of stages to the arrays to add."""
        self.outputs: dict[str, Array] = {}
        self._offsets = offsets or {}

    def add(self, name: str, x: Array) -> Array:
        """Records and returns the output `x` of a stage, plus the offset of the stage if any."""
        if name in self._offsets:
            x = x + self._offsets[name].astype(x.dtype)
        self.outputs[name] = x
        return x


class Network(nn.Module):
    """A network that is divided into stages.

    A subclass defines `first_layer`, `stage_names`, `find_stage` and `add_stages`. Its last dense
    layer has the name "head".

    Attributes:
      num_classes: The number of classes.
      dtype: The dtype of the computation. Parameters, statistics and logits are float32.
      train_from: The first stage that is trained. Earlier stages run in inference mode during
        training, with the stored statistics of BatchNorm. Empty: all stages are trained.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.dtype("float32")
    train_from: str = ""

    # The path of the first layer in the tree of parameters. The path is empty if this layer is not
    # a convolution over R, G and B.
    first_layer: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # Linen adds this method to each module at run time.

        def __hash__(self) -> int: ...

    def __call__(
        self, x: Float[Array, "batch height width channel"], *, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Returns the float32 logits of normalised images."""
        return self.stages(x, train=train)["logits"]

    @property
    @abc.abstractmethod
    def stage_names(self) -> Sequence[str]:
        """The names of the stages in their order; the last two are "embedding" and "logits"."""

    @property
    def embedding_is_mean_map(self) -> bool:
        """Whether the embedding is the mean of the last feature maps over their pixels.

        Class activation maps need such an embedding.
        """
        return False

    @nn.nowrap
    @abc.abstractmethod
    def find_stage(self, layer: str) -> str:
        """Returns the stage to which a layer belongs; `layer` is a top-level parameter name."""

    @nn.nowrap
    def first_kernel(
        self, params: Mapping[str, Any]
    ) -> Float[Array, "height width 3 features"] | None:
        """Returns the kernel of the first layer, if it is a convolution over R, G and B."""
        if not self.first_layer:
            return None
        for name in self.first_layer:
            params = params[name]
        return cast(Array, params["kernel"])

    @nn.compact
    def stages(
        self,
        x: Float[Array, "batch height width channel"],
        *,
        train: bool = False,
        offsets: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Returns the outputs of all stages for normalised images.

        Args:
          x: The images.
          train: Whether to run in training mode, with dropout and the statistics of the batch.
          offsets: Arrays to add to the outputs of stages, by name; see `Stages`.

        Returns:
          The outputs by name, in the order of `stage_names`. The feature maps have the shape
          [batch, height, width, channel]. "embedding" [batch, features] is the input of the
          head, and "logits" [batch, classes], float32, is its output.
        """
        stages = Stages(offsets)
        self.add_stages(x, stages, train=train)
        return stages.outputs

    @nn.nowrap
    @abc.abstractmethod
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        """Computes all stages for normalised images, and adds the outputs to `stages`.

        `stages` calls this method, so submodules and parameters may be created in it.
        """

    @nn.nowrap
    def is_training(self, stage: str, train: bool) -> bool:
        """Returns whether a stage runs in training mode; `train` is the mode of the network."""
        return train and (not self.train_from or self.is_trained(stage))

    @nn.nowrap
    def is_trained(self, stage: str) -> bool:
        """Returns whether the parameters of a stage are trained."""
        names = list(self.stage_names)
        return not self.train_from or names.index(stage) >= names.index(self.train_from)

    @nn.nowrap
    def is_trained_parameter(self, path: str) -> bool:
        """Returns whether a parameter is trained; the path is, for example, "conv1/kernel"."""
        return self.is_trained(self.find_stage(path.partition("/")[0]))


class Backbone(Network):
    """A network that can have pretrained weights; a subclass defines the stages.

    Attributes:
      embedding: "last": the embedding is what the published network gives its last dense layer.
        "stages": the embedding also contains the mean and the standard deviation over the
        pixels of each channel of the feature maps, except those of the first and the last stage.
      dropout: The probability that a number of the embedding is dropped in training.
    """

    embedding: str = "last"
    dropout: float = 0.0

    @nn.nowrap
    def classify(
        self, stages: Stages, embedding: Float[Array, "batch features"], *, train: bool
    ) -> None:
        """Adds the embedding and the logits to the outputs of the stages.

        Args:
          stages: The outputs of all stages with feature maps.
          embedding: The embedding of the published network.
          train: Whether to use dropout.
        """
        if self.embedding == "stages":
            maps = [x.astype(jnp.float32) for x in list(stages.outputs.values())[1:-1]]
            moments = [moment for x in maps for moment in _moments(x)]
            embedding = jnp.concatenate([*moments, embedding.astype(jnp.float32)], axis=-1)
        x = stages.add("embedding", embedding)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        stages.add("logits", nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x))


def _moments(
    maps: Float[Array, "batch height width channel"],
) -> tuple[Float[Array, "batch channel"], Float[Array, "batch channel"]]:
    """Returns the mean and the standard deviation of each channel over all pixels."""
    variance = jnp.var(maps, axis=(1, 2))
    # The gradient of a square root at 0 is infinite.
    return jnp.mean(maps, axis=(1, 2)), jnp.sqrt(variance + 1e-6)


def gate(module: nn.Module, name: str, x: Float[Array, "batch ... channel"]) -> Array:
    """Multiplies the channels of each image by a variable, if the variable is given.

    The gradient with respect to gates of ones tells the effect of each channel on the loss.

    Args:
      module: The module that has the variable in its collection `GATES`, float32 [batch, channel].
      name: The name of the variable.
      x: The outputs of a layer.
    """
    if not module.has_variable(GATES, name):
        return x
    gates = module.get_variable(GATES, name)
    return x * jnp.expand_dims(gates, tuple(range(1, x.ndim - 1))).astype(x.dtype)


def compute_dtype(precision: str, platform: str | None = None) -> jnp.dtype:
    """Converts a value of the configuration key `precision` to the dtype of the computation.

    Args:
      precision: "float32", "bfloat16" or "auto". The last one means float32 on a CPU, else
        bfloat16.
      platform: The platform of the devices, such as "tpu"; None for JAX's default backend.
    """
    if precision == "auto":
        precision = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def make_model(
    config: Mapping[str, Any], num_classes: int, precision: str, train_from: str = ""
) -> Network:
    """Constructs the network that the section `model` of a configuration or bundle describes.

    Args:
      config: The section `model`.
      num_classes: The number of classes.
      precision: See `compute_dtype`.
      train_from: The first stage that is trained, or "head"; see `Network`.

    Raises:
      ConfigError: The network has no such stage.
    """
    module, _, name = NETWORKS[config["name"]].path.partition(":")
    # The fields of a Linen module must be hashable, so lists from JSON become tuples.
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in ("name", "pretrained")
    }
    make = getattr(importlib.import_module(module), name)
    network = make(num_classes=num_classes, dtype=compute_dtype(precision), **fields)
    if not train_from:
        return network
    names = [*network.stage_names[:-1], "head"]
    if train_from not in names:
        hint = did_you_mean(train_from, names)
        raise ConfigError(
            f"config.train.from_stage: must be one of {', '.join(names)} for the network "
            f"{config['name']}, got {train_from!r}{hint}"
        )
    return network.clone(train_from="logits" if train_from == "head" else train_from)


def forward(
    model: Network,
    variables: Mapping[str, Any],
    images: Num[Array, "batch height width 3"],
    preprocessing: Preprocessing,
) -> Float[Array, "batch classes"]:
    """Returns the logits of images in inference mode.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      images: Grey levels from 0 to 255, any dtype.
      preprocessing: The mean and the standard deviation of the normalisation.
    """
    return cast(Array, model.apply(variables, normalize(images, preprocessing)))


def stages(
    model: Network,
    variables: Mapping[str, Any],
    images: Num[Array, "batch height width 3"],
    preprocessing: Preprocessing,
    offsets: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Returns the outputs of all stages of the network in inference mode; see `Network.stages`.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      images: Grey levels from 0 to 255, any dtype.
      preprocessing: The mean and the standard deviation of the normalisation.
      offsets: Arrays to add to the outputs of stages, by name.
    """
    images = normalize(images, preprocessing)
    return cast(dict, model.apply(variables, images, offsets=offsets, method="stages"))


def feature_map_shapes(
    model: Network, variables: Mapping[str, Any], image_size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's feature maps, in the order of the stages.

    Returns:
      The shape (height, width, channels) by the name of the stage.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    shapes: dict[str, tuple[int, ...]] = {}

    def run(variables: Mapping[str, Any], images: Array) -> None:
        # JAX sorts the keys of a returned dictionary, but `shapes` keeps the order of the stages.
        for name, array in cast(dict, model.apply(variables, images, method="stages")).items():
            if array.ndim == 4:
                shapes[name] = array.shape[1:]

    jax.eval_shape(run, variables, images)
    return shapes


def layer_names(model: Network, image_size: tuple[int, int]) -> list[str]:
    """Returns the names of the layers with parameters, from the first layer to the last."""
    names: list[str] = []

    def init(images: Array) -> None:
        names.extend(model.init(jax.random.key(0), images)["params"])

    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    return names


def abstract_variables(model: Network, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the shapes and dtypes of a network's variables, without computing their values."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    # Within the traced function, the key needs no compiled program.
    return jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)


def updates_statistics(model: Network, image_size: tuple[int, int]) -> bool:
    """Returns whether training mode changes the statistics of any BatchNorm layer."""

    def train(variables: Mapping[str, Any], images: Array) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        _, updates = model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return updates

    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(train)(abstract_variables(model, image_size), images).jaxpr
    # A statistic that no layer changes is both an input and an output of the traced function.
    return any(output not in jaxpr.invars for output in jaxpr.outvars)


def count_parameters(model: Network, image_size: tuple[int, int]) -> int:
    """Returns the number of trainable parameters of a network."""
    params = abstract_variables(model, image_size)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(model: Network, image_size: tuple[int, int]) -> float:
    """Returns the number of floating-point operations of one forward pass, as counted by XLA."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    lowered = jax.jit(model.apply).lower(abstract_variables(model, image_size), images)
    cost = lowered.cost_analysis()
    return cost["flops"] if cost else 0.0
