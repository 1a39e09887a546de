import contextlib
import copy
import dataclasses
import json
import string

import hypothesis
import hypothesis.strategies as st
import pytest

from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import (
    BundleFacts,
    Entry,
    Evidence,
    Gates,
    Model,
    RegistryError,
    Version,
)
from cnn_jax.system.errors import ConfigError

DIGEST = "0123456789abcdef" * 4


def make_facts(digest=DIGEST, fingerprint="data", **test):
    return BundleFacts(
        path=f"bundles/{digest}-20260102T030405Z-0123456789abcdef",
        digest=digest,
        size=1000,
        classes=3,
        image_size=(16, 32),
        metrics={"test": test},
        fingerprint=fingerprint,
    )


def make_entry(action, version=None, alias=None, before=None, **changes):
    if action == "add":
        changes = {"bundle": make_facts(), **changes}
    fields = {
        "number": 1,
        "previous": "",
        "id": "1",
        "time": "2026-01-02T03:04:05+00:00",
        "user": "ann",
        "host": "desk",
        "note": "",
        "model": "flowers",
    }
    return Entry(action=action, version=version, alias=alias, before=before, **(fields | changes))


def make_models(*versions, **aliases):
    """Returns the state of a registry with one model, with the given versions and aliases."""
    model = Model("flowers")
    models = {"flowers": model}
    for number, facts in enumerate(versions, 1):
        models = ledger.apply(models, make_entry("add", number, bundle=facts))
    for alias, history in aliases.items():
        for version in history:
            before = models["flowers"].alias_target(alias)
            models = ledger.apply(models, make_entry("promote", version, alias, before))
    return models


class Slow:
    """A simple reference implementation of a registry, with the moves of each alias in a list."""

    def __init__(self):
        self.given = {}
        self.there = {}
        self.moves = {}

    def add(self, model):
        self.given[model] = self.given.get(model, 0) + 1
        self.there.setdefault(model, []).append(self.given[model])

    def promote(self, model, version, alias):
        if version not in self.there.get(model, []) or self.now(model, alias) == version:
            return False
        self.moves.setdefault((model, alias), []).append(version)
        return True

    def now(self, model, alias):
        steps = self.steps(model, alias)
        return steps[-1] if steps else None

    def steps(self, model, alias):
        """Returns an alias's moves to versions that still exist, without consecutive repeats."""
        steps = []
        for version in self.moves.get((model, alias), []):
            if version in self.there[model] and steps[-1:] != [version]:
                steps.append(version)
        return steps

    def rollback(self, model, alias):
        steps = self.steps(model, alias)
        if len(steps) < 2:
            return False
        self.moves[model, alias] = steps[:-1]
        return True

    def remove(self, model, version):
        if version not in self.there.get(model, []):
            return False
        if any(self.now(*key) == version for key in self.moves if key[0] == model):
            return False
        self.there[model].remove(version)
        return True

    def remove_alias(self, model, alias):
        return self.moves.pop((model, alias), None) is not None

    def outline(self):
        return {
            model: (
                sorted(self.there[model]),
                {a: self.steps(m, a) for m, a in self.moves if m == model},
                last,
            )
            for model, last in self.given.items()
        }


def decide(models, action, model, version, alias):
    """Returns the log entry for an action, or None if a registry would add no entry."""
    try:
        if action == "add":
            return make_entry("add", models[model].last + 1 if model in models else 1, model=model)
        if action == "promote":
            ledger.resolve(models, model, version)
            before = models[model].alias_target(alias)
            wanted = make_entry("promote", version, alias, before, model=model)
            return wanted if before != version else None
        if action == "rollback":
            before = ledger.resolve(models, model, alias).number
            version = ledger.previous_version(models, model, alias).number
            return make_entry("rollback", version, alias, before, model=model)
        if action == "remove":
            ledger.removable_version(models, model, version)
            return make_entry("remove", version, model=model)
        before = ledger.resolve(models, model, alias).number
        return make_entry("remove", None, alias, before, model=model)
    except RegistryError:
        return None


