import importlib.util
import logging
import re

import optuna
import pytest
import sqlalchemy
from optuna.storages import JournalStorage, RDBStorage

from cnn_jax.system.errors import ConfigError
from cnn_jax.tune import storage
from cnn_jax.tune.storage import StorageError, call_with_retries, open_storage, sqlite_url

SECRET = "s3cret"


class Away:
    """A call that fails a number of times and then returns a result."""

    def __init__(self, failures, error=None):
        self.failures = failures
        self.error = error or OSError("Connection refused")
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "result"


@pytest.fixture
def clock(monkeypatch):
    """The pauses of a fake clock, which advances only in `sleep`."""
    pauses = []
    monkeypatch.setattr(storage.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    return pauses


def database_error():
    cause = RuntimeError("server closed the connection\nunexpectedly")
    error = sqlalchemy.exc.OperationalError("SELECT secret FROM table", {"a": SECRET}, cause)
    error.__cause__ = cause
    wrapped = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [OSError("gone"), database_error(), sqlalchemy.exc.IntegrityError("a", {}, OSError("b"))],
    ids=type,
)
def test_a_call_is_retried_until_the_storage_answers(clock, error):
    call = Away(5, error)
    assert call_with_retries(call, 60, "Nothing is lost") == "result"
    assert call.calls == 6
    assert clock == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])


def test_pauses_are_limited_and_end_at_the_timeout(clock):
    call = Away(1000)
    with pytest.raises(StorageError):
        call_with_retries(call, 60, "Nothing is lost")
    assert max(clock) == 2.0
    assert sum(clock) == pytest.approx(60)
    assert call.calls == len(clock) + 1


def test_waiting_is_logged_once(clock, caplog):
    with caplog.at_level(logging.WARNING):
        call_with_retries(Away(5), 60, "Nothing is lost")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the study's storage does not answer (Connection refused); retrying for 60 s"
    ]


def test_the_timeout_error_is_one_line(clock):
    with pytest.raises(StorageError) as raised:
        call_with_retries(Away(1000, database_error()), 5, "The trial is saved in here")
    assert str(raised.value) == (
        "the study's storage has not answered for 5 s (server closed the connection unexpectedly)."
        " The trial is saved in here; start the same command again when the storage is available"
    )
    assert raised.value.exit_code == 1


def test_other_errors_are_not_retried(clock):
    call = Away(1, KeyError("a bug"))
    with pytest.raises(KeyError):
        call_with_retries(call, 60, "Nothing is lost")
    assert call.calls == 1
    assert not clock


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@127.0.0.1:1/db",  # No server listens on this port.
        f"postgresql+psycopg://user:{SECRET}@127.0.0.1:1/db",
        f"postgresql://user:{SECRET}%40@127.0.0.1:1/db",
        f"postgresql://user:{{{SECRET}}}@127.0.0.1:1/db",
        f"postgresql://user:{SECRET}/a@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?user=user&password={SECRET}",
        f"postgresql://user:{SECRET}@127.0.0.1:1/db?sslmode=nonsense",
    ],
)
def test_the_error_for_an_unreachable_database_hides_the_password(url):
    with pytest.raises(StorageError) as raised:
        open_storage(url)
    message = str(raised.value)
    assert re.match(r"--storage: postgresql\S*127\.0\.0\.1:1/db\S* cannot be opened: conn", message)
    assert SECRET not in message
    assert "***" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "study.db",
        f"postgresql:/user:{SECRET}@host/db",
        f"postgresql:user:{SECRET}@host/db",
        f"user:{SECRET}@host/db",
        f"postgresql://user:{SECRET}@host:port/db",
        f"postgresql://user:{SECRET}@[::1/db",
        f"postgresql+nodriver://user:{SECRET}@host/db",
        f"nodatabase://user:{SECRET}@host/db",
        f"postgresql://user:a@{SECRET}@host/db",
    ],
)
def test_the_error_for_a_wrong_url_hides_the_password(url):
    with pytest.raises(ConfigError, match=r"^--storage: (must be a data|an @ in )") as raised:
        open_storage(url)
    assert SECRET not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_error_for_a_missing_driver_hides_the_password():
    with pytest.raises(ConfigError, match=r"no driver for oracle://user:\*\*\*@host/db is inst"):
        open_storage(f"oracle://user:{SECRET}@host/db")


@pytest.mark.parametrize(
    ("url", "has_psycopg2", "expected"),
    [
        ("postgresql://u@h/d", False, "postgresql+psycopg://u@h/d"),
        ("postgres://u@h/d", False, "postgresql+psycopg://u@h/d"),
        ("postgresql://u@h/d", True, "postgresql://u@h/d"),
        # SQLAlchemy has no dialect `postgres`.
        ("postgres://u@h/d", True, "postgresql://u@h/d"),
        ("postgresql+asyncpg://u@h/d", False, "postgresql+asyncpg://u@h/d"),
        ("mysql://u@h/d", False, "mysql://u@h/d"),
        ("sqlite:///d", False, "sqlite:///d"),
    ],
)
def test_postgresql_uses_the_installed_driver(monkeypatch, url, has_psycopg2, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_psycopg2 or None)
    assert storage._with_driver(url) == expected


