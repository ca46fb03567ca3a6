"""Where the server listens, told before anything is loaded; and a connection by itself."""

import asyncio
import socket
from contextlib import closing
from functools import partial

import pytest
from starlette.responses import PlainTextResponse

from dynmerge.errors import ConfigError
from dynmerge_server.config import Limits, ServerConfig
from dynmerge_server.listener import close_all, listen, make_server, shown


def test_a_port_in_use_is_named() -> None:
    taken = listen("127.0.0.1", 0)
    port = taken[0].getsockname()[1]
    with pytest.raises(ConfigError, match=rf"^127\.0\.0\.1:{port} is in use$"):
        listen("127.0.0.1", port)
    close_all(taken)
    close_all(listen("127.0.0.1", port))  # nothing of it is left


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1:80"):
        listen("192.0.2.1", 80)  # RFC 5737: nobody's
    with pytest.raises(ConfigError, match="cannot listen at no host:80"):
        listen("no host", 80)


def test_clients_may_queue_before_it_answers() -> None:
    sockets = listen("localhost", 0)
    for each in sockets:
        with closing(socket.socket(each.family)) as client:
            client.settimeout(5)
            client.connect(each.getsockname())
    close_all(sockets)


def test_no_packet_waits_for_the_one_before() -> None:
    listening = listen("127.0.0.1", 0)
    with closing(socket.create_connection(listening[0].getsockname())):
        accepted, _ = listening[0].accept()
        with closing(accepted):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    close_all(listening)


def test_an_address_is_shown_as_in_a_url() -> None:
    assert (shown("::1", 80), shown("localhost", 80)) == ("[::1]:80", "localhost:80")


async def test_a_small_rest_of_a_reply_has_its_deadline_too() -> None:
    app = PlainTextResponse("x" * 40_000)  # less than asyncio keeps before it says so
    config = ServerConfig(limits=Limits(send_seconds=0.2))
    server = make_server(app, config, lambda _port: None)
    server.config.load()
    state = server.server_state
    connection = partial(
        server.config.http_protocol_class,  # type: ignore[arg-type]
        config=server.config,
        server_state=state,
        app_state={},
    )
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with closing(theirs):
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.get_running_loop().connect_accepted_socket(connection, ours)
        assert state.connections
        for _ in range(100):
            await asyncio.sleep(0.02)
            if not state.connections:
                break
        assert not state.connections
        assert 0 < len(theirs.recv(100_000)) < 40_000
