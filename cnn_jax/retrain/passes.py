"""One pass of `cnn_jax retrain`: watch the promoted version, decide, train, judge, promote."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_jax.config import files, schema
from cnn_jax.config.resolve import bundle_values, resolve
from cnn_jax.config.schema import LOG_MARK, SPLITS, Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.join import count_usable
from cnn_jax.data.labelled_log import (
    Examples,
    KnownImage,
    read_examples,
    read_known,
    read_snapshot,
    write_known,
    write_snapshot,
)
from cnn_jax.data.request_log import Key, read_requests, read_valid_feedback
from cnn_jax.data.sources import absolute
from cnn_jax.experiment.replay import NoLabelsError, replay
from cnn_jax.inference.bundle import Bundle, digest, read_bundle, read_reference
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.monitor.rows import growing_sample, read_rows
from cnn_jax.monitor.windows import measure
from cnn_jax.registry.evidence import NotComparedError, compare_with_history
from cnn_jax.registry.ledger import CHAMPION, Entry, Gates, RegistryError, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.retrain.attempts import (
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    STARTED,
    Attempt,
    State,
    attempt_key,
    now,
    open_state,
)
from cnn_jax.system.atomic import write_text
from cnn_jax.system.console import Console
from cnn_jax.system.errors import BundleError, ConfigError, DataError, DivergedError, printable
from cnn_jax.training.loop import open_dataset, train_and_evaluate
from cnn_jax.training.run_directory import INDIFFERENT_KEYS

logger = logging.getLogger(__name__)

EPOCHS = 4
# The action of a pass that changes nothing. The other actions are the states of an attempt.
NOTHING = "nothing"
# The advice of errors about missing snapshots.
_RESTORE = "restore the folder, because later attempts need the splits of its images"
# Each version that an attempt adds or promotes has a note: this text and the key of the attempt.
_NOTE = "retrain: attempt "
# The number of earlier champions that a new version is compared with.
_HISTORY = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a pass that are the same for all its parts.

    Attributes:
      model: The name of the model. The version with the alias "champion" is retrained.
      source: The name of the training data, without request logs.
      logs: The folders of the request logs.
      triggers: One or more of "harm", "labels" and "always".
      min_new: The number of new labelled images for the trigger "labels".
      margin: The difference in accuracy that a promotion accepts, above 0 and below 1.
      keep: The number of latest attempts whose images and networks are kept.
      drift: The arguments of `monitor.windows.measure` after the reference.
      recipe: The configuration of the training, as for `--config`.
      overrides: Values of configuration keys, as text, by key.
    """

    model: str
    source: str
    logs: Sequence[str]
    triggers: Sequence[str]
    min_new: int
    margin: float
    keep: int
    drift: tuple[int, int, float, float]
    recipe: str = "default"
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a pass.

    Attributes:
      action: `NOTHING`, or the state in which the attempt of the pass has ended.
      text: The action and its reason, in one line.
      attempt: The record of the attempt, or None.
    """

    action: str
    text: str
    attempt: Mapping[str, Any] | None = None


def run_pass(
    registry: Registry, state: pathlib.Path, settings: Settings, console: Console
) -> Outcome:
    """Makes one pass. The same call after an interruption continues it.

    Args:
      registry: The registry of the model.
      state: The folder of the attempts.
      settings: The other arguments.
      console: Shows the progress.

    Raises:
      BusyError: Another pass with the same folder is running.
      RegistryError: There is no registry, no such model, or no champion.
      BundleError: The champion is damaged, or is no bundle with one network.
      ConfigError: A flag or a key is wrong, or the state folder belongs to another model.
      DataError: The data or a log cannot be used.
      TrainingError: Training cannot continue.
      Interrupted: The run was saved and stopped.
    """
    registry.resolve(settings.model)  # Before an error, no folder is created.
    _check_logs(settings)
    with (
        open_state(state, settings.model) as opened,
        tempfile.TemporaryDirectory(prefix="cnn_jax-") as downloads,
    ):
        registry.refresh()  # Another pass may have ended just before the folder was locked.
        champion = registry.resolve(settings.model)
        own = _Pass(registry, opened, settings, console, champion, pathlib.Path(downloads))
        own.complete_records()
        own.prune()
        return own.watch() or own.resume() or own.start()


def _check_logs(settings: Settings) -> None:
    """Raises DataError if a folder is not a request log, or no image is of the model."""
    tables = [read_requests(log, ["model"]) for log in settings.logs]
    models = {name for table in tables for name in table["model"].unique().to_pylist()}
    if models and settings.model not in models:
        raise DataError(
            f"--log: {', '.join(settings.logs)} has no images of the model {settings.model}; it "
            f"has: {printable(', '.join(sorted(models)))}"
        )


@dataclasses.dataclass
class _Pass:
    """The parts of a pass; each returns the outcome if the pass ends with it, else None.

    Attributes:
      registry: The registry of the model.
      state: The folder of the attempts.
      settings: The arguments of the pass.
      console: Shows the progress.
      champion: The champion at the start of the pass.
      downloads: A temporary folder for bundles of a remote registry.
    """

    registry: Registry
    state: State
    settings: Settings
    console: Console
    champion: Version
    downloads: pathlib.Path

    def complete_records(self) -> None:
        """Records which promoted versions were rolled back, also by a person."""
        for attempt in self.state.attempts():
            if attempt.status == PROMOTED:
                promotion = self._last_entry("promote", version=attempt.record["version"])
                if promotion and (reason := self._withdrawal(promotion)):
                    attempt.end(ROLLED_BACK, reason)

    def prune(self) -> None:
        """Deletes the images and the networks of attempts that no later attempt needs."""
        # A rollback makes the version before the champion again.
        history = self.registry.models[self.settings.model].aliases[CHAMPION]
        self.state.prune(self.settings.keep, history[-2:])

    def _withdrawal(self, promotion: Entry) -> str:
        """Returns the reason for which a promotion was rolled back, or ""."""
        entry = self._last_entry("rollback", before=promotion.version)
        if entry is None or entry.number < promotion.number:
            return ""
        return entry.note or f"rolled back by {_author(entry)}"

    def _last_entry(self, action: str, **fields: int | None) -> Entry | None:
        """Returns the last change of the champion with these fields in the registry's log."""
        return next(
            (
                entry
                for entry in self._moves()
                if entry.action == action
                and all(getattr(entry, name) == value for name, value in fields.items())
            ),
            None,
        )

    def watch(self) -> Outcome | None:
        """Rolls the champion back if retrain has promoted it and labels show that it is worse.

        Both versions predict the labelled images of a random sample of the images that the champion
        has answered since its promotion. Other labels may have been chosen by its answers, for
        example because users report mistakes; they would show that any version is worse than
        another one. The test may be repeated after every label.
        """
        champion, promotion = self.champion, next(self._moves())
        history = self.registry.models[champion.model].aliases[CHAMPION]
        is_own = promotion.action == "promote" and promotion.note.startswith(_NOTE)
        if not is_own or history[-2:] != (promotion.before, champion.number):
            return None
        attempt = self._find_attempt(champion)  # None if its state folder is another one.
        if attempt and attempt.status != PROMOTED:  # `resume` first completes the record.
            return None
        previous = self.registry.resolve(champion.model, history[-2])
        since = datetime.datetime.fromisoformat(promotion.time).timestamp()
        labels = self._sampled_labels(since)
        text = json.dumps(sorted(labels.items()))
        labels_digest = hashlib.sha256(text.encode()).hexdigest()
        if attempt and attempt.record.get("watch", {}).get("labels") == labels_digest:
            return None
        found: dict[str, Any]
        try:
            logs = self.settings.logs
            found = replay(self.registry, champion, previous, logs, since, keys=labels)
        except NoLabelsError:
            reason = "since the promotion, no image of the random sample has a label and its pixels"
            found = {"images": 0, "reason": reason}
        except (BundleError, ConfigError) as error:
            logger.warning("%s is not watched: %s", champion, error)
            return None
        found.pop("curve", None)
        found["labels"] = labels_digest
        # An earlier decision "better" must not end the watch.
        if not found["images"] or found["e_value_worse"] < found["threshold"]:
            if attempt:
                attempt.update(watch=found)
            return None
        self.registry.refresh()
        if next(self._moves()) != promotion:  # A person has just moved the alias.
            return None
        reason = (
            f"worse than version {previous.number} on {found['images']:,} labelled images since "
            f"the promotion: {found['gains']:,} gains, {found['losses']:,} losses, e-value "
            f"{found['e_value_worse']:.3g} (limit {found['threshold']:g})"
        )
        self.registry.rollback(
            champion.model, CHAMPION, f"retrain: {reason}", current=champion.number
        )
        if attempt:
            attempt.end(ROLLED_BACK, reason, watch=found)
        text = f"{champion.model}@{CHAMPION} is again version {previous.number}: {champion} is"
        return Outcome(ROLLED_BACK, f"{text} {reason}", attempt and attempt.record)

    def _moves(self) -> Iterator[Entry]:
        """Yields the entries of the registry's log that have moved the alias, the latest first."""
        for entry in reversed(self.registry.log):
            is_own = (entry.model, entry.alias) == (self.settings.model, CHAMPION)
            if is_own and entry.action in ("promote", "rollback"):
                yield entry

    def _sampled_labels(self, since: float) -> dict[Key, str]:
        """Returns the labels of a random sample of the images that the champion has answered.

        Args:
          since: The time of the first image, in seconds since the epoch.
        """
        logs = self.settings.logs
        columns = ("time", "request_id", "image_index", "digest", "shadow_of")
        # When a file is deleted, its rows with feedback are kept. They are not a random sample.
        tables = [read_requests(log, columns, since, with_labelled=False) for log in logs]
        own = (pc.field("digest") == self.champion.bundle.digest) & pc.field("shadow_of").is_null()
        rows = pa.concat_tables(tables).filter(own).sort_by("time").to_pylist()
        keys = [
            (row["request_id"], row["image_index"])
            for row in rows
            if row["time"].timestamp() >= since
        ]
        given = read_valid_feedback(logs, "label")
        sample = growing_sample(keys, np.array([key in given for key in keys], bool))
        return {keys[i]: given[keys[i]].value for i in np.flatnonzero(sample)}

    def _find_attempt(self, version: Version) -> Attempt | None:
        """Returns the attempt whose bundle is a version of the registry, or None."""
        return next(
            (a for a in self.state.attempts() if a.record.get("digest") == version.bundle.digest),
            None,
        )

    def resume(self) -> Outcome | None:
        """Continues the attempt that an earlier pass has not ended."""
        attempt = next((a for a in self.state.attempts() if a.status == STARTED), None)
        if attempt is None:
            return None
        if "digest" not in attempt.record:
            checked = self._open_unchanged(attempt)
            if isinstance(checked, Outcome):
                logger.warning("%s", checked.text)
                return None
        self.console.print(f"continues the attempt {attempt.folder.name}")
        return self._finish(attempt)

    def _open_unchanged(self, attempt: Attempt) -> Dataset | Outcome:
        """Opens the data of an attempt.

        If the data has changed since the attempt started, the attempt is removed, and the outcome
        is returned.

        Raises:
          DataError: The data cannot be used, or many of its images are missing.
        """
        config = files.read(attempt.config)
        dataset = open_dataset(resolve(config), self.console.track)
        trained = dataset.fingerprint
        if (attempt.run / "bundle").exists():
            trained = read_bundle(attempt.run / "bundle").data["fingerprint"]
        if dataset.fingerprint == trained == attempt.record["data"]:
            # Images on the device can be read on the host too.
            loader = dataclasses.replace(dataset.loader, on_device=False)
            return dataclasses.replace(dataset, loader=loader)
        # Images may be missing only for now, for example because a disk is not mounted.
        expected = attempt.record["images"]
        _check_complete(expected - len(dataset.source), expected, dataset, config)
        self.state.discard(attempt)
        text = (
            f"the attempt {attempt.folder.name} is given up, because {self.settings.source} has "
            "changed since it started"
        )
        return Outcome(NOTHING, text, attempt.record)

    def start(self) -> Outcome:
        """Makes a new attempt if there is a reason for it."""
        settings = self.settings
        folder = self.registry.fetch(self.champion, self.downloads)
        bundle = read_bundle(folder)
        last = next(reversed(self.state.attempts()), None)
        if last:
            earlier, known = _read_examples(last.data), _read_known(last.data)
        else:
            folders = self._log_folders(bundle)
            earlier = next(filter(None, map(read_snapshot, folders)), None)
            known = next(filter(None, map(read_known, folders)), {})
        examples = read_examples(
            settings.logs, bundle.class_names, model=settings.model, previous=earlier
        )
        # Copies of images of the source are still counted as new if they are not known; `_begin`
        # counts again.
        usable, new, left_out = count_usable(
            examples, bundle.class_names, bundle.preprocessing.image_size, known
        )
        if not usable:
            kinds = {**examples.left_out, **left_out}.items()
            texts = "".join(f"; {number:,} {kind}" for kind, number in kinds)
            return _nothing(f"no labelled image in the log{texts}")
        state = self._monitor(folder) if "harm" in settings.triggers else ""
        has_failed = last is not None and last.status in (REFUSED, ROLLED_BACK)
        reasons = _Reasons(settings.triggers, settings.min_new, state, has_failed)
        if not reasons.triggers(new):
            return _nothing(reasons.text(new))
        attempt = self.state.prepare()
        write_snapshot(examples, attempt.data)
        begun = self._begin(attempt, bundle, folder, reasons)
        return begun if isinstance(begun, Outcome) else self._finish(begun)

    def _begin(
        self, prepared: Attempt, bundle: Bundle, folder: pathlib.Path, reasons: "_Reasons"
    ) -> Attempt | Outcome:
        """Begins a prepared attempt, or returns the outcome of the pass if no reason is left.

        Args:
          prepared: The attempt, with its snapshot and without a key.
          bundle: The champion.
          folder: The folder of the champion's bundle.
          reasons: The reasons for an attempt.
        """
        settings, champion = self.settings, self.champion
        config = _configure(settings, bundle, prepared.data, folder)
        schema.validate(config, jax.device_count())
        # All images that were in a split before stay in it.
        known = self._champion_images(bundle)
        attempts = self.state.attempts()
        earlier = _read_known(attempts[-1].data) if attempts else {}
        write_known(earlier | known, prepared.data)
        dataset = open_dataset(resolve(config), self.console.track)
        if dataset.source.class_names != bundle.class_names:
            raise DataError(
                f"--source: {settings.source} has the classes "
                f"{printable(', '.join(dataset.source.class_names))}, and {champion} has "
                f"{printable(', '.join(bundle.class_names))}; train a new champion on this data"
            )
        images = _known_images(dataset)
        _check_complete(len(known.keys() - images.keys()), len(known), dataset, config)
        write_known(earlier | known | images, prepared.data)
        logged_images = {digest: one for digest, one in images.items() if one.is_logged}
        new = _count_new(logged_images, earlier if attempts else known)
        if not (triggers := reasons.triggers(new)):
            return _nothing(reasons.text(new))
        key = attempt_key(dataset.fingerprint, config)
        final = Attempt(self.state.folder(key), {})
        for attempt in attempts:
            if attempt.folder == final.folder:
                return _nothing(
                    f"the same data and configuration were {_words(attempt.status)} on "
                    f"{attempt.record['ended']} ({attempt.record['reason']})"
                )
        trained = {digest: one for digest, one in images.items() if one.split == "train"}
        if not _count_new(trained, known):
            return _nothing(
                "no image of the training split is new or has another label than in the training "
                f"of {champion}"
            )
        logged = Counter(image.split for image in logged_images.values())
        text = ", ".join(f"{logged[name]:,} in {name}" for name in SPLITS)
        self.console.print(f"labelled images of the log: {text}")
        self.registry.fetch(champion, prepared.champion, is_copy=True)
        config = _configure(settings, bundle, final.data, final.champion / champion.bundle.digest)
        text = json.dumps(json.loads(config.to_json()), indent=1, ensure_ascii=False)
        write_text(prepared.config, text + "\n")
        prepared.update(
            key=key,
            status=STARTED,
            reason="",
            started=now(),
            triggers=triggers,
            labelled=logged.total(),
            new=new,
            margin=settings.margin,
            data=dataset.fingerprint,
            images=len(dataset.source),
            logged={name: logged[name] for name in SPLITS},
            champion=champion.number,
        )
        return self.state.begin(prepared, key)

    def _log_folders(self, bundle: Bundle) -> list[pathlib.Path]:
        """Returns the folders of logged images with which the champion was trained.

        Raises:
          DataError: A folder is missing.
        """
        folders = [pathlib.Path(name) for name in bundle.data["source"].split(LOG_MARK)[1:]]
        if attempt := self._find_attempt(self.champion):
            folders = [attempt.data]  # The state folder may have been moved since the training.
        for folder in folders:
            if not folder.is_dir():
                raise DataError(
                    f"{folder}, on which {self.champion} was trained, is missing; {_RESTORE}"
                )
        return folders

    def _champion_images(self, bundle: Bundle) -> dict[str, KnownImage]:
        """Returns the images of the champion's training and of earlier ones, by digest.

        An attempt has stored them. Otherwise, the data must not have changed since the training.

        Raises:
          DataError: The splits of the images are unknown, or the data cannot be used.
        """
        for folder in self._log_folders(bundle):
            if (known := read_known(folder)) is not None:
                return known
        base, *logs = bundle.data["source"].split(LOG_MARK)
        source = absolute(self.settings.source)
        dataset = self._open_as_trained(bundle, [source, *logs])
        if dataset.fingerprint != bundle.data["fingerprint"] and base != source:
            with contextlib.suppress(ConfigError, DataError):  # It may no longer exist.
                dataset = self._open_as_trained(bundle, [base, *logs])
        if dataset.fingerprint != bundle.data["fingerprint"]:
            raise DataError(
                f"--source: {source} has changed since the training of {self.champion}, so it is "
                "unknown which images its network has seen; restore the data, or train a new "
                "champion with `cnn_jax train` and promote it"
            )
        return _known_images(dataset)

    def _open_as_trained(self, bundle: Bundle, parts: Sequence[str]) -> Dataset:
        name = LOG_MARK.join(parts)
        predictor = BundlePredictor(bundle)
        return open_as_trained(predictor, name, self.console.track, with_digests=True)

    def _monitor(self, folder: pathlib.Path) -> str:
        """Returns the state of the champion; see `monitor.windows.measure`.

        Raises:
          DataError: The bundle has no reference statistics.
        """
        reference = read_reference(folder)
        if reference is None:
            raise DataError(
                f"{self.champion}: the bundle has no reference statistics, which --when=harm "
                "needs; use --when=labels"
            )
        own, logs = self.champion.bundle.digest, self.settings.logs
        tables = [read_requests(log, ["digest"], with_labelled=False) for log in logs]
        if not any(own in table["digest"].unique().to_pylist() for table in tables):
            return "no_data"  # The champion has not answered any request yet.
        rows = read_rows(logs, own)
        for warning in rows.warnings:
            logger.warning("%s", warning)
        return measure(rows, reference, *self.settings.drift)["state"]

    def _finish(self, attempt: Attempt) -> Outcome:
        """Trains, adds, judges and promotes; steps that are done are not repeated."""
        registry, settings = self.registry, self.settings
        config = files.read(attempt.config)
        note = f"{_NOTE}{attempt.record['key']}"
        if outcome := self._end_repeated(attempt, note):
            return outcome
        data = None
        if "digest" not in attempt.record:
            try:
                train_and_evaluate(config, attempt.run, self.console)
            except DivergedError as error:  # It would diverge again.
                return self._end(attempt, REFUSED, f"the training diverged: {error}")
            except (ConfigError, DataError):
                if not (attempt.run / "config.json").exists():  # The training has not started.
                    self.state.discard(attempt)
                raise
            data = self._open_unchanged(attempt)
            if isinstance(data, Outcome):
                return data
            attempt.update(digest=digest(attempt.run / "bundle"))
        version = registry.add(settings.model, attempt.run / "bundle", note).version
        # A pass with another state folder may have added its version during the training.
        if outcome := self._end_repeated(attempt, note):
            return outcome
        # A killed pass may have promoted the version before it could write the record.
        promotion = self._last_entry("promote", version=version.number)
        if promotion is None:
            if outcome := self._wait(version, attempt):
                return outcome
            if data is None:  # The training was in an earlier pass.
                data = self._open_unchanged(attempt)
            if isinstance(data, Outcome):
                return data
            try:
                evidence = compare_with_history(
                    registry,
                    version,
                    CHAMPION,
                    config.data.source,
                    data,
                    attempt.record["margin"],
                    self._earlier_champions(version),
                    self.console.track,
                )
            except NotComparedError as error:
                return self._end(attempt, REFUSED, str(error), version=version.number)
            failed = [text for text, passes in evidence.comparisons.items() if not passes]
            if failed:
                facts = {"version": version.number, "evidence": dataclasses.asdict(evidence)}
                return self._end(attempt, REFUSED, "; ".join(failed), **facts)
            gates = Gates(evidence=evidence, no_experiment=True)
            try:
                registry.promote(settings.model, version.number, gates=gates, note=note)
            except RegistryError:
                if outcome := self._wait(version, attempt):  # The experiment has just started.
                    return outcome
                raise
            promotion = self._last_entry("promote", version=version.number)
        assert promotion is not None
        facts = {"version": version.number, "evidence": promotion.evidence}
        if reason := self._withdrawal(promotion):
            return self._end(attempt, ROLLED_BACK, reason, **facts)
        reason = "; ".join(promotion.gates) or f"promoted by {_author(promotion)}"
        return self._end(attempt, PROMOTED, reason, **facts)

    def _end_repeated(self, attempt: Attempt, note: str) -> Outcome | None:
        """Ends an attempt if another attempt with the same key has added the first version.

        The other attempt has another state folder, or its folder was lost.

        Args:
          attempt: The attempt.
          note: The note of the versions of attempts with this key.
        """
        model = self.settings.model
        additions = (e for e in self.registry.log if (e.action, e.model) == ("add", model))
        first = next((entry for entry in additions if entry.note == note), None)
        if first is None:
            return None
        assert first.bundle is not None
        if first.bundle.digest == attempt.record.get("digest"):
            return None
        reason = f"the same data and configuration gave {model}/{first.version} before"
        attempt.end(REFUSED, reason)
        return Outcome(NOTHING, f"nothing to do: {reason}", attempt.record)

    def _wait(self, version: Version, attempt: Attempt) -> Outcome | None:
        """Returns the outcome of a pass that waits for the end of an experiment, or None."""
        experiment = self.registry.models[version.model].running_experiment
        if experiment is None or experiment.alias != CHAMPION:
            return None
        return Outcome(
            NOTHING,
            f"{version} is judged when the experiment {experiment.name} has ended, because a "
            "promotion would end it",
            attempt.record,
        )

    def _earlier_champions(self, candidate: Version) -> list[int]:
        """Returns the earlier champions to compare a candidate with, the latest first.

        A version whose training data is unknown could have seen the images of the test split. So
        the versions are those that retrain has added, or that were the champion when retrain
        promoted another version.
        """
        model = self.registry.models[candidate.model]
        own = [e for e in self.registry.log if e.model == model.name and e.note.startswith(_NOTE)]
        known = {entry.version for entry in own} | {entry.before for entry in own}
        history = model.aliases[CHAMPION]
        numbers = dict.fromkeys(reversed(history))
        numbers = [n for n in numbers if n not in (history[-1], candidate.number)]
        if unknown := [n for n in numbers if n not in known]:
            logger.warning(
                "versions %s of %s are not compared, because it is unknown which images they were "
                "trained on",
                ", ".join(map(str, unknown)),
                model.name,
            )
        return [number for number in numbers if number in known][:_HISTORY]

    def _end(self, attempt: Attempt, status: str, reason: str, **facts: Any) -> Outcome:
        """Records the end of an attempt, and returns the outcome."""
        attempt.end(status, reason, **facts)
        number = attempt.record.get("version")
        name = f"{self.settings.model}/{number}" if number else f"attempt {attempt.folder.name}"
        return Outcome(status, f"{name} was {_words(status)}: {reason}", attempt.record)