ACTIONS = st.tuples(
    st.sampled_from(["add", "add", "promote", "promote", "rollback", "remove", "remove_alias"]),
    st.sampled_from(["flowers", "birds"]),
    st.integers(0, 6),
    st.sampled_from(["champion", "mine"]),
)


@hypothesis.given(st.lists(ACTIONS, max_size=40))
@hypothesis.settings(max_examples=300, deadline=None)
def test_the_state_equals_a_simple_reference(actions):
    slow, models = Slow(), {}
    for action, model, version, alias in actions:
        arguments = {
            "add": (model,),
            "promote": (model, version, alias),
            "rollback": (model, alias),
            "remove": (model, version),
            "remove_alias": (model, alias),
        }[action]
        is_done = getattr(slow, action)(*arguments)
        entry = decide(models, action, model, version, alias)
        assert (entry is not None) == (is_done is not False)
        if entry is not None:
            before = copy.deepcopy(models)
            after = ledger.apply(models, ledger.parse(ledger.serialise(entry)))
            assert models == before, "the state before was changed"
            models = after
        fast = {
            name: (
                sorted(one.versions),
                {alias: list(history) for alias, history in one.aliases.items()},
                one.last,
            )
            for name, one in models.items()
        }
        assert fast == slow.outline()


def test_removal_leaves_no_repeated_version_in_a_history():
    """If version 2 is removed, the history 1, 2, 1, 3 of an alias becomes 1, 3.

    A rollback from version 3 then selects version 1.
    """
    models = make_models(*[make_facts()] * 3, champion=[1, 2, 1, 3])
    models = ledger.apply(models, make_entry("remove", 2))
    assert models["flowers"].aliases == {"champion": (1, 3)}
    assert ledger.previous_version(models, "flowers", "champion").number == 1
    models = ledger.apply(models, make_entry("rollback", 1, "champion", 3))
    with pytest.raises(RegistryError, match=r"^flowers@champion is 1 and has no previous vers"):
        ledger.previous_version(models, "flowers", "champion")


@pytest.mark.parametrize(
    "entry",
    [
        make_entry("add", 2),
        make_entry("add", 5),
        make_entry("promote", 4, "mine"),
        make_entry("promote", 1, "mine", 2),
        make_entry("promote", 1, "champion"),
        make_entry("rollback", 2, "champion", 3),
        make_entry("rollback", 1, "champion", 2),
        make_entry("rollback", 1, "mine", 2),
        make_entry("remove", 4),
        make_entry("remove", 3),
        make_entry("remove", None, "mine", 1),
        make_entry("remove", 1, model="birds"),
    ],
)
def test_an_entry_invalid_in_its_state_is_refused(entry):
    models = make_models(*[make_facts()] * 3, champion=[1, 3])
    with pytest.raises(ValueError, match=r"^(it|there|champion|mine|an alias) "):
        ledger.apply(models, entry)


