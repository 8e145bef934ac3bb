"""vLLM's own server of an exported model: its best, as nothing of ours is on the way.

    python serve_vllm.py MODEL PORT [SETTING ...]

The engine gets what `scripts/serve.py` gives it with these settings, and is compiled;
but it computes where vLLM would have it by default, in one process less.
"""
# pyright: reportMissingImports=false

import os
import pathlib
import sys
from typing import Any

import uvloop

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve.vllm_engine import make_engine, read_exported, this_host


def main(directory: str, port: str, *settings: str) -> None:
    exported = read_exported(pathlib.Path(directory))
    compiled = ["engine.compiled=True", *settings]
    cfg = override(ServeConfig(name=exported.directory.name), compiled)
    engine = make_engine(exported, cfg, this_host())
    os.environ.update(engine.environment)  # before vLLM is imported
    own = {"host": cfg.host, "port": int(port), "distributed_executor_backend": None}
    uvloop.run(serve(engine.arguments | own))


async def serve(arguments: dict[str, Any]) -> None:
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(**arguments, disable_uvicorn_access_log=True)
    await run_server(parser.parse_args([]))


if __name__ == "__main__":
    main(*sys.argv[1:])