@dataclasses.dataclass(frozen=True)
class _Reasons:
    """The reasons for an attempt, which depend on the number of new labelled images.

    Attributes:
      wanted: See `Settings.triggers`.
      min_new: See `Settings`.
      state: The state of the champion; see `monitor.windows.measure`. "" without "harm".
      has_failed: Whether the last attempt was refused or rolled back.
    """

    wanted: Sequence[str]
    min_new: int
    state: str
    has_failed: bool

    def triggers(self, new: int) -> list[str]:
        """Returns the reasons, with a number of new labelled images."""
        # Otherwise each new label would allow another attempt, until one passes by luck.
        for_harm = self.min_new if self.has_failed else 1
        holds = {
            "always": True,
            "labels": new >= self.min_new,
            "harm": self.state == "harm" and new >= for_harm,
        }
        return [name for name in holds if holds[name] and name in self.wanted]

    def text(self, new: int) -> str:
        """Describes why no attempt is made: the number of new labels, and the monitor's state."""
        text = f"{new:,} new labelled images (--min_new={self.min_new})"
        return f"{text}; monitor: {self.state.replace('_', ' ')}" if self.state else text


def _nothing(reason: str) -> Outcome:
    """Returns the outcome of a pass that makes no attempt."""
    return Outcome(NOTHING, f"nothing to do: {reason}")