# Python decodes each command-line byte that is not valid UTF-8 to a surrogate from U+DC80 to
# U+DCFF.
TEXT = st.text(st.characters() | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
NUMBERS = st.integers(1, 10**9)


@hypothesis.given(
    st.fixed_dictionaries(
        {
            "digest": st.text(string.hexdigits[:16], min_size=64, max_size=64),
            "fingerprint": TEXT,
            "accuracy": st.floats(allow_nan=False, allow_infinity=False),
        }
    ),
    st.fixed_dictionaries({"model": NAMES, "note": TEXT, "user": TEXT, "number": NUMBERS}),
)
@hypothesis.settings(deadline=None)
def test_an_add_entry_survives_a_round_trip(facts, fields):
    entry = make_entry("add", 1, bundle=make_facts(**facts), **fields)
    assert ledger.parse(ledger.serialise(entry)) == entry


@hypothesis.given(
    NUMBERS,
    NAMES.filter(lambda name: not name.isdecimal()),
    st.none() | NUMBERS,
    st.lists(TEXT),
)
@hypothesis.settings(deadline=None)
def test_a_promote_entry_survives_a_round_trip(version, alias, before, gates):
    entry = make_entry("promote", version, alias, before, gates=tuple(gates))
    assert ledger.parse(ledger.serialise(entry)) == entry


def test_a_note_that_is_not_utf_8_survives():
    note = "a\udcff\u2028ü猫\n"
    entry = make_entry("remove", 1, note=note)
    assert ledger.parse(ledger.serialise(entry)).note == note


def test_a_number_that_is_not_finite_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        ledger.serialise(make_entry("add", 1, bundle=make_facts(accuracy=float("nan"))))


def _changed(entry=None, **changes):
    fields = json.loads(ledger.serialise(entry or make_entry("promote", 1, "champion")))
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    # The sha256 is computed again, so that only the changed fields are invalid.
    return json.dumps(fields | {"sha256": ledger.fields_digest(fields)}).encode()


def _changed_bundle(**changes):
    entry = make_entry("add", 1)
    return _changed(entry, bundle=json.loads(ledger.serialise(entry))["bundle"] | changes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b"[" * 100_000,
        _changed(format=None),
        _changed(format="1"),
        _changed(format=True),
        _changed(number="1"),
        _changed(time="yesterday"),
        _changed(action="add"),
        _changed(model="../x"),
        _changed(model=None),
        _changed(version=1.5),
        _changed(version=None),
        _changed(alias="../x"),
        _changed(alias="12"),
        _changed(alias=None),
        _changed(gates="all"),
        _changed(make_entry("add", 1), bundle=None),
        _changed(make_entry("add", 1), alias="champion"),
        _changed(make_entry("remove", 1), alias="champion"),
        _changed(make_entry("rollback", 1, "champion", 2), before=None),
        _changed_bundle(path="../../etc"),
        _changed_bundle(path=f"bundles/{DIGEST}-20260102T030405Z-0123456789abcdef/../../.."),
        _changed_bundle(path=""),
        _changed_bundle(digest="f" * 64),
        _changed_bundle(image_size=[1, 2, 3]),
        _changed_bundle(image_size=["a", "b"]),
        _changed_bundle(image_size=[float("inf"), 1]),
        _changed_bundle(image_size=[1, float("nan")]),
        _changed_bundle(metrics=[]),
        _changed_bundle(size=None),
    ],
)
def test_invalid_entries_are_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 (any message)
        ledger.parse(data)


def test_each_invalid_entry_has_exactly_one_fault():
    """`_changed` and `_changed_bundle` return valid entries if no field is changed.

    Each invalid entry is therefore refused for its changed field only.
    """
    assert ledger.parse(_changed()) == make_entry("promote", 1, "champion")
    assert ledger.parse(_changed_bundle()) == make_entry("add", 1)


@pytest.mark.parametrize(
    "entry",
    [
        make_entry("add", 1, bundle=make_facts(accuracy=0.5), note="ü\udcff"),
        make_entry("promote", 1, "champion", 2, gates=("min_f1=0.5: test f1 is 0.75",)),
    ],
)
def test_the_sha256_detects_a_changed_field(entry):
    """Each changed entry is still valid JSON, so that only the sha256 reveals the change."""
    text = ledger.serialise(entry).decode()
    fields = json.loads(text)
    assert ledger.parse(json.dumps(dict(reversed(fields.items()))).encode()) == entry
    for key in fields.keys() - {"format"}:
        changed = {**fields, key: "0"}
        with pytest.raises(ValueError, match=r"^its sha256 does not match its other fields$"):
            ledger.parse(json.dumps(changed).encode())
        del changed[key]
        with pytest.raises(ValueError, match=r"^(its sha256 does not match|it has no 'sha256')"):
            ledger.parse(json.dumps(changed).encode())
    with pytest.raises(ValueError, match="its sha256"):
        ledger.parse(json.dumps(fields | {"shade": "green"}).encode())


