import builtins
import contextlib
import datetime
import errno
import os
import pathlib
import re
import socket
import stat
import sys
import tempfile
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from cnn_jax.registry import store as stores
from cnn_jax.registry.store import (
    LocalStore,
    NoAnswerError,
    RemoteStore,
    StoreError,
    check_exclusive_create,
    creation_time,
    open_store,
    unique_name,
)
from cnn_jax.system.errors import ConfigError

pytest_plugins = ["registry_fixtures"]
SECRET = "s3cret"


class Careless(MemoryFileSystem):
    """A file system whose mode "create" overwrites files, as s3fs does with an old botocore."""

    protocol = "careless"
    store, pseudo_dirs = {}, [""]

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


class Hasty(MemoryFileSystem):
    """A file system whose mode "create" is not atomic: the write happens after the check."""

    protocol = "hasty"
    store, pseudo_dirs = {}, [""]

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        time.sleep(0.01)
        super().pipe_file(path, value)


class Plain(MemoryFileSystem):
    """A file system without its own `pipe_file`, so that fsspec's default `pipe_file` is used."""

    protocol = "plain"
    store, pseudo_dirs = {}, [""]
    pipe_file = AbstractFileSystem.pipe_file


for kind in (Careless, Hasty, Plain):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


def test_a_file_is_created_once(place):
    store = open_store(*place)
    store.create("log/1", b"first")
    with pytest.raises(FileExistsError):
        store.create("log/1", b"second")
    assert store.read("log/1") == b"first"


def test_missing_files_raise_file_not_found(place, tmp_path):
    store = open_store(*place)
    for number in range(2):
        assert store.names("log") == []
        with pytest.raises(FileNotFoundError):
            store.read("log/1")
        with pytest.raises(FileNotFoundError):
            store.download("log/1", tmp_path / "copy")
        store.remove("log")
        store.remove("log/1")
        store.write(f"other/{number}", b"")


def test_names_lists_only_direct_children(place):
    store = open_store(*place)
    for name in ("a/2", "a/1", "a/b/3", "ab/4"):
        store.write(name, b"x")
    assert store.names("a") == ["1", "2", "b"]
    store.remove("a")
    assert store.names("a") == []
    assert store.names("ab") == ["4"]
    store.remove("ab/4")
    assert store.names("ab") == []


def test_listings_are_not_cached(place):
    """Another process may write at any time, so listings and file contents must be current."""
    reader, writer = open_store(*place), open_store(*place)
    for number in range(1, 4):
        assert reader.names("log") == [str(one) for one in range(1, number)]
        with pytest.raises(FileNotFoundError):
            reader.read(f"log/{number}")
        writer.create(f"log/{number}", b"x")
        assert reader.read(f"log/{number}") == b"x"
    writer.remove("log")
    assert reader.names("log") == []


