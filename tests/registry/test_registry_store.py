import contextlib
import datetime
import errno
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest

from cnn_jax.registry import store as stores
from cnn_jax.registry.store import NoAnswerError, Store, StoreError, unique_name
from cnn_jax.system.errors import ConfigError, hide_passwords

pytest_plugins = ["registry_fixtures"]
SECRET = "s3cret"


def test_a_file_is_created_once(place):
    store = Store(place)
    store.create("log/1", b"first")
    with pytest.raises(FileExistsError):
        store.create("log/1", b"second")
    assert store.read("log/1") == b"first"
    assert store.names("tmp") == []


def test_one_of_many_concurrent_writers_creates_a_file(place):
    store, start = Store(place), threading.Barrier(16)

    def attempt(writer):
        start.wait()
        with contextlib.suppress(FileExistsError):
            store.create("log/1", bytes([writer]))
            return bytes([writer])

    with ThreadPoolExecutor(16) as pool:
        winners = [writer for writer in pool.map(attempt, range(16)) if writer is not None]
    assert winners == [store.read("log/1")]
    assert store.names("tmp") == []


def test_missing_files_raise_file_not_found(place):
    store = Store(place)
    for number in range(2):
        assert store.names("log") == []
        with pytest.raises(FileNotFoundError):
            store.read("log/1")
        store.remove("log")
        store.remove("log/1")
        store.write(f"other/{number}", b"")


def test_names_lists_only_direct_children(place):
    store = Store(place)
    for name in ("a/2", "a/1", "a/b/3", "ab/4"):
        store.write(name, b"x")
    assert store.names("a") == ["1", "2", "b"]
    store.remove("a")
    assert store.names("a") == []
    assert store.names("ab") == ["4"]
    store.remove("ab/4")
    assert store.names("ab") == []


def test_a_written_file_replaces_the_old_file(place):
    store = Store(place)
    for data in (b"first", b"second"):
        store.write("bundles/a/b", data)
        assert store.read("bundles/a/b") == data


def test_listings_are_not_cached(place):
    """Another process may write at any time, so listings and file contents must be current."""
    reader, writer = Store(place), Store(place)
    for number in range(1, 4):
        assert reader.names("log") == [str(one) for one in range(1, number)]
        with pytest.raises(FileNotFoundError):
            reader.read(f"log/{number}")
        writer.create(f"log/{number}", b"x")
        assert reader.read(f"log/{number}") == b"x"
    writer.remove("log")
    assert reader.names("log") == []


def test_many_files_are_read_in_parallel(place):
    store = Store(place)
    for number in range(40):
        store.write(f"log/{number}", b"%d" % number)
    names = [f"log/{number}" for number in range(41)]
    assert store.read_all(names) == [*(b"%d" % number for number in range(40)), None]
    assert store.read_all(names[40:]) == [None]
    assert store.read_all([]) == []


def test_local_files_are_read_only(tmp_path):
    store = Store(tmp_path / "registry")
    store.create("log/1", b"first")
    store.write("bundles/a/b", b"second")
    for name in ("log/1", "bundles/a/b"):
        mode = (tmp_path / "registry" / name).stat().st_mode
        assert stat.S_IMODE(mode) & 0o333 == 0
        assert mode & stat.S_IRUSR
    store.remove("bundles/a")
    assert store.names("bundles") == []


@pytest.mark.parametrize("name", ["create", "write"])
def test_created_files_are_synchronized_to_disk(tmp_path, monkeypatch, name):
    """A call flushes the new file, and then the file's folders, to the disk before it returns."""
    synced, inodes = [], []

    def fsync(descriptor):
        path = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()
        named = [file.name for file in (tmp_path / "log").iterdir()]
        synced.append((path.relative_to(tmp_path).parts, named))
        inodes.append(os.fstat(descriptor).st_ino)

    (tmp_path / "log").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    getattr(Store(tmp_path), name)("log/1", b"x")
    (file, before), *folders = synced
    assert file[0] == ("tmp" if name == "create" else "log")
    assert before == ([] if name == "create" else ["1"])
    assert folders == [((), ["1"]), (("log",), ["1"])]
    # The new name is a link to the flushed file, not to a copy.
    assert inodes[0] == (tmp_path / "log" / "1").stat().st_ino


@pytest.mark.parametrize("name", ["a b", "ü%20x", "x#1", "..b", "猫~*", "-", "a\\b"])
def test_a_folder_may_have_an_unusual_name(tmp_path, name):
    store = Store(tmp_path / name / "registry")
    store.create("log/1", b"x")
    assert store.names("log") == ["1"]
    assert (tmp_path / name / "registry" / "log" / "1").read_bytes() == b"x"


