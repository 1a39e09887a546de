import pytest

from cnn_jax.serve import tokens
from cnn_jax.serve.tokens import Tokens
from cnn_jax.system.errors import ConfigError

READER, KEEPER = "reader-token-0123456789", "keeper-token-0123456789"
FILE = f"# Of the team.\n\npredict {READER}\n  admin   {KEEPER}  \n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(FILE)
    return path


def test_only_bearer_tokens_of_the_file_give_access(file):
    found = Tokens(file)
    for header, expected in (
        (f"Bearer {READER}", True),
        (f"bearer  {READER} ", True),
        (f"Bearer {KEEPER}", True),
        (f"Bearer {READER}x", False),
        (f"Bearer {READER[:-1]}", False),
        (f"Basic {READER}", False),
        (READER, False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer \xff\xfe", False),
        ("", False),
        (None, False),
    ):
        assert found.allow(header) is expected, header


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no token"),
        ("# nothing\n", "has no token"),
        ("predict short\n", "line 1: must be"),
        (f"predict {READER}\nroot {KEEPER}\n", "line 2: must be"),
        (f"predict {READER} {KEEPER}\n", "line 1: must be"),
        (f"{READER}\n", "line 1: must be"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, text, message):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokens(tmp_path / "tokens")
    assert READER not in str(caught.value)
    assert KEEPER not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        Tokens(tmp_path / "none")
    (tmp_path / "tokens").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        Tokens(tmp_path / "tokens")


def test_a_changed_file_is_read_if_valid(file, monkeypatch, caplog):
    monkeypatch.setattr(tokens, "_CHECK_SECONDS", 0.0)
    found = Tokens(file)
    other = "another-token-0123456789"

    def write(text):
        aside = file.with_name("aside")
        aside.write_text(text)
        aside.replace(file)

    write(f"predict {other}\n")
    assert found.allow(f"Bearer {other}")
    assert found.allow(f"Bearer {READER}") is False
    write("nonsense\n")
    assert found.allow(f"Bearer {other}")
    file.unlink()
    assert found.allow(f"Bearer {other}")
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "line 1" in caplog.text
    assert "cannot read" in caplog.text
    assert READER not in caplog.text
    write(FILE)
    assert found.allow(f"Bearer {READER}")
    assert found.allow(f"Bearer {other}") is False


def test_a_token_that_no_header_can_carry_is_refused(tmp_path):
    (tmp_path / "tokens").write_text(f"predict {'ü' * 20}\n")
    with pytest.raises(ConfigError, match="line 1"):
        Tokens(tmp_path / "tokens")


def test_the_file_is_not_checked_for_every_request(file):
    found = Tokens(file)
    file.write_text(f"predict {'x' * 20}\n")
    assert found.allow(f"Bearer {READER}")


def test_a_client_has_one_key_for_all_ways_to_write_its_token(file):
    tokens = Tokens(file)
    headers = ("Bearer some-token-of-a-client", "bearer   some-token-of-a-client ")
    assert len({tokens.client(header) for header in headers}) == 1
    assert tokens.client(headers[0]) != tokens.client("Bearer another-token-of-a-client")
    assert "some-token" not in tokens.client(headers[0])
