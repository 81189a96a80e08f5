"""Whether anybody listens at an address."""

import socket


def check_listens(address: str, *, within_s: float) -> None:
    """Raises `OSError` if nobody accepts a connection at ``HOST:PORT`` in time, or if that is no such address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=within_s).close()
    except (ValueError, OverflowError) as error:
        raise OSError(str(error)) from error


def listens(address: str, *, within_s: float) -> bool:
    """Returns whether somebody accepts a connection at ``HOST:PORT`` in time."""
    try:
        check_listens(address, within_s=within_s)
    except OSError:
        return False
    return True