def _fail(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_failed_link_is_an_unclear_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(obstore, "rename", _generic_error)
    with pytest.raises(NoAnswerError, match=f"^{tmp_path}/log/1: Generic .*Input/output error"):
        Store(tmp_path).create("log/1", b"")
    assert Store(tmp_path).names("tmp") == []


def _generic_error(*arguments, **options):
    raise obstore.exceptions.GenericError(
        "Generic LocalFileSystem error: Input/output error (os error 5)\n\nDebug source:\nGeneric"
    )


@pytest.mark.parametrize("name", ["create", "write"])
def test_a_failed_local_write_changes_nothing(tmp_path, monkeypatch, name):
    """A file in a local folder is not created if its content is not on the disk."""
    for fail in (_generic_error, _fail(errno.ENOSPC)):
        monkeypatch.setattr(obstore, "put", fail)
        with pytest.raises(StoreError) as raised:
            getattr(Store(tmp_path), name)("log/1", b"x")
        assert type(raised.value) is StoreError
        assert "\n" not in str(raised.value)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", _fail(errno.EIO))
    with pytest.raises(StoreError, match="Input/output error"):
        Store(tmp_path).create("log/1", b"x")
    assert Store(tmp_path).names("tmp") == []
    assert Store(tmp_path).names("log") == []


@pytest.mark.parametrize("place", ["/dev/null/registry", "/proc/registry"])
def test_an_impossible_folder_is_one_error_line(place):
    for name in ("create", "write"):
        with pytest.raises(StoreError, match=rf"^{place}/(log|tmp)\S+: \S") as raised:
            getattr(Store(place), name)("log/1", b"")
        assert "\n" not in str(raised.value)


def test_a_file_instead_of_a_folder_is_reported(tmp_path):
    (tmp_path / "log").touch()
    with pytest.raises(StoreError, match=f"^{tmp_path}/log/1: .*(Not a directory|File exists)"):
        Store(tmp_path).create("log/1", b"")


@contextlib.contextmanager
def _ordinary_user():
    """Runs as another user if the user is root, because root may open and write every folder."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def test_a_folder_without_permission_is_one_error_line():
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o555)
        with (
            _ordinary_user(),
            pytest.raises(StoreError, match=rf"^{folder}/\S+: .*Permission denied") as raised,
        ):
            Store(folder).create("log/1", b"")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", ["create", "write"])
def test_a_root_folder_that_cannot_be_opened_is_enough(call):
    """With mode 0o311 a user may open the files in a folder, but not the folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name in ("log", "tmp"):
            (root / name).mkdir()
            (root / name).chmod(0o777)
        root.chmod(0o311)
        try:
            with _ordinary_user():
                getattr(Store(root), call)("log/1", b"x")
                assert Store(root).read("log/1") == b"x"
        finally:
            root.chmod(0o700)


def test_new_parent_folders_are_synchronized_to_disk(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        path = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            synced.append((path, [child.name for child in path.iterdir()]))

    monkeypatch.setattr(os, "fsync", fsync)
    Store(tmp_path / "a" / "registry").create("registry.json", b"x")
    assert synced[:2] == [(tmp_path, ["a"]), (tmp_path / "a", ["registry"])]
    Store(tmp_path / "a" / "registry").create("log/1", b"x")
    assert [path for path, _ in synced].count(tmp_path / "a") == 1


@pytest.mark.parametrize("url", ["{}", "file://{}", "local://{}"])
def test_a_folder_has_several_spellings(tmp_path, url):
    store = Store(url.format(tmp_path))
    assert store.url == str(tmp_path)
    assert store.local("log/1") == tmp_path / "log" / "1"
    assert Store("s3://bucket/registry").local("log/1") is None


def test_the_home_folder_and_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Store("~/registry").url == str(tmp_path / "registry")
    assert Store("registry").url == str(tmp_path / "here" / "registry")
    Store(pathlib.Path("../registry")).write("log/1", b"x")
    assert (tmp_path / "registry" / "log" / "1").exists()


@pytest.mark.parametrize("url", ["", "nothing://a", "://a", "memory://a", "https://host/a"])
def test_an_invalid_url_is_a_usage_error(url):
    with pytest.raises(
        ConfigError, match=r"^--registry: must be a folder, or a URL that"
    ) as raised:
        Store(url)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("end", ["?region=s3cret", "#s3cret", "/?", "#"])
def test_a_url_with_a_query_is_a_usage_error(end):
    with pytest.raises(
        ConfigError, match=r"^--registry: s3://bucket/a\S*: must not contain \? or #"
    ):
        Store(f"s3://bucket/a{end}")


def test_an_unprintable_folder_is_one_error_line(tmp_path):
    store = Store(tmp_path / "a\nb")  # Obstore refuses all control characters.
    assert store.url == rf"{tmp_path}/a\nb"
    for call in (lambda: store.create("log/1", b""), lambda: store.read("log/1")):
        with pytest.raises(StoreError, match=rf"^{tmp_path}/a\\nb/(log|tmp)/\S+: ") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["gs://bucket/path", "az://container/path", "abfs://container/path"]
)
def test_other_object_stores_are_opened_without_a_connection(url, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert Store(url).url == url


def test_credentials_of_a_profile_are_used(s3, tmp_path, monkeypatch):
    """boto3 reads the profile; obstore itself reads only environment variables."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(
        "[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text("[profile mine]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["AWS_ENDPOINT_URL"])
    store = Store(f"s3://bucket/{unique_name()}")
    store.create("log/1", b"x")
    assert store.read("log/1") == b"x"


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


def test_a_hanging_store_times_out(silent, monkeypatch):
    port, guests = silent
    monkeypatch.setitem(stores._CLIENT, "read_timeout", "200ms")
    monkeypatch.setitem(stores._RETRY, "retry_timeout", datetime.timedelta(seconds=1))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = Store("s3://a")
    start = time.monotonic()
    for call in (
        lambda: store.read("log/1"),
        lambda: store.create("log/1", b""),
        lambda: store.write("log/1", b""),
        lambda: store.names("log/1"),
        lambda: store.remove("log/1"),
    ):
        with pytest.raises(NoAnswerError, match=r"^s3://a/log/1: Generic S3 error") as raised:
            call()
        assert "\n" not in str(raised.value)
        assert SECRET not in str(raised.value)
    assert guests
    assert time.monotonic() - start < 15


def test_ctrl_c_ends_a_command_on_a_hanging_store(silent):
    port, guests = silent
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "cnn_jax.registry", "list", "--registry=s3://a"]
    process = subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE)
    try:
        while not guests:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130


def test_ctrl_c_ends_parallel_reads():
    """The process ends although the reads in its threads do not end."""
    program = """if True:
        import signal, time
        from cnn_jax.registry.store import Store

        # A shell starts background processes with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def read(name):
            print(name, flush=True)
            time.sleep(60)

        store = Store("unused")
        store.read = read
        store.read_all([str(number) for number in range(100)])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdecimal()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_an_error_ends_parallel_reads(monkeypatch):
    names, started = [str(number) for number in range(1000)], []

    def fail_first(name):
        started.append(name)
        time.sleep(0.01)
        if name == "0":
            raise StoreError("no")

    store = Store("unused")
    monkeypatch.setattr(store, "read", fail_first)
    with pytest.raises(StoreError, match=r"^no$"):
        store.read_all(names)
    count = len(started)
    time.sleep(0.2)
    assert len(started) <= count + stores._READERS < len(names)


def test_an_unknown_profile_is_a_usage_error(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(
        ConfigError, match=r"^--registry: s3://ann:\*\*\*@bucket: .*nobody"
    ) as raised:
        Store(f"s3://ann:{SECRET}@bucket")
    assert "\n" not in str(raised.value)
    assert SECRET not in str(raised.value)


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
        ("https://s3cret@host/a and http://b:80", "https://***@host/a and http://b:80"),
        ("postgresql://host/db?password=s3cret no", "postgresql://host/db?*** no"),
        ("a://b:s3?cret@host/db?user=c:d@e&key=s3cret", "a://b:***@host/db?***"),
        ("abfs://files@host/a abfss://files@host", "abfs://files@host/a abfss://files@host"),
        ("why? ann@desk?no", "why? ann@desk?no"),
    ],
)
def test_passwords_in_urls_are_hidden(text, expected):
    assert hide_passwords(text) == expected


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (PermissionError("Access\n Denied"), StoreError, "Access Denied"),
        (obstore.exceptions.PermissionDeniedError("no\n\nDebug source:\nx"), StoreError, "no"),
        (obstore.exceptions.UnauthenticatedError("who?"), StoreError, r"who\?"),
        (TimeoutError(), NoAnswerError, "TimeoutError"),
        (ValueError("\x1b[31mBad Request"), NoAnswerError, r"\\x1b\[31mBad Request"),
        (Exception(f"GET s3://ann:{SECRET}@host/a"), NoAnswerError, r"GET s3://ann:\*\*\*@host/a"),
    ],
)
def test_all_library_errors_become_one_line(monkeypatch, error, kind, reason):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = Store("s3://a")
    for name in ("put", "get", "list_with_delimiter", "list"):
        monkeypatch.setattr(obstore, name, fail)
    for call in (
        lambda: store.create("log/1", b""),
        lambda: store.write("log/1", b""),
        lambda: store.read("log/1"),
        lambda: store.names("log/1"),
        lambda: store.remove("log/1"),
    ):
        with pytest.raises(StoreError, match=f"^s3://a/log/1: {reason}$") as raised:
            call()
        assert type(raised.value) is kind


def test_a_missing_bucket_is_one_error_line(s3, monkeypatch):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    store = Store("s3://nowhere/registry")
    for call in (lambda: store.names("log"), lambda: store.create("log/1", b"")):
        with pytest.raises(StoreError, match=r"^s3://nowhere/registry/log\S*: .*bucket") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_unique_name_begins_with_the_time():
    names = {unique_name() for _ in range(1000)}
    assert len(names) == 1000
    for name in names:
        match = re.fullmatch(r"(\d{8}T\d{6}Z)-[0-9a-f]{16}", name)
        created = datetime.datetime.strptime(match[1], "%Y%m%dT%H%M%S%z")
        assert abs(created - datetime.datetime.now(datetime.UTC)).total_seconds() < 60
