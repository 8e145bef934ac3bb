import pytest

from jmoe.config import MonitorConfig, override
from tests.plain_run import plain_run


def test_a_run_has_no_page_unless_it_is_given_a_port():
    assert plain_run().monitor.port is None
    run = override(plain_run(), ["monitor.port=8265"])
    assert run.monitor == MonitorConfig(port=8265, host="127.0.0.1")


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ValueError, match=f"port={port} must be at"):
        MonitorConfig(port=port)


def test_no_host_is_refused():
    with pytest.raises(ValueError, match="host='' must be"):
        MonitorConfig(port=1, host="")
