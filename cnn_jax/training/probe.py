"""Linear probing: trains only the head of a network; all other layers stay unchanged.

The features of each image are computed once, and stored in the cache. The head is then a
logistic regression on the features, which needs no steps of the training loop.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from cnn_jax.data import Track, cache
from cnn_jax.data.dataset import Dataset
from cnn_jax.inference.evaluation import map_split
from cnn_jax.inference.predictor import compiled_stages
from cnn_jax.models.network import Network
from cnn_jax.system import runtime
from cnn_jax.training import sharding
from cnn_jax.training.loss import balanced_weights
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.programs import Programs
from cnn_jax.training.step import TrainState

# The tested factors of the L2 penalty, from the strongest to the weakest. Each fit starts from the
# solution of the previous fit.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
# The maximum number of L-BFGS iterations for each penalty, and the gradient norm at which L-BFGS
# stops. On EuroSAT, 100 iterations took four times as long and gave the same accuracy.
_ITERATIONS, _TOLERANCE = 25, 1e-4
# The configuration keys of a network that affect only training, and not the features.
_TRAINING_KEYS = {"batch_norm_statistics", "drop_path", "dropout", "pretrained"}
# A part of the cache key of stored features. Increase this number when a network computes other
# features from the same weights.
_FORMAT = 2
# The minimum divisor of a feature. Smaller standard deviations are replaced by this value.
_MIN_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted head.

    Attributes:
      kernel: The kernel of the head for features that are not standardised.
      bias: The bias of the head.
      l2: The weight of the L2 penalty with the best validation accuracy.
      metrics: The metrics of the splits "train" and "validation"; see `metrics.summarize`.
    """

    kernel: Float[np.ndarray, "embedding classes"]
    bias: Float[np.ndarray, " classes"]
    l2: float
    metrics: dict[str, dict[str, float]]


def fit_head(
    config: Any, dataset: Dataset, programs: Programs, state: TrainState, track: Track
) -> tuple[TrainState, Probe]:
    """Fits the head to the features of the initial network of a run.

    Args:
      config: The resolved configuration of the run.
      dataset: The data set of the run.
      programs: The jitted functions of the run.
      state: The state before the first step.
      track: Shows the progress of a loop.

    Returns:
      The state with the fitted head, and the head.
    """
    variables = jax.device_get(programs.gather(state.variables))
    features = embeddings(programs.model, variables, config, dataset, track)
    class_weights = None
    if config.train.balance != "none":
        class_weights = balanced_weights(dataset.findings.counts["train"])
    parts = {name: dataset.splits[name] for name in ("train", "validation")}
    fitted = fit(
        {name: features[indices] for name, indices in parts.items()},
        {name: dataset.source.labels[indices] for name, indices in parts.items()},
        len(dataset.source.class_names),
        class_weights,
    )
    head = {
        name: sharding.distribute(array, state.params["head"][name].sharding)
        for name, array in (("kernel", fitted.kernel), ("bias", fitted.bias))
    }
    return state.with_params({**state.params, "head": head}), fitted


def embeddings(
    model: Network, variables: PyTree, config: Any, dataset: Dataset, track: Track
) -> Float[np.ndarray, "examples embedding"]:
    """Returns the embedding of each example of a data set, in the order of the source.

    The result is stored in the cache under a key that depends on the data, the preprocessing,
    the network and the weights before the head.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network, arrays on the host.
      config: The resolved configuration of the run.
      dataset: The data set of the run.
      track: Shows the progress of a loop.

    Returns:
      float32; examples that are in no split have zeros.
    """
    key = _cache_key(variables, config, dataset)
    stored = cache.read_array("features", key)
    # Each host may have its own cache. The processes compute the features together.
    is_stored = stored is not None and len(stored) == len(dataset.source)
    if sharding.is_true_in_all_processes(is_stored) and stored is not None:
        return stored
    loader = dataclasses.replace(dataset.loader, on_device=False)
    indices = np.concatenate([dataset.splits[name] for name in sorted(dataset.splits)])
    compiled = compiled_stages(_embedding, model, loader.preprocessing)
    run = functools.partial(compiled, jax.device_put(variables))

    def compute(positions: Int[np.ndarray, " part"]) -> list[np.ndarray]:
        return [map_split(run, loader, indices[positions], track, "computing features")]

    (rows,) = sharding.share_rows(compute, len(indices))
    result = np.zeros((len(dataset.source), rows.shape[1]), np.float32)
    result[indices] = rows
    with contextlib.suppress(OSError):  # A run works without the cache, whose disk may be full.
        cache.write_array("features", key, result)
    return result


