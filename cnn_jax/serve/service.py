"""The service that all protocols use to select a version and to predict the classes of images."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
from fastapi import Path, Request

from cnn_jax.data import decode
from cnn_jax.registry.split import CHALLENGER_ARM, CHAMPION_ARM, Experiment
from cnn_jax.serve.engine import Computed, DeadlineExceeded, Engine, Program
from cnn_jax.serve.image_size import count_pixels
from cnn_jax.serve.limits import Bodies, Limits, Refused
from cnn_jax.serve.metrics import ServerMetrics
from cnn_jax.serve.responses import new_request_id
from cnn_jax.serve.versions import Output, Version
from cnn_jax.system.errors import DataError

if TYPE_CHECKING:  # Importing pyarrow would delay the start of a server without a request log.
    from cnn_jax.serve.request_log import RequestLog

logger = logging.getLogger(__name__)
T = TypeVar("T")
# The client of the predictions of all challengers whose answers are dropped, for the limits.
_SHADOW = "shadow"
# The type of a version number in the path of a URL.
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]
# For each model, the states of at most this number of unloaded versions are kept.
_MAX_ENDED = 20
# An image with at most this number of pixels is decoded even if it has more pixels than its first
# bytes say. For example, the tiles of a small TIFF file may be larger than the image.
_SMALL_PIXELS = 512 * 512
# The states of a version, with the names that TensorFlow Serving uses.
LOADING, AVAILABLE, UNLOADING, END = "LOADING", "AVAILABLE", "UNLOADING", "END"


class Models:
    """The loaded versions of all models, by number and by alias."""

    def __init__(self):
        self._versions: dict[str, dict[int, Version]] = {}
        # The version of a model's first alias is the default version of the model.
        self._aliases: dict[str, dict[str, int]] = {}
        self._experiments: dict[str, Experiment | None] = {}
        # The state of each version, by model and number: the state, the problem, and when the state
        # began. The problem says why a version could not be loaded; "" means that there is none.
        self._states: dict[str, dict[int, tuple[str, str, float]]] = {}
        # The models that must be ready before the server counts as ready.
        self._required: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._states)

    def is_ready(self, model: str | None = None) -> bool:
        """Returns whether the default version of a model is loaded.

        Without a name, returns whether this holds for all required models.
        """
        names = set(self._required) if model is None else {model}
        return bool(names) and all(self.default(name) is not None for name in names)

    def loading(self) -> dict[tuple[str, int], float]:
        """Returns for how many seconds each version has been loading."""
        # The copies are needed because another thread may call this method.
        return {
            (model, number): time.monotonic() - start
            for model, states in self._states.copy().items()
            for number, (state, _, start) in states.copy().items()
            if state == LOADING
        }

    def states(self, model: str) -> dict[int, tuple[str, str]]:
        """Returns (state, problem) by version number, for loaded and recently unloaded versions.

        Raises:
          Refused: The model does not exist.
        """
        self._check(model)
        return {number: state[:2] for number, state in self._states[model].items()}

    def loaded(self, model: str) -> dict[int, Version]:
        """Returns the loaded versions of a model, by number."""
        return dict(self._versions.get(model, {}))

    def aliases(self, model: str) -> dict[str, int]:
        """Returns the version number of each alias whose version is loaded."""
        loaded = self._versions.get(model, {})
        return {a: number for a, number in self._aliases.get(model, {}).items() if number in loaded}

    def find(
        self, model: str | None = None, version: int | None = None, alias: str | None = None
    ) -> Version:
        """Returns the loaded version that a request selects, by default the default version.

        Args:
          model: The name of the model. It may be None if the server has only one model.
          version: The number of the version.
          alias: An alias instead of a number.

        Raises:
          Refused: The model or version does not exist or is not loaded.
        """
        if not self.names:
            raise Refused(503, "not_ready", "the server is starting", retry_after="1")
        if model is None:
            # Select among the models that are ready, or among all models if no model is ready.
            names = [name for name in self.names if self.default(name)] or self.names
            if len(names) != 1:
                raise Refused(400, "no_model", f"name a model: one of {', '.join(names)}")
            (model,) = names
        self._check(model)
        loaded = self._versions.get(model, {})
        if version is not None or alias is not None:
            number = version if alias is None else self.aliases(model).get(alias)
            if number is None or number not in loaded:
                name = version if alias is None else alias
                raise Refused(404, "no_version", f"{model} has no version {name!r} here")
            return loaded[number]
        default = self.default(model)
        if default is None:
            raise Refused(503, "not_ready", f"{model} is not ready", retry_after="1")
        return default

    def default(self, model: str) -> Version | None:
        """Returns the default version of a model, or None if it is not loaded."""
        numbers = list(self._aliases.get(model, {}).values())
        return self._versions.get(model, {}).get(numbers[0]) if numbers else None

    def default_alias(self, model: str) -> str | None:
        """Returns the alias whose version is the default version of a model."""
        return next(iter(self._aliases.get(model, {})), None)

    def experiment(self, model: str) -> tuple[Experiment, Version] | None:
        """Returns the running experiment of a model, and its challenger.

        Returns None until both versions of the experiment are loaded. Otherwise one arm would have
        the answers of another version.
        """
        experiment, default = self._experiments.get(model), self.default(model)
        if experiment is None or default is None or default.number != experiment.champion:
            return None
        challenger = self._versions[model].get(experiment.challenger)
        return None if challenger is None else (experiment, challenger)

    def _check(self, model: str) -> None:
        if model not in self._states:
            raise Refused(404, "no_model", f"there is no model {model!r} here")

    # The loader calls the methods below.

    def add_model(self, model: str, is_required: bool) -> None:
        """Adds a model, unless it exists; a required model must be ready before the server is."""
        self._states.setdefault(model, {})
        if is_required:
            self._required.add(model)

    def set_state(self, model: str, number: int, state: str, problem: str = "") -> None:
        """Sets the state of a version, and the reason if the version could not be loaded."""
        states = self._states.setdefault(model, {})
        states.pop(number, None)
        states[number] = state, problem, time.monotonic()
        ended = [number for number, (state, _, _) in states.items() if state == END]
        for oldest in ended[:-_MAX_ENDED]:
            del states[oldest]

    def remove_model(self, model: str) -> None:
        """Removes a model, after all versions of the model have been removed."""
        for values in (self._versions, self._aliases, self._states, self._experiments):
            values.pop(model, None)
        self._required.discard(model)

    def add_version(self, version: Version) -> None:
        """Makes a loaded version available to requests."""
        self._versions.setdefault(version.model, {})[version.number] = version
        self.set_state(version.model, version.number, AVAILABLE)

    def set_aliases(self, model: str, aliases: Mapping[str, int]) -> None:
        """Sets the aliases of a model; the version of the first alias is the default version."""
        self._aliases[model] = dict(aliases)

    def set_experiment(self, model: str, experiment: Experiment | None) -> None:
        """Sets the experiment that splits the requests for the default version of a model."""
        self._experiments[model] = experiment

    def remove_version(self, model: str, number: int) -> Version:
        """Removes and returns a version; only the requests in flight still use the version."""
        self.set_state(model, number, UNLOADING)
        return self._versions[model].pop(number)


class Service:
    """Predicts the classes of the images in requests, and enforces the limits of requests.

    Attributes:
      models: The loaded versions.
      engine: The engine that computes.
      limits: The limits of requests.
      metrics: The Prometheus metrics.
      is_shutting_down: Whether the server has received a signal to end.
      request_log: The log that records answers and feedback; None if there is none.
    """

    def __init__(
        self,
        models: Models,
        engine: Engine,
        limits: Limits,
        metrics: ServerMetrics,
        request_log: "RequestLog | None" = None,
    ):
        self.models = models
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.is_shutting_down = False
        self.request_log = request_log
        self._bodies = Bodies(limits)
        self._shadow_tasks: set[asyncio.Task[None]] = set()

    def select(
        self,
        request: Request,
        model: str | None = None,
        version: int | None = None,
        alias: str | None = None,
    ) -> Version:
        """Returns the version that a request selects; see `Models.find`.

        An experiment may select another version, unless the request names a version or an alias.

        Stores for the request log: `arm`, the alias that selected the version, or the arm of the
        experiment, or None if the request names a number; and `shadow`, the experiment and the
        challenger that also predicts the images, or None.
        """
        found, state = self.models.find(model, version, alias), request.state
        is_default = version is None and alias is None
        state.arm = self.models.default_alias(found.model) if is_default else alias
        state.model, state.shadow = found.model, None
        running = self.models.experiment(found.model) if is_default else None
        if running is None:
            return found
        experiment, challenger = running
        if experiment.is_shadow:
            if experiment.arm(state.unit or state.request_id) == CHALLENGER_ARM:
                state.arm, state.shadow = experiment.column(CHAMPION_ARM), running
            return found
        if state.unit is None:
            return found
        arm = experiment.arm(state.unit)
        state.arm = experiment.column(arm)
        return challenger if arm == CHALLENGER_ARM else found

    @contextlib.asynccontextmanager
    async def body(self, request: Request, version: Version | None = None) -> AsyncIterator[bytes]:
        """Reads a request's body; keeps the body and the version in memory until the context ends.

        Raises:
          Refused: The body is too large, too slow or encoded, or too many bodies are in memory.
          ClientDisconnected: The client disconnected before the end of the body.
        """
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            message = "a body must be sent without a Content-Encoding"
            raise Refused(415, "encoding", message, accept_encoding="identity")
        length = request.headers.get("content-length")
        deadline = request.state.deadline
        with contextlib.nullcontext() if version is None else version.hold():
            async with self._bodies.read(
                request.receive, length, deadline, request.state.client
            ) as body:
                yield body

    async def parse(self, call: Callable[[], T], request: Request) -> T:
        """Calls a function on a thread that parses one body at a time.

        Raises:
          DeadlineExceeded: The deadline of the request passed before the function returned.
        """
        return await self.engine.run_on_parser(call, request.state.deadline, request.state.client)

    @property
    def is_ready(self) -> bool:
        """Returns whether the server can answer requests for all required models."""
        return self.is_serving and self.models.is_ready()

    @property
    def is_serving(self) -> bool:
        """Returns whether the server can answer: it is not shutting down, and no batch hangs."""
        return not self.is_shutting_down and self.engine.is_alive

    def begin_shutdown(self) -> None:
        """Makes the server report that it is not ready; requests are still answered."""
        self.is_shutting_down = True

    def expose(self) -> bytes:
        """Returns the metrics in Prometheus's text format."""
        self.metrics.images_in_flight.set(self.engine.in_flight)
        self.metrics.body_bytes.set(self._bodies.num_bytes)
        if self.request_log is not None:
            self.metrics.lost_rows.set(self.request_log.lost_rows)
        return self.metrics.expose(self.models.loading())

    async def answer(
        self,
        version: Version,
        images: Sequence[bytes | np.ndarray],
        request: Request,
        explain: bool = False,
    ) -> list[Computed | DataError]:
        """Predicts the classes of images.

        Args:
          version: The version to use. The caller keeps it in memory with `Version.hold`.
          images: For each image, an image file or pixels, uint8 [h, w, 3].
          request: The request that contains the images.
          explain: Whether to compute the explanation map of each image.

        Returns:
          For each image, a `Computed` whose result is an `Output`; for an image that cannot be
          used, an error.

        Raises:
          Refused: The request has too many images, or none.
          Overloaded: Too many images are in flight.
          DeadlineExceeded: The deadline passed before all images were computed.
        """
        self.limits.check_count(len(images), explain)
        program = version.explain_program if explain else version.predict_program
        if program is None:
            message = f"{version.model}, version {version.number} is an exported model without maps"
            raise Refused(400, "explain", f"{message}; maps need the bundle")
        fields = {"model": version.model, "version": version.number, "images": len(images)}
        request.state.log_fields.update(fields)
        pixels = [self._count_pixels(image) for image in images]
        state = request.state
        if sum(pixels) > (limit := self.limits.request_pixels):
            message = f"the images of a request may have at most {limit:,} pixels together"
            raise Refused(413, "too_many_pixels", f"{message}; send them in several requests")
        results = await self._compute(
            version, program, images, pixels, state.deadline, state.client
        )
        ids = {"request_id": state.request_id, "unit": state.unit, "arm": state.arm}
        self._record(version, results, ids)
        if state.shadow is not None:
            experiment, challenger = state.shadow
            shadow = self._compute_shadow(experiment, challenger, images, pixels, ids)
            task = asyncio.create_task(shadow)
            self._shadow_tasks.add(task)
            task.add_done_callback(self._shadow_tasks.discard)
        return results

    async def _compute(
        self,
        version: Version,
        program: Program,
        images: Sequence[bytes | np.ndarray],
        pixels: Sequence[int],
        deadline: float,
        client: str,
    ) -> list[Computed | DataError]:
        """Decodes images and computes their predictions; a wrong image gives an error instead."""
        # Refuse a hostile file that has more pixels than its first bytes say, because its decoding
        # would take more time than the request was admitted for.
        reads = [
            functools.partial(version.read, image, max(size, _SMALL_PIXELS))
            for image, size in zip(images, pixels, strict=True)
        ]
        with self.engine.admit(len(images), sum(pixels), client):
            return await self.engine.compute(program, reads, deadline, pixels, client)

    async def _compute_shadow(
        self,
        experiment: Experiment,
        challenger: Version,
        images: Sequence[bytes | np.ndarray],
        pixels: Sequence[int],
        ids: Mapping[str, str | None],
    ) -> None:
        """Records the predictions of a challenger whose answer is dropped."""
        arm = experiment.column(CHALLENGER_ARM)
        ids = {**ids, "request_id": new_request_id(), "arm": arm, "shadow_of": ids["request_id"]}
        deadline = time.monotonic() + self.limits.seconds
        program = challenger.predict_program
        size = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in images)
        try:
            with challenger.hold(), self._bodies.hold(size, _SHADOW):
                results = await self._compute(
                    challenger, program, images, pixels, deadline, _SHADOW
                )
        except DeadlineExceeded:
            self.record_failure(challenger.model, ids, "late")
        except Refused:
            # The server has too much other work; this is no failure of the challenger.
            self.metrics.shadow_skipped.labels(challenger.model).inc()
        except Exception:
            logger.exception("the challenger failed on request %s", ids["shadow_of"])
            self.record_failure(challenger.model, ids, "internal")
        else:
            self._record(challenger, results, ids)

    def record_failure(self, model: str, ids: Mapping[str, str | None], reason: str) -> None:
        """Records that an arm of an experiment has not answered, for `cnn_jax experiment`.

        Args:
          model: The name of the model.
          ids: The "request_id", "unit" and "arm" of the request.
          reason: The reason of the error response.
        """
        if self.request_log is not None and "/" in (ids["arm"] or ""):
            row = {name: ids[name] for name in ("request_id", "unit", "arm")}
            self.request_log.record_failure(row | {"model": model, "reason": reason})

    def _count_pixels(self, image: bytes | np.ndarray) -> int:
        """Returns the number of pixels of an image, according to its first bytes.

        An image whose size is unknown, or above the limit, counts as an image of the maximum size.
        """
        if isinstance(image, np.ndarray):
            return image.shape[0] * image.shape[1]
        pixels = count_pixels(image)
        return self.limits.pixels if pixels is None else min(pixels, self.limits.pixels)

    def _record(
        self,
        version: Version,
        results: Sequence[Computed | DataError],
        ids: Mapping[str, str | None],
    ) -> None:
        """Records the predictions for images in the metrics and in the request log.

        Args:
          version: The version that has predicted the images.
          results: The results of the images of a request.
          ids: The columns of the request log that describe the request.
        """
        for index, computed in enumerate(results):
            if not isinstance(computed, Computed):
                continue
            output: Output = computed.result
            predicted = version.class_names[int(np.argmax(output.probabilities))]
            self.metrics.predictions.labels(version.model, version.number, predicted).inc()
            if self.request_log is not None:
                self.request_log.record(
                    image_index=index,
                    version=version,
                    pixels=computed.pixels,
                    probabilities=output.probabilities,
                    embedding=output.embedding,
                    milliseconds=1000 * computed.seconds,
                    **ids,
                )


def probability_rows(answers: Sequence[Computed | DataError], name: str) -> list[np.ndarray]:
    """Returns the probabilities of each image, float32 [classes].

    An error message names an image with the word `name`.

    Raises:
      Refused: An image cannot be used.
    """
    rows = []
    for index, answer in enumerate(answers):
        if isinstance(answer, DataError):
            refused = image_refusal(answer)
            raise Refused(refused.status, refused.reason, f"{name} {index}: {refused}")
        rows.append(answer.result.probabilities)
    return rows


def image_refusal(error: DataError) -> Refused:
    """Converts the error of an unusable image to an HTTP error."""
    if isinstance(error, decode.TooManyPixelsError):
        return Refused(413, "too_many_pixels", f"the image {error}")
    if isinstance(error, decode.UnknownFormatError):
        return Refused(415, "format", "not an image of a known format (such as JPEG or PNG)")
    return Refused(422, "damaged", f"the image {error}")
