"""``python -m server BUNDLE…``: wires bundles, engines, service and metrics together, and serves until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from export.bundle import BundleError
from server.config import ConfigError, Device, EngineOptions, EnginePlace, Precision, ServerOptions, parse_size, parse_tenants
from server.device.session import RuntimeUnavailable
from server.front_ends.supervisor import Supervisor
from server.lifecycle import CannotServe, Lifecycle
from server.loading import load_model
from server.logs import LogLevel, configure_logging
from server.metrics import EngineMetrics, Metrics
from server.server import Server
from server.waiting.admission import AdmissionLimits

_OPTIONS, _ENGINE, _ADMISSION = ServerOptions(), EngineOptions(), AdmissionLimits()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Directories made by `python -m export`.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _OPTIONS.host,
    port: Annotated[int, typer.Option(help="Port of gRPC; 0 takes a free one.")] = _OPTIONS.port,
    http_port: Annotated[int, typer.Option(help="Port of /metrics; 0 takes a free one.")] = _OPTIONS.http_port,
    front_ends: Annotated[
        int,
        typer.Option(help="Processes that take calls; several share the port, one more keeps the queue and engines."),
    ] = _OPTIONS.front_ends,
    device: Annotated[Device, typer.Option(help="Where the models run.")] = _ENGINE.device,
    precision: Annotated[Precision, typer.Option(help="Graphs of the bundle that run; auto: the fastest.")] = _ENGINE.precision,
    max_rows: Annotated[int | None, typer.Option(help="Most hypotheses generated at once, of all requests.")] = None,
    cache_memory: Annotated[
        str | None, typer.Option(help="Most memory of each model's caches, like 2GiB; fewer rows fit into less.")
    ] = None,
    engine: Annotated[
        EnginePlace, typer.Option(help="Where engines run: in processes that are watched and replaced, or in this one.")
    ] = _ENGINE.place,
    engines: Annotated[
        int | None,
        typer.Option(
            help="Engine processes of each model, which share its requests, rows and cache memory.",
            show_default="on a CPU, all cores but one over the threads of each; on a GPU one",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of each engine.", show_default="1 where there are several, else all cores but one"),
    ] = None,
    stall_seconds: Annotated[
        float, typer.Option(help="An engine process that has work and makes no progress for this long is replaced.")
    ] = _ENGINE.stall_seconds,
    max_waiting_requests: Annotated[
        int, typer.Option(help="Inputs that may wait for one model.")
    ] = _ADMISSION.max_waiting_requests,
    max_waiting_tokens: Annotated[
        int, typer.Option(help="Tokens of inputs that may wait for one model.")
    ] = _ADMISSION.max_waiting_tokens,
    default_call_seconds: Annotated[
        float, typer.Option(help="Deadline of calls that bring none.")
    ] = _OPTIONS.default_call_seconds,
    longest_call_seconds: Annotated[
        float, typer.Option(help="Cap on the deadline of calls that bring one.")
    ] = _OPTIONS.longest_call_seconds,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            help="A tenant, named by callers in the metadata key x-tenant: its share of rows and queue, how many of its"
            " requests may wait, and how many rows of a model they may hold (NAME::8 sets only this). Repeat for several;"
            " all other callers share one of weight 1.",
            metavar="NAME[=WEIGHT][:MAX_WAITING[:MAX_ROWS]]",
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long calls in flight may go on after SIGTERM.")
    ] = _OPTIONS.drain_seconds,
    reflection: Annotated[bool, typer.Option("--reflection", help="Answer gRPC reflection (grpcurl and friends).")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="Least level that is logged.")] = LogLevel.INFO,
) -> None:
    """Serves Transformer bundles over gRPC, and their metrics over HTTP.

    SIGTERM or SIGINT ends it gently: health turns NOT_SERVING, calls in flight finish, then it stops. A second one ends it now.
    """
    configure_logging(log_level)
    try:
        engine_options = EngineOptions(
            device=device,
            precision=precision,
            max_rows=max_rows,
            cache_memory=parse_size(cache_memory) if cache_memory else None,
            threads=threads,
            place=engine,
            engines=engines,
            stall_seconds=stall_seconds,
        )
        options = ServerOptions(
            host=host,
            port=port,
            http_port=http_port,
            front_ends=front_ends,
            reflection=reflection,
            default_call_seconds=default_call_seconds,
            longest_call_seconds=longest_call_seconds,
            drain_seconds=drain_seconds,
            admission=AdmissionLimits(
                max_waiting_requests=max_waiting_requests,
                max_waiting_tokens=max_waiting_tokens,
                tenants=parse_tenants(tenant or []),
            ),
        )
        with tempfile.TemporaryDirectory(prefix="transformer-counts-") as counts:
            asyncio.run(_serve(_make_server(bundles, engine_options, options, log_level, Path(counts))))
    except (ConfigError, BundleError) as error:
        raise _end(error, 2) from None
    except (CannotServe, RuntimeUnavailable) as error:
        raise _end(error, 1) from None


def _make_server(
    bundles: list[Path], engine: EngineOptions, options: ServerOptions, log_level: LogLevel, counts: Path
) -> Lifecycle:
    """Raises BundleError, ConfigError or RuntimeUnavailable."""
    version = metadata.version("transformer-serving")
    if options.front_ends == 1:
        metrics = Metrics(version)
        return Server([load_model(path, engine, metrics.step_done, metrics.engine_lost) for path in bundles], options, metrics)
    engine_metrics = EngineMetrics(version, counts=counts)
    models = [load_model(path, engine, engine_metrics.step_done, engine_metrics.engine_lost) for path in bundles]
    return Supervisor(models, bundles, options, engine, engine_metrics, counts, log_level)


async def _serve(server: Lifecycle) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.ask_to_stop)
    # What was imported and loaded stays: without this, every full collection looks at all of it, for tens of milliseconds.
    gc.collect()
    gc.freeze()
    await server.serve()


def _end(error: Exception, code: int) -> typer.Exit:
    """One line, no traceback: what went wrong is the caller's to mend."""
    typer.echo(f"error: {error}", err=True)
    logging.shutdown()
    return typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="python -m server")
