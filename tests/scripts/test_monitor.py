"""scripts/monitor.py: a page from outside, and mistakes in one line."""

import json
import socket
import urllib.request

import pytest

from jmoe.config import to_dict
from jmoe.monitor import follow
from tests.plain_run import plain_run


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(plain_run())))
    return tmp_path


def test_a_run_is_shown_until_ctrl_c(script, workdir, port, monkeypatch):
    pages = []

    def look(follower):
        if len(pages) < 2:  # the first look is at what is there already
            return pages.append("")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            pages.append(page.read().decode())
        raise KeyboardInterrupt

    monkeypatch.setattr(follow.RunFollower, "look", look)
    done = script("monitor", f"--workdir={workdir}", f"--set=port={port}")
    assert (done.code, done.err) == (130, "SIGINT: ended.\n")
    assert f"live page   http://127.0.0.1:{port}/\n" in done.out
    assert 'jmoe_run{device="",run="tiny"} 1.0' in pages[-1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workdir={}/none"], "none' holds no run: it has no config.json"),
        (["--endpoint=localhost"], "must begin with http:// or https://"),
        (["--workdir={}", "--set=prot=1"], "Unknown field 'prot'; known: port, host."),
        (["--workdir={}", "--set=host=none.invalid"], "monitor.host='none.invalid' is"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    script, workdir, port, arguments, complaint
):
    given = [argument.format(workdir) for argument in arguments]
    outcome = script("monitor", f"--set=port={port}", *given)
    assert complaint in outcome.mistake()


def test_a_port_in_use_is_a_mistake(script, workdir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = script("monitor", f"--workdir={workdir}", f"--set=port={port}")
    assert f"monitor.port={port} can't be had" in outcome.mistake()


@pytest.mark.parametrize("arguments", [[], ["--workdir=a", "--endpoint=http://b"]])
def test_what_to_show_is_one_thing(script, arguments):
    outcome = script("monitor", *arguments)
    assert outcome.code != 0
    assert "One of --workdir and --endpoint" in outcome.out + outcome.err