def test_the_sha256_is_computed_from_sorted_json():
    r"""The expected value is from `printf '{"a": [1, 0.5], "b": "\\u00fc"}' | sha256sum`."""
    expected = "56894132ee149ab5a94207fc94a35dbcc7dcb819e43445540d524fa5b3c46f93"
    assert ledger.fields_digest({"b": "ü", "a": [1, 0.5]}) == expected
    assert ledger.fields_digest({"b": "ü", "sha256": "x", "a": (1, 0.5)}) == expected


def test_a_later_format_is_reported():
    with pytest.raises(
        RegistryError, match=r"^has format 2, but this version .* reads format 1: upg"
    ):
        ledger.parse(b'{"format": 2}')


@pytest.mark.parametrize("mark", [None, False, 1, "true"])
def test_an_unknown_action_must_be_marked_skippable(mark):
    with pytest.raises(RegistryError, match=r"^has the action adopt, which .*: upgrade cnn_jax$"):
        ledger.parse(_changed(action="adopt", skippable=mark))


def test_a_skippable_unknown_action_changes_nothing():
    models = make_models(make_facts(), champion=[1])
    for fields in ({}, {"model": None}, {"version": "x", "alias": [], "before": {}, "gates": 1}):
        entry = ledger.parse(_changed(action="adopt", skippable=True, **fields))
        assert (entry.action, entry.version, entry.alias) == ("adopt", None, None)
        assert ledger.apply(models, entry) == models


def test_a_known_action_is_never_skipped():
    """A skippable entry with a known action is applied, and its fields are checked."""
    entry = make_entry("promote", 1, "champion")
    assert ledger.parse(_changed(skippable=True)) == entry
    with pytest.raises(ValueError, match="version is missing"):
        ledger.parse(_changed(skippable=True, version=None))


def test_a_damaged_skippable_entry_is_not_skipped():
    data = _changed(action="adopt", skippable=True).replace(b'"ann"', b'"eve"')
    with pytest.raises(ValueError, match="its sha256 does not match"):
        ledger.parse(data)


OLD_ENTRY = b"""{
 "format": 1,
 "number": 5,
 "previous": "0422ecd4be92d12b8564d344cde385ec5e3e038fea05d0c2d984aad6cce13c4a",
 "id": "c66789e21f3c477098aaa95a6f716f2c",
 "time": "2026-11-27T08:44:04+00:00",
 "user": "root",
 "host": "vm",
 "action": "promote",
 "model": "flowers",
 "version": 2,
 "alias": "champion",
 "before": 1,
 "gates": [
  "not_below=champion: test accuracy is 0.5, and that of version 1 is 0.5"
 ],
 "sha256": "3c8dfa5eb4ddcc3ef19efefed5a55ab0f94a28f65c71727ba367bfb4fd1ca5d4"
}
"""


def test_an_entry_of_an_earlier_version_is_read():
    """The entry has the gate `not_below`, which is no longer offered."""
    entry = ledger.parse(OLD_ENTRY)
    assert (entry.number, entry.action, entry.version, entry.before) == (5, "promote", 2, 1)
    assert entry.gates[0].startswith("not_below=champion: test accuracy is 0.5")
    assert entry.evidence is None


def test_unknown_fields_are_ignored():
    entry = make_entry("promote", 1, "champion")
    assert ledger.parse(_changed(entry, shade="green")) == entry


def test_metrics_that_are_not_finite_are_skipped():
    metrics = {"test": {"a": 1, "b": float("nan"), "c": "x", "d": True, "e": 10**400}, "x": 3}
    assert ledger.finite_metrics(metrics) == {"test": {"a": 1.0}}
    assert ledger.finite_metrics([]) == {}


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a@b", ".a", "-a", "a" * 101, "ü", "a\n", "a b", "a\0"]
)
def test_a_hostile_name_is_a_usage_error(name):
    for kind in ("model", "alias"):
        with pytest.raises(
            ConfigError, match=f"^{kind}: must be 1 to 100 of the characters"
        ) as raised:
            ledger.check_name(kind, name)
        assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["a", "7", "A.b_c-9", "a" * 100, "v1.2"])
