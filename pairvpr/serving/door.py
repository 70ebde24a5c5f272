"""What stands before every route: a request's id, host and token, how many are open; the form of errors and logs."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pairvpr.config.serve_schema import OWN_MACHINE
from pairvpr.serving.errors import RequestError, busy
from pairvpr.serving.service import Service

LOG = logging.getLogger("pairvpr.serving")
REQUEST_ID, ARRIVED_S = "pairvpr.request_id", "pairvpr.arrived_s"
FREE = ("/healthz", "/", "/favicon.ico")
"""What anybody may ask. The page holds nothing of the index; it asks for the token and sends it."""
SECRETS_IN_QUERY = ("token", "access_token", "api_key", "apikey", "authorization", "bearer")
DRAINING_S = 5
"""When to come again to a service that stops: another one may be there by then."""
_OWN_HOST = "(?:{})(?::[0-9]*)?".format(
    "|".join(re.escape(f"[{name}]" if ":" in name else name) for name in OWN_MACHINE)
)
OF_OWN_MACHINE = {
    b"host": re.compile(_OWN_HOST.encode(), re.IGNORECASE),
    b"origin": re.compile(f"https?://{_OWN_HOST}".encode(), re.IGNORECASE),
}
"""What these headers say where a program or a page of this machine asks, also through a forwarded port."""
OWN_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Door:
    """Pure ASGI: nothing is read of a request that it refuses."""

    def __init__(self, app: ASGIApp, *, token: str | None, service: Service, sends_request_id: bool) -> None:
        self._app, self._service, self._sends_request_id = app, service, sends_request_id
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[REQUEST_ID], scope[ARRIVED_S] = _request_id(scope), time.monotonic()
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(OWN_HEADERS)
                if self._sends_request_id:
                    own.append((b"x-request-id", scope[REQUEST_ID].encode()))
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        self._service.num_open += 1
        try:
            self._check(scope)
            await self._app(scope, receive, sent)
        except RequestError as error:
            await _refuse(scope, sent, error)
        except Exception as error:  # a bug: its place in the code is logged, and nothing of it is answered
            LOG.error("request %s: bug in the program: %s", scope[REQUEST_ID], place_of(error))
            if status == 0:
                await _refuse(scope, sent, RequestError(500, "internal", "bug in the program; the log has its place"))
        finally:
            self._service.num_open -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(route, str(status)).inc()
            took_ms = 1000 * (time.monotonic() - scope[ARRIVED_S])
            LOG.info("request %s: %s %s %d in %.0f ms", scope[REQUEST_ID], scope["method"], route, status, took_ms)

    def _check(self, scope: Scope) -> None:
        most = self._service.settings.max_connections
        if self._service.num_open > most:
            raise busy(f"{most} requests are open already (serve.max_connections)", 1)
        if self._service.is_draining and scope["path"] != "/healthz":
            raise busy("the service is stopping", DRAINING_S)
        if self._digest is None and not self._service.settings.allow_anonymous and scope["path"] != "/healthz":
            _check_own_machine(scope)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name.lower() in SECRETS_IN_QUERY for name, _ in query):
            why = "a token in the address ends up in logs; expected the header Authorization: Bearer TOKEN"
            raise RequestError(400, "token_in_query", why)
        path = scope["path"]
        if self._digest is None or path in FREE:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        is_right = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._digest)
        if scheme.lower() != b"bearer" or not is_right:
            raise RequestError(401, "unauthorized", "expected the header Authorization: Bearer TOKEN, with its token")


def _check_own_machine(scope: Scope) -> None:
    """Raise `RequestError` (403) for a request that a page of another host makes a browser on this machine send.

    Such a page may have its host's name lead to 127.0.0.1 (DNS rebinding), or send a form to this machine's address.
    """
    for name, value in scope["headers"]:
        expected = OF_OWN_MACHINE.get(name)
        if expected is not None and not expected.fullmatch(value):
            raise RequestError(
                403,
                "foreign_host",
                f"the header {name.decode().capitalize()} names another host than this machine; expected the address "
                "127.0.0.1, or a service with serve.token_file=FILE or serve.allow_anonymous=true",
            )


def error_body(request_id: str, error: RequestError) -> dict[str, Any]:
    """The JSON of every error."""
    return {"error": {"code": error.code, "message": error.message, "request_id": request_id}}


def error_headers(error: RequestError) -> dict[str, str]:
    """Its headers."""
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}


async def _refuse(scope: Scope, send: Send, error: RequestError) -> None:
    body = json.dumps(error_body(scope[REQUEST_ID], error)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error_headers(error)}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """The client's, if it is a plain one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[A-Za-z0-9_.-]{1,64}", value):
            return value.decode()
    return uuid.uuid4().hex[:16]


def place_of(error: BaseException) -> str:
    """The kind of an error and where in this project it was raised, without any text that may hold paths."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "pairvpr" in frame.filename]
    place = f"{frames[-1].filename.rpartition('pairvpr/')[2]}:{frames[-1].lineno}" if frames else "a library"
    return f"{type(error).__name__} in {place}"
