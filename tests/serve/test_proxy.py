"""Whether what answers stands behind our front, and what Ray is asked for. Ray isn't
needed."""

import dataclasses
import functools
import json

import pytest

from jmoe.config import override
from jmoe.config.serve import LimitsConfig, ServeConfig
from jmoe.serve import lifecycle, proxy
from jmoe.serve.front import Access, Front, digest
from jmoe.serve.protocol import LimitedProtocol
from tests.serve.running import address, running

LIMITS = LimitsConfig(header_kib=4, header_seconds=0.3)
KEY = "first-key-of-tests"


async def engine(scope, receive, send) -> None:
    """Answers everything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'{"error": "none"}'})


GUARDED = Front(engine, Access(LIMITS))
LOCKED = Front(engine, Access(LIMITS, (digest(KEY),)))
LIMITED = functools.partial(LimitedProtocol, limits=LIMITS)


def ask(server) -> None:
    host, port = address(server)
    cfg = dataclasses.replace(ServeConfig(limits=LIMITS), host=host, port=port)
    proxy.refuse_unguarded(cfg)


@pytest.mark.parametrize("app", [GUARDED, LOCKED])
def test_a_proxy_with_our_front_and_our_protocol_passes(app):
    with running(app, http=LIMITED) as server:
        ask(server)


def test_a_proxy_without_our_front_is_not_served_by():
    with running(engine, http=LIMITED) as server:
        with pytest.raises(RuntimeError, match="isn't behind jmoe's front: b'HTTP"):
            ask(server)


def test_a_proxy_that_waits_for_headers_of_any_size_is_not_served_by(monkeypatch):
    monkeypatch.setattr(proxy, "START_SECONDS", 0.3)
    with running(GUARDED, http="h11") as server:
        with pytest.raises(RuntimeError, match="takes headers of any size: b''"):
            ask(server)


def test_ray_gets_digests_and_a_hook_that_is_there():
    variables = proxy.environment(Access(LIMITS, (digest(KEY),)))
    assert KEY not in json.dumps(variables)
    module, _, name = variables[proxy.HOOK].rpartition(".")
    assert (module, name) == (proxy.__name__, proxy.put_front.__name__)


def test_tls_files_reach_ray_with_their_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = override(ServeConfig(), ["tls_certificate=a.pem", "tls_key=a.key", "host=::"])
    options = proxy.http_options(cfg)
    assert options["ssl_certfile"] == str(tmp_path / "a.pem")
    assert options["ssl_keyfile"] == str(tmp_path / "a.key")
    assert lifecycle.url(cfg) == "https://[::]:8000"
    assert "ssl_certfile" not in proxy.http_options(ServeConfig())
