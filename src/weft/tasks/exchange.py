"""One HTTP exchange with one deadline: connecting, sending, and every byte of status, headers and
body.

The time-out of a socket starts again with each byte, so a server that sends one byte at a time
would hold a client for ever. Here the socket's time-out is the time left, set anew before each
read. Only the look-up of the host's name has the limits of the system's resolver.
"""

from __future__ import annotations

import io
import socket
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any


class Deadline:
    """The end of an exchange."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds left. Raises TimeoutError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def opener(deadline: Deadline) -> urllib.request.OpenerDirector:
    """Returns an opener whose requests end at the deadline, with TimeoutError, and which refuses
    redirects. The content of an answer is read within the same deadline.
    """
    return urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another address, and the question as a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_Connection, deadline=self.deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_SecureConnection, deadline=self.deadline), req)


class _Timed:
    """Mixed into a connection of http.client."""

    sock: Any
    response_class: Any

    def __init__(self, *args: Any, deadline: Deadline, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.deadline = deadline
        self.response_class = partial(_response, deadline)
        self._create_connection = partial(_connect, deadline)

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self.deadline.left())
        super().send(data)  # type: ignore[misc]


class _Connection(_Timed, HTTPConnection):
    response_class: Any


class _SecureConnection(_Timed, HTTPSConnection):
    response_class: Any


class _Bytes(io.RawIOBase):
    """The bytes that a socket receives."""

    def __init__(self, raw: Any, connected: Any, deadline: Deadline) -> None:
        self.raw, self.connected, self.deadline = raw, connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.connected.settimeout(self.deadline.left())
        count: int | None = self.raw.readinto(buffer)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


def _response(deadline: Deadline, connected: Any, *args: Any, **fields: Any) -> HTTPResponse:
    response = HTTPResponse(connected, *args, **fields)
    # The unbuffered reader of the socket, which keeps it open until the response is closed.
    response.fp = io.BufferedReader(_Bytes(response.fp.detach(), connected, deadline))
    return response


def _connect(deadline: Deadline, address: Any, _: Any = None, source: Any = None) -> socket.socket:
    """Tries the addresses of a host in turn. Raises OSError."""
    host, port = address
    reason: OSError = OSError("the name has no address")
    for family, kind, protocol, _name, place in socket.getaddrinfo(
        host, port, 0, socket.SOCK_STREAM
    ):
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(deadline.left())
            if source:
                made.bind(source)
            made.connect(place)
            made.settimeout(deadline.left())  # for the handshake of TLS
        except OSError as error:
            made.close()
            reason = error
        else:
            return made
    raise reason
