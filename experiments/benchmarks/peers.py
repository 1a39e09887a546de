"""The compared libraries: the same network in JAX, Flax Linen, PyTorch, Keras and ONNX Runtime.

    python experiments/benchmarks/peers.py NAME

This command runs the library NAME and answers requests of a benchmark: one JSON object on each
line of stdin, one answer on each line of stdout. Each library runs in a separate process with
its own threads and memory. All libraries compute the same function: they get uint8 images and
the same weights, and use the same loss and optimizer. Weights and gradients are arrays with the
names of this project ("conv1/kernel", ...).
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from common import CLASSES, answer_requests, device_peak_bytes, seconds_of_each

FEATURES, DENSE, DROPOUT = (32, 64, 128), 256, 0.5
MOMENTUM, EPSILON, LABEL_SMOOTHING, L2, LEARNING_RATE = 0.99, 1e-3, 0.1, 1e-4, 1e-3
# Pixel values are normalised with this number as the mean and as the standard deviation.
GREY = 127.5

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """The weights, images, labels and settings of a comparison, the same for all libraries.

    Attributes:
      weights: Parameters and running statistics, by name.
      images: uint8 [B, H, W, 3].
      labels: int32 [B].
      precision: "float32" or "bfloat16"; for other libraries also "float64".
      dropout: The dropout probability; 0 in comparisons of results.
    """

    weights: Arrays
    images: np.ndarray
    labels: np.ndarray
    precision: str
    dropout: float


def load_task(path: str | os.PathLike[str], precision: str, dropout: float) -> Task:
    """Reads a task from an .npz file."""
    with np.load(path) as data:
        weights = {key: data[key] for key in data if "/" in key}
        return Task(weights, data["images"], data["labels"], precision, dropout)


class Peer:
    """The interface that the benchmarks use for each compared library.

    Attributes:
      needs_cnn_jax: Whether the library runs in an environment that has this project.
    """

    needs_cnn_jax = False

    def __init__(self, task: Task):
        """Creates the network, the optimizer and one batch from a task."""

    def loss_and_gradients(self) -> tuple[float, Arrays]:
        """Returns the mean loss in training mode, and the gradients.

        The loss has label smoothing. The gradients are those of the loss plus the L2 penalty.
        """
        raise NotImplementedError

    def train(self) -> None:
        """Runs one training step, and waits until the device has finished the step."""
        raise NotImplementedError

    def predict(self) -> np.ndarray:
        """Returns the class probabilities of the images as a NumPy array, float32 [B, C]."""
        raise NotImplementedError

    def exact(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which float32 matrix products do not use TF32, the GPUs' default."""
        return contextlib.nullcontext()

    def peak_bytes(self) -> int:
        """Returns the peak device memory of this process in bytes, or 0 if the peak is unknown."""
        return 0


def _make_predictor(task: Task) -> Any:
    """Returns the `BundlePredictor` of a task."""
    from cnn_jax.data.preprocessing import Preprocessing
    from cnn_jax.inference.bundle import Bundle
    from cnn_jax.inference.predictor import BundlePredictor

    config = {"name": "cnn", "features": FEATURES, "dense": DENSE, "dropout": task.dropout}
    bundle = Bundle(
        model={**config, "batch_norm": True},
        precision=task.precision,
        class_names=[str(i) for i in range(CLASSES)],
        preprocessing=Preprocessing(image_size=task.images.shape[1:3]),
        temperature=1.0,
        data={},
        metrics={},
        variables=_nested(task.weights),
    )
    return BundlePredictor(bundle)


