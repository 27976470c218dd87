"""Questions to an OpenAI-compatible endpoint (POST .../chat/completions), with retries.

Temporary failures are retried with growing pauses: no connection, a time-out, HTTP 408, 409, 425,
429 and 5xx, an answer that is no chat completion. The server's Retry-After is obeyed. Permanent
failures are not retried: redirects, 401, 403 and 404 end the run (`Refused`), other statuses fail
the one question (`Unanswered`).
"""

from __future__ import annotations

import base64
import html
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import ConfigError, WeftError
from ..untrusted.printable import one_line
from .exchange import Deadline, opener

PASSING = (408, 409, 425, 429)  # and from 500 on
HOPELESS = (301, 302, 303, 307, 308, 401, 403, 404)
LARGEST = 2**24  # bytes of an answer; a longer one is invalid
LONGEST = 2**16  # of the words beside a status
PATH = "/chat/completions"
Message = dict[str, str]


class Unanswered(WeftError):
    """This question got no answer, after all retries or permanently."""


class Refused(WeftError):
    """No question will get an answer: the key, the address or the model is wrong, or the requested
    pause is too long.
    """


@dataclass(frozen=True)
class Patience:
    """`tries` is the number of requests per question, `timeout` the seconds until an answer must be
    complete, connection and headers included.

    Pauses are first, 2 first, 4 first, ... seconds, at most `longest`, each shortened by up to a
    half at random. `obeyed` is the longest Retry-After that is accepted.
    """

    tries: int = 6
    timeout: float = 120.0
    first: float = 1.0
    longest: float = 60.0
    obeyed: float = 600.0

    def pause(self, attempt: int) -> float:
        """Returns the seconds to wait after this attempt; the first one is 1."""
        return float(min(self.longest, self.first * 2.0 ** min(attempt - 1, 30))) * random.uniform(
            0.5, 1.0
        )


@dataclass(frozen=True)
class Attempt:
    """One failed request. `status` is None without an HTTP answer; `pause` is the seconds to the
    next, or None after the last.
    """

    number: int
    status: int | None
    reason: str
    pause: float | None


