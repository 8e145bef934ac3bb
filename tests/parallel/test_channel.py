"""Channels between processes: messages, proofs, and where the secret comes from."""

import socket
import stat

import pytest

from jmoe.parallel import channel
from tests.several_processes import SECRET, in_parallel


@pytest.fixture
def ends():
    """Two ends of a connection."""
    pair = [channel.Channel(end) for end in _connected()]
    yield pair
    for end in pair:
        end.close()


def _connected() -> list[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return [one, server.accept()[0]]


def test_messages_arrive_whole_however_they_were_cut(ends):
    one, other = ends
    for part in (b'{"a"', b": 1}\n[2]\n", b"3", b"\n"):
        one.connection.sendall(part)
    assert [other.receive() for _ in range(3)] == [{"a": 1}, [2], 3]


def test_a_message_beyond_the_limit_is_refused(ends):
    one, other = ends
    one.connection.sendall(b"x" * 200_000)
    with pytest.raises(ValueError, match="longer than 4096 bytes"):
        other.receive(limit=4096)


@pytest.mark.parametrize("theirs", [SECRET, b"another secret"])
def test_both_ends_prove_the_secret_or_both_refuse(ends, theirs):
    hello = {"index": 1}
    introduced, challenged = in_parallel(
        lambda function, *arguments: function(*arguments),
        (channel.answer_challenge, ends[0], theirs, hello),
        (channel.challenge, ends[1], SECRET),
    )
    if theirs == SECRET:
        assert (introduced, challenged) == (None, hello)
    else:
        assert isinstance(introduced, channel.AuthenticationError)
        assert isinstance(challenged, channel.AuthenticationError)


def test_an_end_that_only_seems_to_know_the_secret_is_refused(ends):
    one, other = ends
    other.send({"jmoe": "00"})
    other.send({"proof": "00"})  # without any, it accepts whatever it is told
    with pytest.raises(channel.AuthenticationError, match="another secret"):
        channel.answer_challenge(one, SECRET, {})


def test_what_an_end_says_of_itself_is_part_of_its_proof(ends, monkeypatch):
    one, other = ends
    send = one.send
    monkeypatch.setattr(one, "send", lambda x: send(x | {"hello": {"index": 7}}))
    _, challenged = in_parallel(
        lambda function, *arguments: function(*arguments),
        (channel.answer_challenge, one, SECRET, {"index": 1}),
        (channel.challenge, other, SECRET),
    )
    assert isinstance(challenged, channel.AuthenticationError)


def test_the_secret_is_the_environments_or_kept_for_the_user_alone(tmp_path):
    given = {"JMOE_SECRET": "0123456789abcdef"}
    assert channel.read_secret(given) == b"0123456789abcdef"
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    made = channel.read_secret(home)
    assert len(made) >= 64 and channel.read_secret(home) == made
    (path,) = (tmp_path / "jmoe").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_several_that_make_the_secret_at_once_get_one(tmp_path):
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    # What one that came first has made meanwhile:
    (tmp_path / "jmoe").mkdir()
    path = tmp_path / "jmoe" / "secret"
    path.touch(0o600)
    path.write_text("0123456789abcdef")
    channel._make_secret(path)
    assert channel.read_secret(environ) == b"0123456789abcdef"
    assert [found.name for found in path.parent.iterdir()] == ["secret"]


def test_a_secret_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JMOE_SECRET has 5 characters"):
        channel.read_secret({"JMOE_SECRET": "short"})
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    channel.read_secret(environ)
    path = tmp_path / "jmoe" / "secret"
    path.chmod(0o640)
    with pytest.raises(ValueError, match="its user's own, with mode 0600"):
        channel.read_secret(environ)
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no secret"):
        channel.read_secret(environ)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError, match="JMOE_SECRET isn't set, and .* can't be used"):
        channel.read_secret({"XDG_CONFIG_HOME": str(blocked)})