def _words(status: str) -> str:
    return status.replace("_", " ")


def _read_examples(folder: pathlib.Path) -> Examples:
    """Returns the examples of the snapshot of an attempt.

    Raises:
      DataError: They are damaged or missing.
    """
    examples = read_snapshot(folder)
    if examples is None:
        raise DataError(f"{folder} has no snapshot of labelled images; {_RESTORE}")
    return examples


def _read_known(folder: pathlib.Path) -> dict[str, KnownImage]:
    """Returns the split and the class of each image of an attempt, by the digest of its pixels.

    Raises:
      DataError: The record is damaged or missing.
    """
    images = read_known(folder)
    if images is None:
        raise DataError(f"{folder} has no splits of the images of its attempt; {_RESTORE}")
    return images


def _known_images(dataset: Dataset) -> dict[str, KnownImage]:
    """Returns the split and the class of each image of a data set, by its resized pixels.

    If images are equal only at the size of the network's input and have several splits, train comes
    before validation, and validation before test, because a network has seen these pixels.
    """
    assert dataset.digests is not None
    images: dict[str, KnownImage] = {}
    source = dataset.source
    labels, names = source.labels, source.class_names
    is_logged = np.zeros(len(source), bool) if source.logged is None else source.logged
    for split in reversed(SPLITS):
        for row in dataset.splits[split].tolist():
            image = KnownImage(split, names[labels[row]], bool(is_logged[row]))
            images[dataset.digests[row]] = image
    return images


