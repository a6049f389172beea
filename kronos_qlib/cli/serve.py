"""`kronos-qlib serve`: a page to look at forecasts, rank a market and judge the runs, and its API."""

import argparse
import gc
import os
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

from kronos_qlib.cli.command import Commands, fail

if TYPE_CHECKING:
    from kronos_qlib.web.settings import ServerSettings

HOST, PORT = "127.0.0.1", 7070
DEFAULT_RUNS = "mlflow.db"
_DESCRIPTION = """\
    Serve a page, and the API that it uses, on this machine: forecasts of an instrument with candles, bands and paths,
    a market ranked, runs compared, the ledger, and users' files with what is found in them. It needs no network.

    What may be read is named here: stores, models, a folder for users' files, a ledger, the runs. A request names them
    by the last part of their folder; no path is ever taken from a request.

    Other machines reach it only with --host and --token: whoever opens the page enters the token, programs send
    `Authorization: Bearer TOKEN`. Behind a proxy that ends TLS, name it by --proxy and the public name by
    --public-name.
"""
_EXAMPLES = """\
    examples:
      kronos-qlib serve --store runs/demo/market                       then open http://127.0.0.1:7070
      kronos-qlib serve --store ~/.qlib/qlib_data/cn_data --model small --model runs/mine --uploads uploads
      kronos-qlib serve --store mine --host 0.0.0.0 --token "$(openssl rand -hex 16)" --public-name bars.example.org
"""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say what may be read, which `serve` and `mcp` share."""
    command.add_argument(
        "--store", action="append", default=[], type=Path, metavar="DIR", help="a Qlib store; may stand several times"
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME|DIR",
        help="nano, mini, small, base, or a folder, as in forecast; may stand several times (default: nano)",
    )
    command.add_argument(
        "--uploads", type=Path, metavar="DIR", help="folder for users' files (default: none are taken)"
    )
    command.add_argument(
        "--ledger",
        metavar="URL",
        default=os.environ.get("KRONOS_LEDGER"),
        help="the ledger, in which forecasts of stores are kept (default: $KRONOS_LEDGER, or none)",
    )
    command.add_argument(
        "--exchange",
        metavar="NAME",
        help="whose sessions the stores' instruments follow where their names do not tell: XNYS (default: not known)",
    )
    command.add_argument("--device", default="cpu", help="of the models: cpu, cuda, auto (default: cpu)")
    command.add_argument(
        "--runs", metavar="URI", help="MLflow store of the runs (default: mlflow.db of this folder, if it is there)"
    )


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `kronos-qlib`."""
    command = commands.add_parser(
        "serve",
        help="a page of forecasts, markets and runs, and its API",
        description=dedent(_DESCRIPTION),
        epilog=dedent(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)
    command.add_argument("--host", default=HOST, help=f"address to listen on (default: {HOST}, this machine alone)")
    command.add_argument("--port", type=int, default=PORT, metavar="N", help=f"(default: {PORT})")
    command.add_argument(
        "--token",
        metavar="TEXT",
        default=os.environ.get("KRONOS_TOKEN"),
        help="what requests must bring; 16 characters or more (default: $KRONOS_TOKEN, or none)",
    )
    command.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name under which browsers reach it; HOST:PORT where the port is not the server's",
    )
    command.add_argument(
        "--proxy", action="append", default=[], metavar="ADDRESS", help="a proxy whose X-Forwarded headers are believed"
    )
    command.set_defaults(run=run)


def settings_of(options: argparse.Namespace) -> "ServerSettings":
    """Read the options that `serve` and `mcp` share. Raises ValueError."""
    from kronos_qlib.data.calendar import check_exchange
    from kronos_qlib.web.settings import ServerSettings, name_models, name_stores

    if options.exchange is not None:
        check_exchange(options.exchange)

    runs = options.runs
    if runs is None and Path(DEFAULT_RUNS).is_file():
        runs = f"sqlite:///{DEFAULT_RUNS}"
    models = name_models(options.model or ["nano"])
    return ServerSettings(
        name_stores(options.store),
        models,
        options.uploads,
        options.ledger,
        runs,
        exchange=options.exchange,
        device=options.device,
    )


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    import warnings
    from dataclasses import replace

    warnings.filterwarnings("ignore")  # what was found is among the notes
    try:
        import uvicorn

        from kronos_qlib.web.app import make_app
        from kronos_qlib.web.safety import PunctualProtocol
        from kronos_qlib.web.settings import LOOPBACK, check_token, names_of
    except ModuleNotFoundError as error:
        return fail("serve", ValueError(f"needs the package {error.name}: pip install 'kronos-qlib[web]'"))
    try:
        named = (*options.public_name, *options.proxy)
        check_token(options.host, options.token, named)
        private = options.host in LOOPBACK and not named
        shared = replace(
            settings_of(options),
            token=options.token,
            hosts=(*options.public_name, *names_of(options.host)),
            port=options.port,
            paths_shown=private,
        )
        app = make_app(shared)
    except (ValueError, OSError) as error:
        return fail("serve", error)
    gc.freeze()
    name = f"[{options.host}]" if ":" in options.host else options.host
    print(f"kronos-qlib serves on http://{name}:{options.port}; Ctrl-C ends it", flush=True)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        http=PunctualProtocol,
        server_header=False,
        proxy_headers=bool(options.proxy),
        forwarded_allow_ips=options.proxy or None,
        limit_concurrency=2 * shared.limits.requests,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16_384,
        ws="none",
    )
    return 0