def test_allowed_names_are_accepted(name):
    assert ledger.check_name("model", name) == name


def test_an_alias_must_not_be_a_number():
    with pytest.raises(
        ConfigError, match=r"^alias: must not be a number, because versions are; got '7'"
    ):
        ledger.check_name("alias", "7")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flowers", ("flowers", None)),
        ("flowers@champion", ("flowers", "champion")),
        ("flowers/12", ("flowers", 12)),
        ("3/4", ("3", 4)),
        (f"a/{'9' * 30}", ("a", 10**30 - 1)),
    ],
)
def test_references_are_parsed(text, expected):
    assert ledger.parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "@a", "/1", "a@", "a/", "a/b", "a@1", "a/-1", "a@b/1", "a/1/2", "../x", "a/१"),
        f"a/{'9' * 5000}",
    ],
)
def test_an_invalid_reference_is_a_usage_error(text):
    with pytest.raises(ConfigError, match=r"^(model|alias|version): must "):
        ledger.parse_reference(text)


@pytest.mark.parametrize(
    ("name", "which", "message"),
    [
        ("flower", 1, "there is no model flower; did you mean flowers?"),
        ("zebra", 1, "there is no model zebra; known names: flowers"),
        ("flowers", "champ", "flowers has no alias champ; did you mean champion?"),
        ("flowers", "mine", "flowers has no alias mine; known names: champion"),
        ("flowers", 1, "flowers has no version 1 (it was removed); known versions: 2, 3"),
        ("flowers", 4, "flowers has no version 4; known versions: 2, 3"),
        ("flowers", 0, "flowers has no version 0; known versions: 2, 3"),
    ],
)
def test_unknown_names_are_reported_with_known_names(name, which, message):
    models = make_models(*[make_facts()] * 3, champion=[3])
    models = ledger.apply(models, make_entry("remove", 1))
    with pytest.raises(RegistryError) as raised:
        ledger.resolve(models, name, which)
    assert str(raised.value) == message


def test_a_version_with_an_alias_is_not_removed():
    models = make_models(*[make_facts()] * 2, champion=[1, 2], mine=[2])
    with pytest.raises(
        RegistryError, match=r"^flowers/2 is not removed, because it is champion and mine: prom"
    ):
        ledger.removable_version(models, "flowers", 2)
    assert ledger.removable_version(models, "flowers", 1).number == 1


GOOD = {"accuracy": 0.9, "precision": 0.8, "recall": 0.7, "f1": 0.6, "loss": 0.5}


def _check(gates, version=1, alias="champion", versions=None, **aliases):
    models = make_models(*(versions or [make_facts(**GOOD)]), **aliases)
    return gates.check(models, models["flowers"].versions[version], alias)


@pytest.mark.parametrize("figure", GOOD)
@pytest.mark.parametrize("distance", [-1e-9, 0.0, 1e-9])
def test_a_gate_includes_its_limit(figure, distance):
    name = f"max_{figure}" if figure == "loss" else f"min_{figure}"
    gates = Gates(**{name: GOOD[figure] + distance})
    if distance * (-1 if figure == "loss" else 1) <= 0:
        assert _check(gates) == (f"{name}={GOOD[figure]:g}: test {figure} is {GOOD[figure]:g}",)
    else:
        with pytest.raises(RegistryError, match=f"^flowers/1 does not become champion: {name}="):
            _check(gates)


def test_all_failed_gates_are_in_one_line():
    with pytest.raises(RegistryError) as raised:
        _check(Gates(min_accuracy=0.95, min_recall=0.1, max_loss=0.25))
    assert str(raised.value) == (
        "flowers/1 does not become champion: min_accuracy=0.95: test accuracy is 0.9; "
        "max_loss=0.25: test loss is 0.5"
    )
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("figure", GOOD)
def test_a_missing_metric_fails_its_gate(figure):
    name = f"max_{figure}" if figure == "loss" else f"min_{figure}"
    with pytest.raises(RegistryError, match=f"test {figure} is not in the bundle$"):
        _check(Gates(**{name: 0.0 if figure != "loss" else 9.0}), versions=[make_facts()])