class Ours(Peer):
    """The training step and the predictor of this project, compiled with the project's options."""

    needs_cnn_jax = True

    def __init__(self, task: Task):
        import jax

        from cnn_jax.data.preprocessing import Preprocessing
        from cnn_jax.training.optimizer import make_optimizer, make_schedule
        from cnn_jax.training.step import TrainState, TrainStep

        model = self._model(task.precision, task.dropout)
        self._options = self._compiler_options()
        tree = _nested(task.weights)
        optimizer = make_optimizer(make_schedule(LEARNING_RATE, LEARNING_RATE, total_steps=1), L2)
        preprocessing = Preprocessing(image_size=task.images.shape[1:3])
        step = TrainStep(
            model=model,
            optimizer=optimizer,
            preprocessing=preprocessing,
            label_smoothing=LABEL_SMOOTHING,
        )
        self._jax, self._images, self._task = jax, task.images, task
        self._batch = jax.device_put(
            {"image": task.images, "label": task.labels, "mask": np.ones(len(task.labels), bool)}
        )
        self._state = jax.device_put(
            TrainState(
                step=np.int32(0),
                params=tree["params"],
                batch_stats=tree["batch_stats"],
                opt_state=optimizer.init(tree["params"]),
            )
        )
        self._step = jax.jit(
            step,
            donate_argnums=0,
            compiler_options=self._options,
        )
        self._plain_step = step

    def _model(self, precision: str, dropout: float) -> Any:
        from cnn_jax.models.network import make_model

        config = {"name": "cnn", "features": FEATURES, "dense": DENSE}
        return make_model({**config, "dropout": dropout, "batch_norm": True}, CLASSES, precision)

    def _compiler_options(self) -> dict[str, str | bool]:
        from cnn_jax.system import runtime

        return runtime.compiler_options()

    def loss_and_gradients(self) -> tuple[float, Arrays]:
        import optax

        from cnn_jax.training.optimizer import kernel_mask

        # This update function stores the gradient in the optimizer's state, from which the gradient
        # is read after the step.
        def keep(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return updates, updates

        optimizer = optax.chain(
            optax.add_decayed_weights(L2, mask=kernel_mask),
            optax.GradientTransformation(lambda params: params, keep),
        )
        state = self._state.replace(opt_state=optimizer.init(self._state.params))
        # The compiler options are those of the timed step, so that this check covers their effect.
        step = self._jax.jit(
            dataclasses.replace(self._plain_step, optimizer=optimizer),
            compiler_options=self._options,
        )
        after, _ = step(state, self._batch)
        return self._loss(), _flat(after.opt_state[-1])

    def _loss(self) -> float:
        from cnn_jax.data.preprocessing import Preprocessing, normalize
        from cnn_jax.training.loss import cross_entropy

        logits, _ = self._model("float32", 0.0).apply(
            self._state.variables,
            normalize(self._batch["image"], Preprocessing(self._images.shape[1:3])),
            train=True,
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, self._batch["label"], LABEL_SMOOTHING)
        return float(losses.mean())

    def train(self) -> None:
        self.train_without_waiting(1)

    def train_without_waiting(self, count: int) -> None:
        """Runs a number of steps, and waits only for the last step."""
        for _ in range(count):
            self._state, _ = self._step(self._state, self._batch)
        self._jax.block_until_ready(self._state)

    def predict(self) -> np.ndarray:
        return self._predictor(self._images)

    @functools.cached_property
    def _predictor(self) -> Callable[[np.ndarray], np.ndarray]:
        return _make_predictor(self._task)

    def exact(self) -> contextlib.AbstractContextManager[Any]:
        return self._jax.default_matmul_precision("highest")

    def peak_bytes(self) -> int:
        return device_peak_bytes()

    def digest(self) -> str:
        """Returns the SHA-256 digest of all arrays of the train state."""
        digest = hashlib.sha256()
        for leaf in self._jax.tree.leaves(self._jax.device_get(self._state)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


class Variant(Ours):
    """A variant of this project's training step without some of the optimisations.

    Attributes:
      linen: The layers of `cnn_jax.models.cnn` that are replaced by Linen's layers.
      without: A text: compiler options whose names contain the text are left out; None leaves out
        no option.
    """

    linen: tuple[str, ...] = ()
    without: str | None = None

    @functools.cached_property
    def _predictor(self) -> Callable[[np.ndarray], np.ndarray]:
        from cnn_jax.models.network import forward

        variables, step = self._state.variables, self._plain_step
        run = self._jax.jit(
            lambda variables, images: self._jax.nn.softmax(
                forward(step.model, variables, images, step.preprocessing)
            ),
            compiler_options=self._options,
        )
        return lambda images: np.asarray(run(variables, images))

    def _compiler_options(self) -> dict[str, str | bool]:
        options = super()._compiler_options()
        without = self.without
        return {n: v for n, v in options.items() if without is None or without not in n}

    def _model(self, precision: str, dropout: float) -> Any:
        import flax.linen as nn

        from cnn_jax.models import cnn

        # These lines change the module `cnn` for all networks, but a process has only one network.
        if "Conv" in self.linen:
            cnn.Conv = functools.partial(nn.Conv, kernel_size=(3, 3))
        if "max_pool_2x2" in self.linen:
            cnn.max_pool_2x2 = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        if {"BatchNorm", "max_pool_2x2"} & set(self.linen):
            # This class replaces the methods that compute two layers together.
            base = nn.BatchNorm if "BatchNorm" in self.linen else cnn.BatchNorm

            def with_max_pool(layer: Any, x: Any) -> tuple[Any, Any]:
                maps = layer(x)
                return maps, cnn.max_pool_2x2(maps)

            def with_mean(layer: Any, x: Any) -> tuple[Any, Any]:
                maps = layer(x)
                return maps, maps.mean((1, 2))

            methods = {"with_max_pool": with_max_pool, "with_mean": with_mean}
            cnn.BatchNorm = type("BatchNorm", (base,), methods)
        return super()._model(precision, dropout)


def variant(*linen: str, without: str | None = None) -> type[Variant]:
    """Returns a class for a variant of this project; see the attributes of `Variant`."""
    return type("Variant", (Variant,), {"linen": linen, "without": without})


class Torch(Peer):
    """PyTorch in eager mode with the memory format channels_last; autocast for bfloat16."""

    is_compiled = False

    def __init__(self, task: Task):
        import torch  # pyright: ignore

        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = task.precision == "bfloat16"
        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._precision, self._host_images = task.precision, task.images
        net = torch_network(task.dropout)
        load_into_torch(net, task.weights)
        self._dtype = torch.float64 if task.precision == "float64" else torch.float32
        self._net = net.to(self._device, self._dtype, memory_format=torch.channels_last)
        kernels = [p for n, p in net.named_parameters() if _is_torch_kernel(n, p)]
        others = [p for n, p in net.named_parameters() if not _is_torch_kernel(n, p)]
        self._optimizer = torch.optim.Adam(
            [{"params": kernels, "weight_decay": L2}, {"params": others}],
            lr=LEARNING_RATE,
            fused=True,
        )
        self._images = torch.from_numpy(task.images).to(self._device)
        self._labels = torch.from_numpy(task.labels.astype(np.int64)).to(self._device)
        # By default, torch.compile compiles one program for shapes of any size when it sees a
        # second shape. With dynamic=False, it compiles one program for each shape.
        compiled = functools.partial(torch.compile, dynamic=False)
        if not self.is_compiled:
            compiled = lambda function: function  # noqa: E731
        self._loss: Callable[[], Any] = compiled(self._eager_loss)
        self._forward: Callable[[Any], Any] = compiled(self._probabilities)

    def _logits(self, images: Any) -> Any:
        torch = self._torch
        is_low = self._precision == "bfloat16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_low):
            inputs = (images.permute(0, 3, 1, 2).to(self._dtype) - GREY) / GREY
            return self._net(inputs).to(self._dtype)

    def _eager_loss(self) -> Any:
        return self._torch.nn.functional.cross_entropy(
            self._logits(self._images), self._labels, label_smoothing=LABEL_SMOOTHING
        )

    def _probabilities(self, images: Any) -> Any:
        return self._torch.softmax(self._logits(images), -1)

    def loss_and_gradients(self) -> tuple[float, Arrays]:
        self._net.train()
        self._optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        gradients = {
            ours: _from_torch(tensor.grad + L2 * tensor if ours.endswith("kernel") else tensor.grad)
            for ours, tensor in _torch_tensors(self._net).items()
            if tensor.requires_grad
        }
        return loss.item(), gradients

    def train(self) -> None:
        self._net.train()
        self._optimizer.zero_grad()
        self._loss().backward()
        self._optimizer.step()
        self._wait()

    def predict(self) -> np.ndarray:
        self._net.eval()
        with self._torch.inference_mode():
            images = self._torch.from_numpy(self._host_images).to(self._device)
            return self._forward(images).cpu().numpy()

    def exact(self) -> contextlib.AbstractContextManager[Any]:
        return self._torch.backends.cudnn.flags(
            enabled=True, benchmark=True, deterministic=False, allow_tf32=False
        )

    def peak_bytes(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()


class CompiledTorch(Torch):
    """PyTorch with its compiler, `torch.compile`."""

    is_compiled = True


def torch_network(dropout: float) -> Any:
    import torch  # pyright: ignore
    from torch import nn  # pyright: ignore

    layers: list[Any] = []
    channels = 3
    for i, features in enumerate(FEATURES, start=1):
        layers += [
            nn.Conv2d(channels, features, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(features, eps=EPSILON, momentum=1 - MOMENTUM),
        ]
        if i < len(FEATURES):
            layers.append(nn.MaxPool2d(2))
        channels = features

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    head = [nn.Linear(channels, DENSE), nn.ReLU(), nn.Dropout(dropout), nn.Linear(DENSE, CLASSES)]
    return nn.Sequential(*layers, Mean(), *head)


def _torch_tensors(net: Any) -> Mapping[str, Any]:
    """Returns the tensors of a PyTorch network, by their names in this project."""
    from torch import nn  # pyright: ignore

    convolutions = [m for m in net if isinstance(m, nn.Conv2d)]
    norms = [m for m in net if isinstance(m, nn.BatchNorm2d)]
    dense, head = (m for m in net if isinstance(m, nn.Linear))
    tensors = {}
    for i, (conv, norm) in enumerate(zip(convolutions, norms, strict=True), start=1):
        tensors |= {f"params/conv{i}/kernel": conv.weight, f"params/conv{i}/bias": conv.bias}
        tensors |= {f"params/norm{i}/scale": norm.weight, f"params/norm{i}/bias": norm.bias}
        tensors |= {f"batch_stats/norm{i}/mean": norm.running_mean}
        tensors |= {f"batch_stats/norm{i}/var": norm.running_var}
    for name, layer in (("dense", dense), ("head", head)):
        tensors |= {f"params/{name}/kernel": layer.weight, f"params/{name}/bias": layer.bias}
    return tensors


def load_into_torch(net: Any, weights: Arrays) -> None:
    import torch  # pyright: ignore

    with torch.no_grad():
        for name, tensor in _torch_tensors(net).items():
            value = weights[name]
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(value.transpose(order))))


def _from_torch(tensor: Any) -> np.ndarray:
    value = tensor.detach().cpu().numpy()
    return value.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim])


