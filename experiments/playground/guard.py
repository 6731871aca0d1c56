"""Refuses requests to the playground that another site's page made the browser send.

A name that resolves to 127.0.0.1 (DNS rebinding) shows in the Host header, and a script of another
page in the Origin header; browsers let no page forge either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NAMES = ("localhost", "127.0.0.1", "[::1]")  # this machine's loopback, as a browser writes it
HTTP_PORT = 80  # browsers leave it out


class OwnPagesOnly:
    """ASGI middleware that answers 403 unless Host, and Origin if there is one, are this server.

    Websockets, polling and plain requests pass the same check.
    """

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        names = [f"{name}:{port}" for name in NAMES] + list(NAMES if port == HTTP_PORT else ())
        self.hosts = {name.encode() for name in names}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_ours(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # closed before it is accepted: the server sends 403
            await send({"type": "websocket.close", "code": 1008})
        else:
            names = " or ".join(sorted(host.decode() for host in self.hosts))
            body = f"Host, and Origin if there is one, must be {names}\n".encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _is_ours(self, headers: list[tuple[bytes, bytes]]) -> bool:
        hosts = [value.lower() for name, value in headers if name.lower() == b"host"]
        origins = [value.lower() for name, value in headers if name.lower() == b"origin"]
        return len(hosts) == 1 and hosts[0] in self.hosts and self.origins.issuperset(origins)
