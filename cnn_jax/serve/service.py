"""What all protocols share: which version answers, and how images become answers."""

import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated

import numpy as np
from fastapi import Path, Request

from cnn_jax.data import decode
from cnn_jax.data.decode import Pixels
from cnn_jax.serve.engine import Computed, Engine
from cnn_jax.serve.limits import Bodies, Limits, Refused
from cnn_jax.serve.metrics import Measures
from cnn_jax.serve.request_log import RequestLog
from cnn_jax.serve.versions import Version
from cnn_jax.system.errors import DataError

# A version's number in a path.
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]
# Versions of a model that are remembered when they are gone.
_MOST_GONE = 20
# What a model's version goes through, as TensorFlow Serving calls it.
LOADING, AVAILABLE, UNLOADING, END = "LOADING", "AVAILABLE", "UNLOADING", "END"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a version says of an image.

    Attributes:
      probabilities: float32 [classes].
      pixels: The image as the network has seen it.
      explanation: The map of the most probable class, float32 [height, width], if asked for.
      decode_seconds: From the bytes to pixels.
      queue_seconds: For which it has waited for its turn, to be decoded and computed.
      compute_seconds: That its batch has taken.
      batch_size: Images that were computed together.
    """

    probabilities: np.ndarray
    pixels: Pixels
    explanation: np.ndarray | None
    decode_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_size: int


class Models:
    """The versions that can be asked, each by its number or an alias of it."""

    def __init__(self):
        self._versions: dict[str, dict[int, Version]] = {}
        # The first alias of a model is the one by which it answers who names none.
        self._aliases: dict[str, dict[str, int]] = {}
        # Why a version is not there, or nothing; END once it is gone.
        self._states: dict[str, dict[int, tuple[str, str]]] = {}
        # Models without which the server is not ready.
        self._required: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._states)

    def is_ready(self, model: str | None = None) -> bool:
        """Whether a model, or each of those that must be there, answers who names no version."""
        names = self._required if model is None else {model}
        return bool(names) and all(self.default(name) is not None for name in names)

    def states(self, model: str) -> dict[int, tuple[str, str]]:
        """Of each version that there is or was: its state, and what is wrong with it.

        Raises:
          Refused: There is no such model.
        """
        self._check(model)
        return dict(self._states[model])

    def present(self, model: str) -> dict[int, Version]:
        """The versions of a model that can be asked."""
        return dict(self._versions.get(model, {}))

    def aliases(self, model: str) -> dict[str, int]:
        """Those whose versions are there."""
        present = self._versions.get(model, {})
        return {
            a: number for a, number in self._aliases.get(model, {}).items() if number in present
        }

    def find(
        self, model: str | None = None, version: int | None = None, alias: str | None = None
    ) -> Version:
        """A version that is there.

        Args:
          model: Its name; the only one, if none is given.
          version: Its number.
          alias: Instead of a number; without either it is the one that the model answers by.

        Raises:
          Refused: There is none.
        """
        if not self.names:
            raise Refused(503, "not_ready", "the server has not begun yet", retry_after="1")
        if model is None:
            # One that has never answered yet is none to choose from.
            names = [name for name in self.names if self.default(name)] or self.names
            if len(names) != 1:
                raise Refused(400, "no_model", f"name a model, one of {', '.join(names)}")
            (model,) = names
        self._check(model)
        present = self._versions.get(model, {})
        if alias is not None:
            version = self.aliases(model).get(alias)
            if version is None:
                raise Refused(404, "no_version", f"{model} has no version {alias!r} here")
        if version is not None:
            if version not in present:
                raise Refused(404, "no_version", f"{model} has no version {version} here")
            return present[version]
        default = self.default(model)
        if default is None:
            raise Refused(503, "not_ready", f"{model} is not ready", retry_after="1")
        return default

    def default(self, model: str) -> Version | None:
        """The version by which a model answers who names none."""
        numbers = list(self._aliases.get(model, {}).values())
        return self._versions.get(model, {}).get(numbers[0]) if numbers else None

    def _check(self, model: str) -> None:
        if model not in self._states:
            raise Refused(404, "no_model", f"there is no model {model!r} here")

    # What the loader tells.

    def expect(self, model: str, is_required: bool) -> None:
        """A model will be here, without which the server may not be ready."""
        self._states.setdefault(model, {})
        if is_required:
            self._required.add(model)

    def note(self, model: str, number: int, state: str, problem: str = "") -> None:
        """A version is in a state, or was to come and cannot."""
        states = self._states.setdefault(model, {})
        states.pop(number, None)
        states[number] = state, problem
        gone = [number for number, (of_it, _) in states.items() if of_it == END]
        for oldest in gone[:-_MOST_GONE]:
            del states[oldest]

    def forget(self, model: str) -> None:
        """A model is not here any more; its versions were dropped."""
        for by_model in (self._versions, self._aliases, self._states):
            by_model.pop(model, None)
        self._required.discard(model)

    def bring(self, version: Version) -> None:
        """A version can be asked by its number."""
        self._versions.setdefault(version.model, {})[version.number] = version
        self.note(version.model, version.number, AVAILABLE)

    def point(self, model: str, aliases: Mapping[str, int]) -> None:
        """From now on these are a model's aliases, the first of them the one it answers by."""
        self._aliases[model] = dict(aliases)

    def drop(self, model: str, number: int) -> Version:
        """A version that no new request gets from now on."""
        self.note(model, number, UNLOADING)
        return self._versions[model].pop(number)