class _Failed(Exception):
    def __init__(self, status: int | None, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.after = status, reason, after

    @property
    def passing(self) -> bool:
        return (
            self.status is None
            or self.status in PASSING
            or self.status >= 500
            or self.status == 200
        )


@dataclass(frozen=True)
class Endpoint:
    """`url` ends in /v1 or in /chat/completions. `key` is sent as a bearer token and never stored.
    `key_name` is the source of the key, for messages. `settings` are fields of the request
    besides model and messages; None removes one.

    Raises ConfigError if the address is invalid or a header cannot contain the key.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    key_name: str = "OPENAI_API_KEY"
    settings: Mapping[str, Any] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.netloc
            or parts.query
            or parts.fragment
        ):
            raise ConfigError(
                f"--url {self.url!r} is not a valid address; use a form like "
                "https://api.openai.com/v1 or "
                "http://localhost:8000/v1."
            )
        if parts.username is not None:
            raise ConfigError(
                f"--url: the address must not contain the key; set the variable {self.key_name}."
            )
        if self.key is not None and not (
            self.key and self.key.isascii() and self.key.isprintable()
        ):
            raise ConfigError(
                f"the key in {self.key_name} is empty or has invalid characters (a line break?)."
            )

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith(PATH) else base + PATH

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Returns the request for these messages."""
        asked = {"model": self.model, "messages": list(messages), **self.settings}
        return {name: value for name, value in asked.items() if value is not None}

    def ask(self, messages: Sequence[Message], failed: Callable[[Attempt], None]) -> str:
        """Returns the answer's text. `failed` is called for every failed request, before the pause
        after it.

        Raises Unanswered if this question gets no answer, and Refused if no question will.
        """
        data = json.dumps(self.body(messages)).encode()
        most = self.patience.tries
        for number in range(1, most + 1):
            try:
                return self._request(data)
            except _Failed as error:  # noqa: PERF203 - a try that fails costs seconds
                pause = self._next(error, number)
                failed(Attempt(number, error.status, error.reason, pause))
                if pause is None:
                    raise self._last(error, number) from None
                self.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _next(self, error: _Failed, number: int) -> float | None:
        """Seconds until the next try, or None if there is none."""
        if not error.passing or number >= self.patience.tries:
            return None
        if error.after is None:
            return self.patience.pause(number)
        return error.after if error.after <= self.patience.obeyed else None

    def _last(self, error: _Failed, number: int) -> WeftError:
        if error.status in HOPELESS:
            what = {
                401: f"the key in {self.key_name}"
                if self.key
                else f"whether {self.key_name} is set",
                403: f"the permissions of the key in {self.key_name}",
            }.get(error.status or 0, "--url and --judge")
            return Refused(f"the judge at {self.address} refuses: {error.reason}. Check {what}.")
        if error.after is not None and error.after > self.patience.obeyed:
            return Refused(
                f"the judge at {self.address} asks to wait {error.after:.0f} seconds "
                f"({error.reason}). Repeat the command after that."
            )
        return Unanswered(f"{error.reason} (try {number} of {self.patience.tries})")

    def _request(self, data: bytes) -> str:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "weft",
        }
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.address, data, headers, method="POST")
        seconds = self.patience.timeout
        try:
            with opener(Deadline(seconds)).open(request, timeout=seconds) as response:
                return self._text_of(_whole(response))
        except urllib.error.HTTPError as error:
            with error:
                reason = self._said(f"HTTP {error.code}", _message_of(error))
                after = _seconds(error.headers.get("Retry-After"))
                raise _Failed(error.code, reason, after) from None
        except TimeoutError:
            raise _Failed(None, f"no complete answer within {seconds:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Failed(None, f"no answer within {seconds:g} seconds") from None
            raise _Failed(None, self._said("no connection", str(error.reason))) from None
        except (OSError, HTTPException) as error:
            reason = self._said("the connection broke", f"{type(error).__name__} {error}")
            raise _Failed(None, reason) from None

    def _text_of(self, data: bytes) -> str:
        """Returns the answer's text, without the key, which ends in files and on the terminal."""
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            start = self._said("", data.decode("utf-8", "replace"), 120)
            raise _Failed(200, f"the answer is not a chat completion: {start!r}")
        return self._without_key(text)

    def _said(self, what: str, said: str, most: int = 300) -> str:
        """Returns what happened and the server's words for it: on one line, without the key and
        without control characters.

        The key is taken out before anything is cut, so that no part of it is left.
        """
        said = self._without_key(one_line(self._without_key(said), len(said)))[:most]
        return f"{what}: {said}" if what and said else what or said

    def _without_key(self, text: str) -> str:
        """Returns the text with the key, as it is and as JSON, HTML, URLs and base64 write it,
        replaced.
        """
        if not self.key:
            return text
        plain = self.key
        spelled = {
            plain,
            json.dumps(plain)[1:-1],
            json.dumps(plain)[1:-1].replace("/", "\\/"),
            html.escape(plain),
            quote(plain),
            quote(plain, safe=""),
            base64.b64encode(plain.encode()).decode(),
        }
        for spelling in sorted(spelled, key=len, reverse=True):
            text = text.replace(spelling, "***")
        return text


def _whole(response: Any) -> bytes:
    """Reads the answer, within the deadline of the exchange."""
    parts, size = [], 0
    while piece := response.read1(65536):
        parts.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise _Failed(200, f"an answer of more than {LARGEST} bytes")
    return b"".join(parts)


def _message_of(error: urllib.error.HTTPError) -> str:
    """The server's words beside a status."""
    try:
        return error.read(LONGEST).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""


def _seconds(after: str | None) -> float | None:
    """Parses Retry-After: seconds or a date. Returns None if it is missing or invalid."""
    if after is None:
        return None
    try:
        value = float(after)
    except ValueError:
        try:
            value = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, value) if value < float("inf") else None