def _embedding(outputs: dict[str, Array]) -> Array:
    return outputs["embedding"]


def _cache_key(variables: PyTree, config: Any, dataset: Dataset) -> str:
    """Returns the key under which the cache stores the embeddings."""
    digest = hashlib.sha256()
    for path, array in sorted(flax.traverse_util.flatten_dict(variables, sep="/").items()):
        if not path.startswith("params/head/"):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(array).data)
    preprocessing = dataclasses.asdict(dataset.loader.preprocessing)
    content = [
        _FORMAT,
        variables["params"]["head"]["kernel"].shape[0],
        dataset.fingerprint,
        preprocessing,
        {key: value for key, value in config.model.items() if key not in _TRAINING_KEYS},
        config.precision,
        runtime.compiler_options(),
        jax.__version__,
    ]
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def fit(
    features: Mapping[str, Float[np.ndarray, "_examples embedding"]],
    labels: Mapping[str, Int[np.ndarray, " _examples"]],
    num_classes: int,
    class_weights: Float[np.ndarray, " classes"] | None = None,
) -> Probe:
    """Fits the head to the training split; chooses the L2 penalty by validation accuracy.

    The loss is the mean cross-entropy plus l2 / 2 times the squared norm of the kernel. For the
    fit, the features are standardised by their mean and standard deviation on the training
    split; the kernel and the bias of the result include this standardisation.

    Args:
      features: The embeddings of the splits "train" and "validation".
      labels: The classes of the examples of both splits.
      num_classes: The number of classes.
      class_weights: A factor for the losses of each class; None for a factor of 1.

    Returns:
      The head of the L2 penalty with the highest validation accuracy; of equal accuracies, the one
      with the lowest validation loss.
    """
    train = features["train"]
    mean, deviation = train.mean(axis=0), np.maximum(train.std(axis=0), _MIN_DEVIATION)
    scaled = {name: jnp.asarray((array - mean) / deviation) for name, array in features.items()}
    targets = {name: jnp.asarray(array) for name, array in labels.items()}
    weights = np.ones(num_classes) if class_weights is None else class_weights
    weights = jnp.asarray(weights[labels["train"]], jnp.float32)
    params = {
        "kernel": jnp.zeros((train.shape[1], num_classes)),
        "bias": jnp.zeros(num_classes),
    }
    best: tuple[tuple[float, float], float, Any] | None = None
    for l2 in PENALTIES:
        params = _minimize(params, scaled["train"], targets["train"], weights, np.float32(l2))
        validation = _measure(params, scaled["validation"], targets["validation"])
        score = (validation["accuracy"], -validation["loss"])
        if best is None or score > best[0]:
            best = score, l2, params
    assert best is not None
    _, l2, params = best
    kernel = np.asarray(params["kernel"], np.float64) / deviation[:, None]
    return Probe(
        kernel=kernel.astype(np.float32),
        bias=(np.asarray(params["bias"], np.float64) - mean @ kernel).astype(np.float32),
        l2=l2,
        metrics={name: _measure(params, scaled[name], targets[name]) for name in scaled},
    )


def _logits(params: PyTree, features: Array) -> Array:
    return features @ params["kernel"] + params["bias"][None]


@jax.jit
def _minimize(
    params: PyTree,
    features: Float[Array, "examples embedding"],
    labels: Int[Array, " examples"],
    weights: Float[Array, " examples"],
    l2: Float[Array, ""],
) -> PyTree:
    """Minimises the loss of `fit` with L-BFGS, starting from `params`; returns the result."""

    def loss(params: PyTree) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, features), labels)
        return jnp.mean(losses * weights) + l2 / 2 * jnp.sum(params["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def is_unfinished(carry: tuple[Any, ...]) -> Array:
        iteration, _, _, norm = carry
        return (iteration < _ITERATIONS) & (norm > _TOLERANCE)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        iteration, params, state, _ = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return iteration + 1, optax.apply_updates(params, updates), state, optax.tree.norm(gradient)

    start = (0, params, solver.init(params), jnp.inf)
    return jax.lax.while_loop(is_unfinished, step, start)[1]


@jax.jit
def _metrics(params: PyTree, features: Array, labels: Array) -> Metrics:
    mask = jnp.ones(len(labels), bool)
    return Metrics.from_logits(_logits(params, features), labels, mask)


def _measure(params: PyTree, features: Array, labels: Array) -> dict[str, float]:
    """Returns the metrics of a head for the given features; see `metrics.summarize`."""
    return _metrics(params, features, labels).compute()