def _count_new(images: Mapping[str, KnownImage], known: Mapping[str, KnownImage]) -> int:
    """Returns the number of images that are not known, or have another label."""
    return sum(
        digest not in known or known[digest].label != image.label
        for digest, image in images.items()
    )


def _check_complete(missing: int, total: int, dataset: Dataset, config: Config) -> None:
    """Checks that a data set still has the images of an earlier training.

    Args:
      missing: The number of images that the data set lacks.
      total: The number of images of the earlier training.
      dataset: The data set.
      config: The configuration; its `data.max_unreadable` is the accepted fraction.

    Raises:
      DataError: Too many images are missing.
    """
    if missing > config.data.max_unreadable * total:
        base = dataset.source.name.partition(LOG_MARK)[0]
        raise DataError(
            f"--source: {base} lacks {missing:,} of {total:,} images of earlier trainings, "
            f"more than data.max_unreadable={config.data.max_unreadable:g} allows; restore them, "
            "or train a new champion without them with `cnn_jax train` and promote it"
        )


def _author(entry: Entry) -> str:
    """Returns the user and the host of an entry of the registry's log."""
    return printable(f"{entry.user}@{entry.host}")


def _configure(
    settings: Settings, bundle: Bundle, data: pathlib.Path, champion: pathlib.Path
) -> Config:
    """Returns the configuration of a run that continues the training of the champion.

    Args:
      settings: The arguments of the pass.
      bundle: The champion.
      data: The snapshot of the logged images.
      champion: The folder of the champion's bundle.

    Raises:
      ConfigError: A key is wrong, or cannot be set.
    """
    network = bundle.model["name"]
    fixed = bundle_values(bundle) | {
        "data.source": f"{settings.source}{LOG_MARK}{data}",
        "checkpoint.init_from": str(champion),
        "checkpoint.restore_step": 0,
    }
    if "model.pretrained" in fixed:
        fixed["model.pretrained"] = ""
    free = {key for key in fixed if key.startswith("model.")} - {"model.name", "model.pretrained"}
    for key in settings.overrides:
        is_data = key.startswith("data.") and key not in INDIFFERENT_KEYS
        if is_data or key in fixed.keys() - free:
            raise ConfigError(
                f"config.{key}: cannot be set, because retrain determines it or takes it from the "
                "champion"
            )
    defaults = {"train.epochs": EPOCHS, "train.probe": False, "optimizer.decay_epochs": 0}
    if "model.pretrained" in fixed:
        # An L2 penalty would pull pretrained weights to zero.
        defaults["optimizer.l2"] = 0.0
    config = files.load(settings.recipe, {**settings.overrides, "model.name": network})
    section = config.model
    values = {k: v for k, v in (defaults | fixed).items() if k not in settings.overrides}
    with config.ignore_type(), config.unlocked():
        config.model = schema.default_config(network).model
        for key in free & settings.overrides.keys():
            name = key.removeprefix("model.")
            config.model[name] = section[name]
        config.update_from_flattened_dict(values)
    return config
