"""To a real server and back, so that faults can be put between it and its client."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from tests.s3.wire import Request, Response

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Upstream:
    """A handler that asks the server at ``endpoint``. The client's Host header, which is signed, goes on unchanged."""

    def __init__(self, endpoint: str) -> None:
        self._place = urlsplit(endpoint).netloc

    def __call__(self, request: Request) -> Response:
        connection = http.client.HTTPConnection(self._place, timeout=60)
        try:
            return self._ask(connection, request)
        except (OSError, http.client.HTTPException):
            return Response(502, b"", {"content-type": "text/plain"})
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, request: Request) -> Response:
        connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(request.body)
        answer = connection.getresponse()
        body = answer.read()
        headers = {name.lower(): value for name, value in answer.getheaders() if name.lower() not in _HOP}
        if request.method == "HEAD":
            headers["content-length"] = answer.getheader("content-length", "0")
        return Response(answer.status, body, headers)