class Service:
    """Answers images by versions, within limits.

    Attributes:
      models: What can be asked.
      engine: Where it is computed.
      limits: Of requests.
      measures: Which are counted.
      is_leaving: Whether the server is about to end.
    """

    def __init__(
        self,
        models: Models,
        engine: Engine,
        limits: Limits,
        measures: Measures,
        request_log: RequestLog | None = None,
    ):
        self.models = models
        self.engine = engine
        self.limits = limits
        self.measures = measures
        self.is_leaving = False
        self._request_log = request_log
        self._bodies = Bodies(limits)

    @contextlib.asynccontextmanager
    async def body(self, request: Request, version: Version) -> AsyncIterator[bytes]:
        """The body of a request to a version, both of which are held to the end of the block.

        Raises:
          Refused: It is too large or too slow, or there is no room for it.
          ClientLeft: It will not come to its end.
        """
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            message = "a body must be sent as it is, without a Content-Encoding"
            raise Refused(415, "encoding", message, accept_encoding="identity")
        length = request.headers.get("content-length")
        deadline = request.state.deadline
        with version.used():
            async with self._bodies.read(request.receive, length, deadline) as body:
                yield body

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here."""
        return self.is_able and self.models.is_ready()

    @property
    def is_able(self) -> bool:
        """Whether requests to a version that is there should come here."""
        return not self.is_leaving and self.engine.is_alive

    def leave(self) -> None:
        """Notes that the server is about to end: it is not ready any more."""
        self.is_leaving = True

    def expose(self) -> bytes:
        """The figures for Prometheus."""
        self.measures.inside.set(self.engine.inside)
        self.measures.body_bytes.set(self._bodies.held)
        if self._request_log is not None:
            self.measures.lost_rows.set(self._request_log.lost)
        return self.measures.expose()

    async def answer(
        self,
        version: Version,
        images: Sequence[bytes | np.ndarray],
        request: Request,
        explain: bool = False,
    ) -> list[Answer | DataError]:
        """What a version says of images, of each for itself.

        Args:
          version: Which one, that is held.
          images: Image files, or pixels, uint8 [h, w, 3].
          request: Whose they are; its state has its id, and its deadline in seconds of
            `time.monotonic`.
          explain: Whether with a map of each.

        Returns:
          For each image an answer, or why it has none.

        Raises:
          Refused: There are too many images.
          Overloaded: There is no room for them now.
          Late: There was too little time.
        """
        if not images:
            raise Refused(400, "no_image", "there is no image in the request")
        most = self.limits.explained if explain else self.limits.images
        if len(images) > most:
            what = "images with a map" if explain else "images"
            raise Refused(413, "too_many", f"a request may have {most} {what}, not {len(images)}")
        program = version.explained if explain else version.probabilities
        told = {"model": version.model, "version": version.number, "images": len(images)}
        request.state.told.update(told)
        reads = [functools.partial(version.read, image) for image in images]
        with self.engine.admitted(len(images)):
            found = await self.engine.compute(program, reads, request.state.deadline)
        return [
            one if isinstance(one, DataError) else self._answer(version, one, request, explain)
            for one in found
        ]

    def _answer(
        self, version: Version, computed: Computed, request: Request, explain: bool
    ) -> Answer:
        """An answer, which is counted and noted."""
        probabilities, explanation = computed.result if explain else (computed.result, None)
        predicted = version.class_names[int(np.argmax(probabilities))]
        self.measures.predictions.labels(version.model, version.number, predicted).inc()
        if self._request_log is not None:
            request_id = request.state.request_id
            self._request_log.offer(version, request_id, computed.pixels, probabilities)
        return Answer(
            probabilities=probabilities,
            pixels=computed.pixels,
            explanation=explanation,
            decode_seconds=computed.decoded,
            queue_seconds=computed.queued,
            compute_seconds=computed.computed,
            batch_size=computed.together,
        )


def rows_of(answers: Sequence[Answer | DataError], what: str) -> list[np.ndarray]:
    """The probabilities of all images, for protocols in which one error is that of all.

    Args:
      answers: Of the service.
      what: An image is called.

    Returns:
      float32 [classes] for each.

    Raises:
      Refused: An image cannot be used.
    """
    rows = []
    for place, answer in enumerate(answers):
        if isinstance(answer, DataError):
            refused = error_of(answer)
            raise Refused(refused.status, refused.reason, f"{what} {place}: {refused}")
        rows.append(answer.probabilities)
    return rows


def error_of(error: DataError) -> Refused:
    """How a client is told that an image cannot be used."""
    if isinstance(error, decode.TooManyPixelsError):
        return Refused(413, "too_many_pixels", f"the image {error}")
    if isinstance(error, decode.UnknownFormatError):
        return Refused(415, "format", "this is no image of a known format (such as JPEG or PNG)")
    return Refused(422, "damaged", f"the image {error}")