def test_without_gates_every_version_passes():
    assert _check(Gates(), versions=[make_facts()]) == ()


def make_evidence(**changes):
    fields = {
        "candidate": 2,
        "alias": "champion",
        "reference": 1,
        "source": "folder:/data",
        "split": "test",
        "is_not_worse": True,
        "images": 2000,
        "margin": 0.01,
        "level": 0.05,
        "candidate_correct": 1820,
        "reference_correct": 1800,
        "gains": 50,
        "losses": 30,
        "p_value": 0.000004,
        "worse_classes": (),
        "classes": {"red": (700, 50, 30)},
        "images_needed": 2474,
    }
    return Evidence(**(fields | changes))


EVIDENCE = (
    "not_worse_than=champion: 91.00% of 2,000 images of folder:/data are correct, and 90.00% with "
    "version 1 (margin 0.01, p = 4e-06)"
)


def test_evidence_that_a_version_is_not_worse_passes():
    versions = [make_facts(**GOOD)] * 2
    gates = Gates(evidence=make_evidence(), max_loss=0.5)
    passed = _check(gates, 2, versions=versions, champion=[1])
    assert passed == ("max_loss=0.5: test loss is 0.5", EVIDENCE)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "; an equal version would pass 80 % of the time with 2,474 images"),
        ({"images_needed": 1_000}, ""),
        ({"worse_classes": ("red", "b\x1blue")}, r"; worse in red, b\x1blue"),
    ],
)
def test_evidence_that_fails_says_why(changes, end):
    gates = Gates(evidence=make_evidence(is_not_worse=False, **changes))
    with pytest.raises(RegistryError) as raised:
        _check(gates, 2, versions=[make_facts(**GOOD)] * 2, champion=[1])
    assert str(raised.value) == f"flowers/2 does not become champion: {EVIDENCE}{end}"


@pytest.mark.parametrize(("version", "champion"), [(2, [1, 3]), (3, [1])])
def test_evidence_about_other_versions_is_refused(version, champion):
    with pytest.raises(RegistryError, match=r"^flowers/\d was not compared with version .*run the"):
        _check(
            Gates(evidence=make_evidence()),
            version,
            versions=[make_facts(**GOOD)] * 3,
            champion=champion,
        )


@pytest.mark.parametrize(("champion", "is_refused"), [([], False), ([2], False), ([1], True)])
def test_missing_evidence_is_refused_unless_there_is_no_reference(champion, is_refused):
    """Another process may have created the alias after the command looked for it."""
    error = pytest.raises(RegistryError, match="flowers/2 was not compared with version 1, which")
    aliases = {"champion": champion} if champion else {}
    with error if is_refused else contextlib.nullcontext():
        _check(Gates(not_worse_than="champion"), 2, versions=[make_facts(**GOOD)] * 2, **aliases)


def test_evidence_survives_a_round_trip():
    evidence = dataclasses.asdict(make_evidence(classes={"red\udcff": (700, 50, 30)}))
    entry = make_entry("promote", 2, "champion", 1, evidence=evidence)
    parsed = ledger.parse(ledger.serialise(entry))
    expected = {"worse_classes": [], "classes": {"red\udcff": [700, 50, 30]}}
    assert parsed.evidence == evidence | expected


def test_version_aliases_are_sorted():
    models = make_models(*[make_facts()] * 2, b=[1], a=[2, 1], c=[2])
    assert models["flowers"].version_aliases(1) == ["a", "b"]
    assert models["flowers"].alias_target("nothing") is None
    assert isinstance(models["flowers"].versions[1], Version)
    assert dataclasses.asdict(models["flowers"].versions[1])["bundle"]["image_size"] == (16, 32)
