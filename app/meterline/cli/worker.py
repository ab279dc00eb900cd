"""`meterline worker`: run a worker process."""

from __future__ import annotations

from typing import Annotated

import typer

from meterline.settings import Settings, load_settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Run a worker. Start as many as there are partitions, at most.")

WebPort = Annotated[
    int | None,
    typer.Option(
        help="Health and metrics; default: metering 6066, billing 6067, quota 6068.", min=1, max=65_535
    ),
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


@app.command()
def metering(web_port: WebPort = None, log_level: LogLevel = "info") -> None:
    """Usage events to ledger rows, windows and dead letters."""
    from meterline.metering.worker import create_app  # noqa: PLC0415 - Faust is slow to import
    from meterline.streaming.app import run_worker  # noqa: PLC0415 - as above

    run_worker(create_app(_settings(web_port)), log_level)


@app.command()
def billing(web_port: WebPort = None, log_level: LogLevel = "info") -> None:
    """Closed windows to Stripe usage records."""
    from meterline.billing.worker import create_app  # noqa: PLC0415 - Faust is slow to import
    from meterline.streaming.app import run_worker  # noqa: PLC0415 - as above

    run_worker(create_app(_settings(web_port)), log_level)


@app.command()
def quota(web_port: WebPort = None, log_level: LogLevel = "info") -> None:
    """Usage totals and grants to credit buckets; alerts."""
    from meterline.quota.worker import create_app  # noqa: PLC0415 - Faust is slow to import
    from meterline.streaming.app import run_worker  # noqa: PLC0415 - as above

    run_worker(create_app(_settings(web_port)), log_level)


def _settings(web_port: int | None) -> Settings:
    settings = load_settings()
    if web_port is None:
        return settings
    return settings.model_copy(update={"worker": settings.worker.model_copy(update={"web_port": web_port})})