def _is_torch_kernel(name: str, parameter: Any) -> bool:
    return name.endswith("weight") and parameter.ndim > 1


class Keras(Peer):
    """Keras 3 with `train_on_batch`; the variable KERAS_BACKEND selects the backend."""

    def __init__(self, task: Task):
        import keras  # pyright: ignore

        policy = "mixed_bfloat16" if task.precision == "bfloat16" else task.precision
        keras.config.set_dtype_policy(policy)
        self._keras = keras
        layers, l2 = keras.layers, keras.regularizers.L2(L2 / 2)
        head = "float64" if task.precision == "float64" else "float32"
        blocks: list[Any] = [layers.Rescaling(1 / GREY, offset=-1)]
        for i, features in enumerate(FEATURES, start=1):
            blocks += [
                layers.Conv2D(
                    features, 3, padding="same", activation="relu", kernel_regularizer=l2,
                    name=f"conv{i}",
                ),
                layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, name=f"norm{i}"),
            ]  # fmt: skip
            if i < len(FEATURES):
                blocks.append(layers.MaxPooling2D())
        blocks += [
            layers.GlobalAveragePooling2D(),
            layers.Dense(DENSE, activation="relu", kernel_regularizer=l2, name="dense"),
            layers.Dropout(task.dropout),
            layers.Dense(CLASSES, kernel_regularizer=l2, dtype=head, name="head"),
        ]
        self._net = keras.Sequential([keras.Input(task.images.shape[1:], dtype="uint8"), *blocks])
        self._loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=LABEL_SMOOTHING, dtype=head
        )
        self._net.compile(keras.optimizers.Adam(LEARNING_RATE), self._loss)
        for name, variable in self._variables().items():
            variable.assign(task.weights[name])
        self._images, self._labels = task.images, np.eye(CLASSES, dtype=np.float32)[task.labels]

    def _variables(self) -> dict[str, Any]:
        ours = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
        variables = {}
        for variable in self._net.variables:
            if "seed" in variable.path:
                continue
            layer, name = variable.path.split("/")[-2:]
            kind = "batch_stats" if name.startswith("moving") else "params"
            variables[f"{kind}/{layer}/{ours.get(name, name)}"] = variable
        return variables

    def loss_and_gradients(self) -> tuple[float, Arrays]:
        trained = {n: v for n, v in self._variables().items() if n.startswith("params")}
        if self._keras.backend.backend() == "tensorflow":
            import tensorflow as tf  # pyright: ignore

            with tf.GradientTape() as tape:
                loss = self._loss(self._labels, self._net(self._images, training=True))
                total = loss + sum(self._net.losses)
            values = tape.gradient(total, [v.value for v in trained.values()])
        else:
            import jax

            net = self._net
            fixed = [v.value for v in net.non_trainable_variables]

            def total_loss(params: list[Any]) -> tuple[Any, Any]:
                logits, _, losses = net.stateless_call(
                    params, fixed, self._images, training=True, return_losses=True
                )
                loss = self._loss(self._labels, logits)
                return loss + sum(losses), loss

            (_, loss), variable_gradients = jax.value_and_grad(total_loss, has_aux=True)(
                [v.value for v in net.trainable_variables]
            )
            paths = [v.path for v in net.trainable_variables]
            path_gradients = dict(zip(paths, variable_gradients, strict=True))
            values = [path_gradients[v.path] for v in trained.values()]
        return float(loss), {
            name: np.asarray(value) for name, value in zip(trained, values, strict=True)
        }

    def train(self) -> None:
        self._net.train_on_batch(self._images, self._labels)

    def predict(self) -> np.ndarray:
        logits = np.asarray(self._net.predict_on_batch(self._images))
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)