def test_many_files_are_read_in_parallel(place, tmp_path):
    store = open_store(*place)
    for number in range(40):
        store.write(f"log/{number}", b"%d" % number)
    names = [f"log/{number}" for number in range(41)]
    assert store.read_all(names) == [*(b"%d" % number for number in range(40)), None]
    assert store.read_all(names[40:]) == [None]
    assert store.read_all([]) == []
    store.download("log/7", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"7"


def test_a_safe_store_passes_the_check(place):
    store = open_store(*place)
    check_exclusive_create(store)
    assert store.names("tmp") == []


@pytest.mark.parametrize("protocol", ["careless", "hasty", "plain"])
def test_an_unsafe_store_is_refused(protocol):
    store = open_store(f"{protocol}://registry")
    message = rf"^{protocol}://registry lets two writers create the same file, so it cannot contain"
    with pytest.raises(StoreError, match=message):
        check_exclusive_create(store)
    assert store.names("tmp") == []


@pytest.mark.parametrize("happens", ["never", "unseen"])
def test_a_store_without_clear_answers_fails_the_check(happens):
    """If a store does not answer, the error says so, and does not say that the store is unsafe."""

    class Silent(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            if happens == "unseen":
                super().pipe_file(path, value, mode, **kwargs)
            raise TimeoutError("no answer")

    fsspec.register_implementation("silent", Silent, clobber=True)
    with pytest.raises(NoAnswerError, match=r"^silent://a/tmp/\S+: no answer$"):
        check_exclusive_create(open_store("silent://a"))


def test_one_missing_answer_does_not_fail_the_check():
    """S3 answers with status 409 while it cannot decide which of two concurrent writes succeeds."""
    failures = []

    class Busy(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            if mode == "create" and not failures:
                failures.append(path)
                raise OSError(errno.EBUSY, "conflict")
            super().pipe_file(path, value, mode, **kwargs)

    fsspec.register_implementation("busy", Busy, clobber=True)
    check_exclusive_create(open_store("busy://a"))
    assert failures


def test_other_s3_precondition_errors_are_recognised():
    """s3fs recognises only the error message of AWS; other S3 services send another message."""

    class Other(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            try:
                super().pipe_file(path, value, mode, **kwargs)
            except FileExistsError:
                cause = Exception("At least one of the pre-conditions did not hold")
                cause.response = {"Error": {"Code": "PreconditionFailed"}}
                raise OSError(errno.EINVAL, "did not hold") from cause

    fsspec.register_implementation("other", Other, clobber=True)
    check_exclusive_create(open_store("other://a"))


def test_local_files_are_read_only_without_temporary_files(tmp_path):
    store = LocalStore(tmp_path / "registry")
    store.create("log/1", b"first")
    store.write("bundles/a/b", b"second")
    for name in ("log/1", "bundles/a/b"):
        mode = (tmp_path / "registry" / name).stat().st_mode
        assert stat.S_IMODE(mode) & 0o333 == 0
        assert mode & stat.S_IRUSR
    assert store.names("tmp") == []
    store.remove("bundles/a")
    assert store.names("bundles") == []


@pytest.mark.parametrize("name", ["create", "write"])
def test_created_files_are_synchronized_to_disk(tmp_path, monkeypatch, name):
    """A call flushes the new file, and then the file's folder, to the disk before it returns."""
    synced = []

    def fsync(descriptor):
        path = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()
        named = [file.name for file in (tmp_path / "log").iterdir()]
        synced.append((path.relative_to(tmp_path).parts, named))

    (tmp_path / "log").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    getattr(LocalStore(tmp_path), name)("log/1", b"x")
    (file, before), (folder, after) = synced
    assert file[0] == ("tmp" if name == "create" else "log")
    assert before == ([] if name == "create" else ["1"])
    assert (folder, after) == (("log",), ["1"])


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch, number):
    def fail(*paths):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match=f"^{tmp_path} is on a file system without hard links"):
        check_exclusive_create(LocalStore(tmp_path))
    assert LocalStore(tmp_path).names("tmp") == []


def test_a_failed_link_is_an_unclear_outcome(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(NoAnswerError, match=f"^{tmp_path}/log/1: Input/output error$"):
        LocalStore(tmp_path).create("log/1", b"")


class _Full:
    """A file object whose writes fail as they do on a full disk."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["create", "write"])
def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch, name):
    opened = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, *args: _Full(opened(path, *args)))
    with pytest.raises(
        StoreError, match=r"No space left on device; free disk space, then run the com"
    ):
        getattr(LocalStore(tmp_path), name)("log/1", b"x")
    monkeypatch.undo()
    assert LocalStore(tmp_path).names("tmp") == []
    if name == "create":
        assert LocalStore(tmp_path).names("log") == []


@pytest.mark.parametrize("place", ["/dev/null/registry", "/proc/registry"])
def test_an_impossible_folder_is_one_error_line(place):
    with pytest.raises(StoreError, match=r"^/(dev/null: is not a folder|proc/registry: )"):
        check_exclusive_create(open_store(place))


def test_a_file_instead_of_a_folder_is_reported(tmp_path):
    (tmp_path / "log").touch()
    with pytest.raises(StoreError, match=f"^{tmp_path}/log: is not a folder$"):
        LocalStore(tmp_path).create("log/1", b"")


def test_a_folder_without_permission_is_one_error_line():
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o555)
        was_root = os.geteuid() == 0
        # Root may write to every folder, so the test runs as another user.
        if was_root:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=rf"^{folder}/log: Permission denied$"):
                LocalStore(pathlib.Path(folder)).create("log/1", b"")
        finally:
            if was_root:
                os.seteuid(0)


def test_a_read_only_folder_is_one_error_line(tmp_path, monkeypatch):
    def refuse(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *mode, **options)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r"^\S+/tmp/\S+: Read-only file system$"):
        LocalStore(tmp_path).create("log/1", b"")


@pytest.mark.parametrize("url", ["{}", "file://{}", "local://{}"])
def test_a_folder_has_several_spellings(tmp_path, url):
    store = open_store(url.format(tmp_path))
    assert isinstance(store, LocalStore)
    assert store.url == str(tmp_path)
    assert store.local("log/1") == tmp_path / "log" / "1"
    assert open_store("memory://a").local("log/1") is None


def test_the_home_folder_and_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_store("~/registry").url == str(tmp_path / "registry")
    assert open_store("registry").url == str(tmp_path / "registry")
    assert open_store(pathlib.Path("registry")).url == str(tmp_path / "registry")


@pytest.mark.parametrize("url", ["", "nothing://a", "://a"])
def test_an_invalid_url_is_a_usage_error(url):
    with pytest.raises(ConfigError, match=r"^--registry: ") as raised:
        open_store(url)
    assert "\n" not in str(raised.value)


def test_a_missing_library_is_a_usage_error(monkeypatch):
    fsspec.register_implementation("absent", "absent.Files", clobber=True, errtxt="Install it")
    with pytest.raises(ConfigError, match=r"^--registry: absent://a cannot be reached: Install it"):
        open_store("absent://a")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"^--registry: s3://a cannot be reached: .*fsspec"):
        open_store("s3://a")


@pytest.mark.parametrize("url", ["zip://{}/none.zip", "zip://x::{}/none.zip", "zip://x::{}/no.zip"])
def test_a_missing_archive_is_a_usage_error(tmp_path, url):
    (tmp_path / "no.zip").write_text("no zip")
    with pytest.raises(ConfigError, match=r"^--registry: zip://\S+ cannot be reached: ") as raised:
        open_store(url.format(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_missing_server_is_a_usage_error():
    with socket.socket() as closed:
        # The socket is bound but does not listen, so a connection to its port is refused.
        closed.bind(("127.0.0.1", 0))
        place = f"ftp://ann:{SECRET}@127.0.0.1:{closed.getsockname()[1]}/registry"
        with pytest.raises(ConfigError, match=r"^--registry: ftp://ann:\*\*\*@127\S+ cannot be re"):
            open_store(place)


@pytest.fixture
def silent():
    """A server that accepts connections and never answers; yields its port and the connections."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        guests = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    guests.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1], guests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for guest in guests:
            guest.close()


def _silent_options(port):
    return {"key": "key", "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}


def test_a_hanging_store_times_out(silent, monkeypatch):
    """A call sends at most six requests, each with a default timeout of at most ten seconds."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    assert stores._S3_CONFIG["read_timeout"] * 6 <= 60
    monkeypatch.setitem(stores._S3_CONFIG, "read_timeout", 0.1)
    port, guests = silent
    start = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"^s3://a/registry\.json: .*imeout") as raised:
        open_store("s3://a", _silent_options(port)).read("registry.json")
    assert "\n" not in str(raised.value)
    assert len(guests) <= 6
    assert time.monotonic() - start < 30


def test_the_caller_sets_the_timeout_of_a_store(silent):
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    port, guests = silent
    options = _silent_options(port) | {
        "config_kwargs": {"read_timeout": 0.1, "retries": {"total_max_attempts": 1}}
    }
    store = open_store("s3://a", options)
    assert store._files.config_kwargs["connect_timeout"] == 5
    with pytest.raises(NoAnswerError):
        store.read("registry.json")
    assert len(guests) <= 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://k:s3cret@bucket/path", "s3://k:***@bucket/path"),
        ("no place k:s3cret@bucket/path", "no place k:***@bucket/path"),
        ("k:s3@cret@bucket", "k:***@bucket"),
        ("http://:s3cret@host:80/a", "http://:***@host:80/a"),
        ("http://host:80/a@b, ann@desk: no", "http://host:80/a@b, ann@desk: no"),
        ("at 12:30:45 by ann@desk", "at 12:30:45 by ann@desk"),
        ("a://b:s3cret@c and d:s3cret@e", "a://b:***@c and d:***@e"),
    ],
)
def test_passwords_in_urls_are_hidden(text, expected):
    assert stores.hide_passwords(text) == expected


def test_a_password_is_not_shown():
    store = RemoteStore(f"memory://user:{SECRET}@host/path", {})
    assert store.url == "memory://user:***@host/path"
    with pytest.raises(ConfigError) as raised:
        open_store(f"nothing://user:{SECRET}@host/path")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (PermissionError("Access\n Denied"), StoreError, "Access Denied"),
        (TimeoutError(), NoAnswerError, "TimeoutError"),
        (ValueError("\x1b[31mBad Request"), NoAnswerError, r"\\x1b\[31mBad Request"),
        (Exception("boto's own"), NoAnswerError, "boto's own"),
        (OSError(f"GET ftp://ann:{SECRET}@host/a"), NoAnswerError, r"GET ftp://ann:\*\*\*@host/a"),
    ],
)
def test_all_library_errors_become_one_line(monkeypatch, error, kind, reason):
    def fail(*args, **kwargs):
        raise error

    store = open_store("memory://a")
    for name in ("pipe_file", "cat_file", "get_file", "ls", "find"):
        monkeypatch.setattr(store._files, name, fail)
    for call in (
        lambda: store.create("log/1", b""),
        lambda: store.write("log/1", b""),
        lambda: store.read("log/1"),
        lambda: store.download("log/1", pathlib.Path("copy")),
        lambda: store.names("log/1"),
        lambda: store.remove("log/1"),
    ):
        with pytest.raises(StoreError, match=f"^memory://a/log/1: {reason}$") as raised:
            call()
        assert type(raised.value) is kind


def test_a_star_in_a_name_is_not_a_pattern(tmp_path):
    store = open_store(f"memory://{unique_name()}/a*")
    other = open_store(store.url.replace("a*", "ab"))
    for one in (store, other):
        one.write("bundles/1/x", b"")
    store.remove("bundles/1")
    assert store.names("bundles") == []
    assert other.names("bundles") == ["1"]


def test_a_missing_bucket_is_one_error_line(s3):
    store = open_store("s3://nowhere/registry", s3)
    assert store.names("log") == []
    with pytest.raises(NoAnswerError, match=r"^s3://nowhere/registry/tmp/\S+: .*bucket"):
        check_exclusive_create(store)


def test_a_unique_name_has_its_creation_time():
    now = datetime.datetime.now(datetime.UTC)
    names = {unique_name() for _ in range(1000)}
    assert len(names) == 1000
    for name in (*names, f"abc-{unique_name()}"):
        assert re.fullmatch(r"(abc-)?\d{8}T\d{6}Z-[0-9a-f]{16}", name)
        assert abs(creation_time(name) - now) < datetime.timedelta(seconds=60)


@pytest.mark.parametrize(
    "name", ["", "notes.txt", "20260102T030405Z", "20269902T030405Z-0123456789abcdef", ".nfs01"]
)
def test_other_names_have_no_creation_time(name):
    assert creation_time(name) is None


def test_the_memory_store_is_safe_for_threads():
    """`RemoteStore` locks the memory file system of fsspec, whose mode "create" is not atomic."""

    class Slow(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        def exists(self, path, **kwargs):
            found = super().exists(path, **kwargs)
            time.sleep(0.01)
            return found

    fsspec.register_implementation("memory2", Slow, clobber=True)
    store = open_store("memory2://a")
    assert isinstance(store, RemoteStore)
    assert store._lock is stores._MEMORY
    check_exclusive_create(store)
