"""Where process 0 listens: whom it lets in, and at which addresses."""

import contextlib
import socket
import threading
import time

import pytest

from jmoe.parallel import channel, listener, process_group, rendezvous
from tests.several_processes import SECRET, free_address, in_parallel


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def opened(address):
    made = listener.Listener(address, SECRET)
    yield made
    made.close()


def knock(address: str, message: bytes = b"") -> socket.socket:
    connection = socket.create_connection(listener.split_address(address), timeout=20)
    with contextlib.suppress(OSError):  # it may have been turned away already
        connection.sendall(message)
    return connection


def has_closed(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


def let_in(address: str, secret: bytes = SECRET) -> channel.Channel:
    end = channel.Channel(knock(address))
    channel.answer_challenge(end, secret, {"purpose": "meet", "index": 1})
    return end


HELLO = b'{"hello": {"purpose": "meet"}, "nonce": "", "proof": %s}\n'


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1, 2]\n",
        b"\xff\n",
        b"{}\n",
        HELLO % b'"00"',
        HELLO % b'"\\ud800"',
        HELLO % b"null",
        b"[" * 4000 + b"\n",
        b"x" * (1 << 20),
    ],
    ids=lambda message: repr(message[:20]),
)
def test_a_stranger_is_turned_away(opened, address, message):
    with knock(address, message) as stranger:
        assert has_closed(stranger)
    assert opened.next_process(0) is None
    assert "secret came from 127.0.0.1" in opened.strangers()


def test_an_answer_that_was_overheard_opens_nothing(opened, address):
    heard = []

    class Overheard(channel.Channel):
        def send(self, value):
            heard.append(value)
            super().send(value)

    end = Overheard(knock(address))
    channel.answer_challenge(end, SECRET, {"purpose": "meet"})
    end.close()
    _, other = opened.next_process(20)
    other.close()
    again = channel.Channel(knock(address))
    again.send(heard[0])
    assert "jmoe" in again.receive() and "refused" in again.receive()
    again.close()
    assert opened.next_process(0) is None


def test_many_that_drip_keep_nobody_waiting(address, monkeypatch):
    ends = threading.Event()

    def drip(number: int) -> None:
        with knock(address) as stranger, contextlib.suppress(OSError):
            while not ends.wait(0.1):
                stranger.sendall(b"x" * (number % 2))  # every other one says nothing

    def come(index: int) -> process_group.ProcessGroup:
        time.sleep(0.5 * index)  # process 0 listens, then strangers come first
        return rendezvous.join(address, 2, index, 20.0, SECRET)

    monkeypatch.setattr(rendezvous, "_RETRY_S", 0.01)
    zero = threading.Thread(target=lambda: groups.append(come(0)), daemon=True)
    groups: list[process_group.ProcessGroup] = []
    zero.start()
    time.sleep(0.2)
    strangers = [
        threading.Thread(target=drip, args=(i,), daemon=True) for i in range(50)
    ]
    for stranger in strangers:
        stranger.start()
    start = time.monotonic()
    groups.append(come(1))
    zero.join(20)
    took = time.monotonic() - start
    ends.set()
    assert len(groups) == 2 and took < channel.HANDSHAKE_S
    for group in groups:
        group.close()


def test_one_that_drips_is_turned_away_in_time(opened, address, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.5)
    start = time.monotonic()
    with knock(address) as stranger:
        with contextlib.suppress(OSError):
            while time.monotonic() < start + 20:
                stranger.sendall(b"x")
                time.sleep(0.1)
    assert time.monotonic() - start < 10


def test_it_listens_at_the_coordinators_address_only(opened, address):
    _, port = listener.split_address(address)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=20)


def own_hosts(monkeypatch, host: str, *found: str) -> list[str]:
    places = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in found
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    return [place[0] for _, place in listener._own_places(host, 80)]


def test_a_name_that_is_the_loopback_here_stands_for_all_addresses(monkeypatch):
    assert "0.0.0.0" in own_hosts(monkeypatch, "node7", "127.0.1.1")
    assert own_hosts(monkeypatch, "node7", "10.0.0.7") == ["10.0.0.7"]
    assert own_hosts(monkeypatch, "localhost", "127.0.0.1") == ["127.0.0.1"]
    assert own_hosts(monkeypatch, "127.0.0.1", "127.0.0.1") == ["127.0.0.1"]


def test_an_environment_variable_says_where_to_listen(address, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", address)
    made = listener.Listener("192.0.2.1:80", SECRET)  # not an address of this host
    let_in(address).close()
    made.close()
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS")
    with pytest.raises(OSError, match="JAX_COORDINATOR_BIND_ADDRESS says where"):
        listener.Listener("192.0.2.1:80", SECRET)


@pytest.fixture
def pair():
    """A loopback address that leads to a service on the loopback of process 0."""
    groups = in_parallel(
        rendezvous.join,
        *((at, 2, index, 20.0, SECRET) for at in [free_address()] for index in (0, 1)),
    )
    yield groups
    for group in groups:
        group.close()


def test_what_jax_opens_leads_through_the_listener_to_its_service(pair):
    zero, one = pair
    with socket.create_server(listener.split_address(zero.forward_jax())) as service:
        with socket.create_connection(listener.split_address(one.forward_jax())) as end:
            end.sendall(b"to the service")
            other, _ = service.accept()
            assert other.recv(100) == b"to the service"
            other.sendall(b"and back")
            assert end.recv(100) == b"and back"
            other.close()


def test_jaxs_end_stays_open_when_process_0_is_gone(pair):
    zero, one = pair
    with socket.create_server(listener.split_address(zero.forward_jax())) as service:
        end = socket.create_connection(listener.split_address(one.forward_jax()))
        other, _ = service.accept()
        other.close()
    end.settimeout(0.5)
    with pytest.raises(TimeoutError):  # nothing comes, and no end
        end.recv(1)
    end.close()


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:0", "h:70000"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match=f"coordinator='{address}' must read host:"):
        listener.split_address(address)


def test_addresses_of_either_kind_are_understood():
    assert listener.split_address("[::1]:80") == ("::1", 80)
    assert listener.split_address("node-7.cluster:4321") == ("node-7.cluster", 4321)
