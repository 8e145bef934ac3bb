"""Shows a run or a vLLM server on a live page, from outside.

python scripts/monitor.py --workdir=runs/tiny
python scripts/monitor.py --endpoint=http://127.0.0.1:8000 --set port=8266

A run is followed by the files of its directory, while it trains or afterwards, and
vLLM by its /metrics; a key that it asks for is read from $OPENAI_API_KEY. jmoe's own
engine has the same page at /monitor, and a run in itself with --set monitor.port=8265.
"""

import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags

from jmoe.config import MonitorConfig, override
from jmoe.monitor import server
from jmoe.train import runtime

if TYPE_CHECKING:
    from jmoe.monitor.follow import Follower

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to show.")
_ENDPOINT = flags.DEFINE_string("endpoint", None, "Address of the vLLM server to show.")
_SET = flags.DEFINE_multi_string(
    "set", [], "path.to.field=value of jmoe/config/monitor.py; repeatable."
)

DEFAULT_PORT = 8265
KEY_VARIABLE = "OPENAI_API_KEY"  # a command line is public
INTERVAL_SECONDS = 1.0


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    runtime.log_warnings_only()
    if (_WORKDIR.value is None) == (_ENDPOINT.value is None):
        raise app.UsageError("One of --workdir and --endpoint says what to show.")
    cfg = override(MonitorConfig(port=DEFAULT_PORT), _SET.value)
    server.check(cfg)
    follower = make_follower()
    with server.opened(cfg, follower) as address:
        print(f"live page   {address}\nmetrics     {address}metrics", flush=True)
        follow(follower)


def make_follower() -> "Follower":
    from jmoe.monitor.follow import RunFollower, VllmFollower  # of checked libraries

    if _WORKDIR.value is not None:
        return RunFollower(runtime.path(_WORKDIR))
    assert _ENDPOINT.value is not None
    return VllmFollower(_ENDPOINT.value, os.environ.get(KEY_VARIABLE))


def follow(follower: "Follower") -> NoReturn:
    """Looks once a second, for good; what goes wrong is told once."""
    trouble = ""
    while True:
        time.sleep(INTERVAL_SECONDS)
        try:
            follower.look()
            said = ""
        except (OSError, ValueError) as error:
            said = str(error)
        if said and said != trouble:
            print(said, file=sys.stderr, flush=True)
        trouble = said


start = runtime.command(main)