class OnnxRuntime(Peer):
    """ONNX Runtime with this project's ONNX export, for inference only.

    With one processor core, ONNX Runtime gets one thread; otherwise it has its default settings.
    """

    needs_cnn_jax = True

    def __init__(self, task: Task):
        import onnxruntime  # pyright: ignore

        from cnn_jax.export.function import flat_function
        from cnn_jax.export.onnx_model import images_model

        predictor = _make_predictor(dataclasses.replace(task, precision="float32"))
        model = images_model(flat_function(predictor), predictor).SerializeToString()
        options = onnxruntime.SessionOptions()
        if sys.platform == "linux" and len(os.sched_getaffinity(0)) == 1:
            options.intra_op_num_threads = 1
        available = onnxruntime.get_available_providers()
        self._session = onnxruntime.InferenceSession(model, options, providers=available)
        self._images = task.images

    def predict(self) -> np.ndarray:
        return np.asarray(self._session.run(None, {"images": self._images})[0])


PEERS: dict[str, type[Peer]] = {
    "cnn_jax": Ours,
    # The training step of this project with Flax Linen's layers and XLA's default options.
    "plain Linen": variant("Conv", "BatchNorm", "max_pool_2x2", without=""),
    "PyTorch": Torch,
    "torch.compile": CompiledTorch,
    "Keras on JAX": Keras,
    "Keras on TensorFlow": Keras,
    "ONNX Runtime": OnnxRuntime,
    "cnn_jax with nn.Conv": variant("Conv"),
    "cnn_jax with nn.BatchNorm": variant("BatchNorm"),
    "cnn_jax with nn.max_pool": variant("max_pool_2x2"),
    "cnn_jax without oneDNN": variant(without="onednn"),
    "cnn_jax on XLA as it is": variant(without=""),
}


