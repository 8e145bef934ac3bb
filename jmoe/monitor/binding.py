"""The socket on which a server will listen, or why there is none."""

import socket


def bind(host: str, port: int, fields: str = "") -> socket.socket:
    """Returns a socket on an address, which doesn't listen yet.

    Args:
      fields: what stands before `host` and `port` in their record, such as "monitor.".

    Raises:
      ValueError: the port is in use or not for this user, or the host isn't this
        machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"{fields}host={host!r} is no address: {error.strerror}."
        ) from error
    family, _, _, _, address = found[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port is free again at once when its server has gone, and not before.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"{fields}port={port} can't be had on {fields}host={host!r}: "
            f"{error.strerror}. Another one is a matter of --set {fields}port=..."
        ) from error
    return bound
