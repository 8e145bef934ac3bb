"""A server has its port, or a plain reason why not."""

import socket

import pytest

from jmoe.monitor.binding import bind


@pytest.mark.parametrize("fields", ["", "monitor."])
def test_a_port_in_use_is_refused_by_the_names_of_its_fields(fields):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = (
            f"^{fields}port={port} can't be had on {fields}host='127.0.0.1': Address "
            f"already in use. Another one is a matter of --set {fields}port="
        )
        with pytest.raises(ValueError, match=said):
            bind("127.0.0.1", port, fields)


def test_another_machines_address_or_none_at_all_is_refused():
    with pytest.raises(ValueError, match="port=1234 can't be had on host='192.0.2.1'"):
        bind("192.0.2.1", 1234)
    with pytest.raises(ValueError, match="monitor.host='no such' is no address"):
        bind("no such", 1234, "monitor.")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_who_binds_may_listen_and_the_port_is_free_once_that_has_ended(host):
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with bind(host, 0) as bound:
        port = bound.getsockname()[1]
        bound.listen()
        with socket.create_connection((host, port)):
            accepted, _ = bound.accept()
            accepted.close()  # first, so that the address is in use for a while more
    with bind(host, port):
        pass