def _nested(flat: Arrays) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any]) -> Arrays:
    return {
        f"params/{layer}/{name}": np.asarray(value)
        for layer, arrays in tree.items()
        for name, value in arrays.items()
    }


class Answers:
    """Answers the requests of a benchmark to the library NAME; see `common.answer_requests`."""

    def __init__(self, name: str):
        if name.startswith("Keras"):
            os.environ["KERAS_BACKEND"] = name.split()[-1].lower()
        self._make = PEERS[name]

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "open":
            task = load_task(request["data"], request["precision"], request["dropout"])
            self._peer = self._make(task)
            return {}
        peer = self._peer
        if action == "gradients":
            with peer.exact():
                loss, gradients = peer.loss_and_gradients()
            np.savez(request["to"], allow_pickle=False, **gradients)
            return {"loss": loss}
        if action == "probabilities":
            with peer.exact():
                np.savez(request["to"], probabilities=peer.predict())
            return {}
        if action == "memory":
            return {"peak_bytes": peer.peak_bytes()}
        if action == "digest":
            assert isinstance(peer, Ours)
            return {"digest": peer.digest()}
        run = {"train": peer.train, "predict": peer.predict}[action]
        return {"seconds": seconds_of_each(run, request["times"])}


if __name__ == "__main__":
    answer_requests(Answers(sys.argv[1]))
