"""A small HTTP server for pages about the server itself, in threads of its own so that a slow reader delays no call."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6

Page = Callable[[Message], tuple[str, bytes]]
"""From the request's headers to a content type and a body."""

_READ_SECONDS = 10
"""A connection that says nothing for this long is closed."""
_POLL_SECONDS = 0.05


class PagesServer:
    """Answers GET for exactly the paths it is given, from construction until ``close``.

    Raises:
        OSError: when the port cannot be had.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        class Handler(_Handler):
            def page(self) -> Page | None:
                return pages.get(self.path.partition("?")[0])

        kind = _Ipv6Server if ":" in host else ThreadingHTTPServer
        self._server = kind((host, port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Ipv6Server(ThreadingHTTPServer):
    address_family = AF_INET6


class _Handler(ABC, BaseHTTPRequestHandler):
    server_version, sys_version = "transformer-serving", ""
    timeout = _READ_SECONDS

    @abstractmethod
    def page(self) -> Page | None:
        """The page of this path; None: there is none."""

    def do_GET(self) -> None:
        page = self.page()
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, body = page(self.headers)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is not worth a line."""