def add_study(opened):
    return optuna.create_study(storage=opened, study_name="name", load_if_exists=True)


@pytest.mark.parametrize("name", ["study.db", "a b?c#d%20e{0}", "ü\\'\"@x:y", "100%"])
@pytest.mark.parametrize("form", ["sqlite", "journal"])
def test_a_storage_file_may_have_any_name(tmp_path, form, name):
    path = tmp_path / "new" / name
    if form == "sqlite":
        path.parent.mkdir()
    url = sqlite_url(path) if form == "sqlite" else f"journal:{path}"
    opened = open_storage(url)
    assert isinstance(opened, RDBStorage if form == "sqlite" else JournalStorage)
    add_study(opened).set_user_attr("key", "value")
    assert [file.name for file in path.parent.iterdir()] == [name]
    assert add_study(open_storage(url)).user_attrs == {"key": "value"}


@pytest.mark.parametrize("form", ["sqlite:///{}/study.db", "journal:{}/study", "journal:{}"])
def test_a_path_that_cannot_be_written_is_an_error(tmp_path, form):
    """The storage's parent folder is in fact a file, or the journal is in fact a folder."""
    path = tmp_path / "file"
    path.mkdir() if form.endswith("}") else path.touch()
    url = form.format(path)
    with pytest.raises(StorageError, match=rf"^--storage: {re.escape(url)} cannot be opened: "):
        open_storage(url)


@pytest.mark.parametrize("text", ["# Notes\n\nOf a study.\n", "{}\n{}\n", "[]\n[]\n", "\0\n" * 9])
def test_a_file_that_is_not_a_journal_is_unchanged(tmp_path, text):
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^--storage: {path} is not a journal of studies$"):
        open_storage(f"journal:{path}")
    assert path.read_text() == text


def test_a_file_that_is_not_a_database_is_an_error(tmp_path):
    path = tmp_path / "notes"
    path.write_text("Of a study.\n" * 100)
    with pytest.raises(StorageError, match=r"cannot be opened: file is not a database$"):
        open_storage(f"sqlite:///{path}")


@pytest.mark.parametrize("torn", ['{"op_code": 4, "worker', '{"op_code": 4}', "\0" * 5000, ""])
def test_an_incomplete_line_of_a_journal_is_removed(tmp_path, torn):
    """An incomplete line, caused by a full disk or a power failure, is removed from a journal."""
    path = tmp_path / "journal"
    add_study(open_storage(f"journal:{path}")).set_user_attr("before", 1)
    with path.open("a") as file:
        file.write(torn)
    study = add_study(open_storage(f"journal:{path}"))
    study.set_user_attr("after", 2)
    for again in (study, add_study(open_storage(f"journal:{path}"))):
        assert again.user_attrs == {"before": 1, "after": 2}


def test_workers_can_create_the_tables_at_the_same_time(tmp_path, monkeypatch):
    """A storage can be opened while another worker creates the same tables."""
    url = sqlite_url(tmp_path / "study.db")
    make, collisions = storage.RDBStorage, []

    def collide(*args, **kwargs):
        if len(collisions) == 3:
            return make(*args, **kwargs)
        # These are the messages of databases if two workers create a table at the same time.
        collisions.append(
            [
                sqlalchemy.exc.OperationalError("CREATE", {}, "table studies already exists"),
                sqlalchemy.exc.IntegrityError("INSERT", {}, "UNIQUE constraint failed: a.version"),
                sqlalchemy.exc.ProgrammingError("CREATE", {}, 'type "trialstate" already exists'),
            ][len(collisions)]
        )
        raise collisions[-1]

    monkeypatch.setattr(storage, "RDBStorage", collide)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    assert isinstance(open_storage(url), RDBStorage)
    assert len(collisions) == 3


def test_an_error_other_than_a_collision_is_not_retried(monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise sqlalchemy.exc.OperationalError("CREATE", {}, OSError("no room"))

    monkeypatch.setattr(storage, "RDBStorage", fail)
    with pytest.raises(StorageError, match="no room"):
        open_storage("sqlite:///study.db")
    assert len(calls) == 1


def test_too_many_collisions_are_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise sqlalchemy.exc.IntegrityError("INSERT", {}, OSError("UNIQUE constraint failed"))

    monkeypatch.setattr(storage, "RDBStorage", fail)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(StorageError, match="UNIQUE constraint failed"):
        open_storage("sqlite:///study.db")


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite://", "journal:"]
)
def test_a_storage_in_memory_is_refused(url):
    with pytest.raises(ConfigError, match=f"^--storage: {re.escape(url)} keeps nothing"):
        storage.open_storage(url)
