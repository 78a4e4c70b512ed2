"""The front door: the `carousel` command. Each sub-command is imported when it is called."""

from __future__ import annotations

import inspect
import logging
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer

from model.errors import CarouselError
from service.settings import Settings

if TYPE_CHECKING:
    from model.bundle import Bundle
    from training.table import Columns

app = typer.Typer(
    help="Forecasts thousands of time series at once, live: an LSTM whose state is carried from message to message.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Table = Annotated[Path, typer.Argument(help="A long table, CSV (may be .gz) or Parquet: one row an observation.")]
IdColumn = Annotated[str, typer.Option(help="Column that names the series.")]
TimeColumn = Annotated[
    str, typer.Option(help="Column with the time: text, dates, or epoch numbers (s, ms, us or ns by their size).")
]
ValueColumn = Annotated[str, typer.Option(help="Column with the value; empty or NaN means missing.")]
Covariates = Annotated[str, typer.Option(help="Further columns that help to forecast: NAME[,NAME...].")]
Timezone = Annotated[
    str | None, typer.Option(help="Zone of times without an offset, such as Europe/Berlin.  \\[default: UTC]")
]
AS_TRAINED = "  \\[default: as in the table that the bundle was trained on]"
FORECASTS_ONLY, LABELS_ONLY = ("horizon", "quantiles", "test", "trials", "resume"), ("label_column",)
"""Options of `train` that one of its tasks alone has a use for."""
ItsIdColumn = Annotated[str | None, typer.Option(help=f"Column that names the series.{AS_TRAINED}")]
ItsTimeColumn = Annotated[str | None, typer.Option(help=f"Column with the time.{AS_TRAINED}")]
ItsValueColumn = Annotated[str | None, typer.Option(help=f"Column with the value.{AS_TRAINED}")]
ItsTimezone = Annotated[str | None, typer.Option(help=f"Zone of times without an offset.{AS_TRAINED}")]
Servers = Annotated[str, typer.Option(envvar="CAROUSEL_BOOTSTRAP_SERVERS", help="Kafka brokers, HOST:PORT[,...].")]


@app.command()
def demo(
    for_: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            min=1,
            help="End by itself then; status 0 if every stream was forecast.",
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=1, help="Table time per wall time: 7200 plays two hours a second.")
    ] = 7200,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option(envvar="CAROUSEL_BOOTSTRAP_SERVERS", help="An existing Kafka instead of the embedded one."),
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Port of the API; 0: any free one.  \\[default: 8000, or a free one]"),
    ] = None,
) -> None:
    """Everything on this machine: Kafka, a model trained on a sample table, the worker, live data, the API.

    The first time fetches Kafka (about 50 MB) and trains for up to two minutes; both are kept for the next time.
    Ctrl-C ends it and leaves nothing running.
    """
    from deploy.demo import DemoConfig, run

    quiet("kafka")
    if not run(DemoConfig(for_s=for_, speed=speed, bootstrap_servers=bootstrap_servers, http_port=http_port)):
        raise typer.Exit(1)


@app.command()
def train(
    context: typer.Context,
    table: Table,
    out: Annotated[Path, typer.Option(help="Directory to write the bundle to.")],
    id_column: IdColumn = "unique_id",
    time_column: TimeColumn = "ds",
    value_column: ValueColumn = "y",
    covariates: Covariates = "",
    timezone: Timezone = None,
    name: Annotated[str, typer.Option(help="Name of the model.  \\[default: that of the directory]")] = "",
    step: Annotated[
        str | None,
        typer.Option(
            help="Time between observations: 15min, 1h, 1d ...; none: each observation is a step."
            "  \\[default: found from the table]"
        ),
    ] = None,
    season: Annotated[
        int | None,
        typer.Option(help="Steps after which the series resembles itself; 1: none.  \\[default: found from the table]"),
    ] = None,
    horizon: Annotated[int, typer.Option(help="Steps to forecast ahead.")] = 24,
    quantiles: Annotated[str, typer.Option(help="Quantiles to forecast.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    test: Annotated[
        int | None,
        typer.Option(help="Steps at the end of each series held back for the backtest.  \\[default: a tenth]"),
    ] = None,
    task: Annotated[
        str, typer.Option(help="forecast; or classify, regress: tell the label of a whole series.")
    ] = "forecast",
    label_column: Annotated[
        str, typer.Option(help="Column with the label of each series, with --task classify or regress.")
    ] = "label",
    cell: Annotated[str, typer.Option(help="lstm, gru, or rnn: a plain one, to see what gates are good for.")] = "lstm",
    hidden_size: Annotated[int, typer.Option(help="Numbers in h and in C, a layer.")] = 64,
    layers: Annotated[int, typer.Option(help="Recurrent layers.")] = 2,
    dropout: Annotated[float, typer.Option(help="Dropped between layers and before the head while training.")] = 0.2,
    epochs: Annotated[int | None, typer.Option(help="Most epochs.  \\[default: 20]")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Begin no epoch later than this.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the cycle.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal models, on the same machine.")] = 0,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Search: train so often, with other sizes and rates around those given; keep the best."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted training or search stood.")
    ] = False,
) -> None:
    """Train a model on a table, backtest it on the held-back end beside the seasonal naive, write a bundle.

    Example: carousel train sales.csv --id-column shop --time-column day --value-column sold --out models/sales
    """
    refuse(context, FORECASTS_ONLY if task != "forecast" else LABELS_ONLY, f"--task {task}")
    if task != "forecast":
        from training.classify import ClassifyConfig, fit_classifier

        setup_logging("info")
        known = {"epochs": epochs, "max_seconds": max_minutes and max_minutes * 60, "learning_rate": learning_rate}
        whole = ClassifyConfig(
            out,
            label_column,
            task,  # type: ignore[arg-type]  # checked there
            name=name,
            step=step,
            season=season,
            cell=cell,  # type: ignore[arg-type]
            hidden_size=hidden_size,
            layers=layers,
            dropout=dropout,
            seed=seed,
            **{field: value for field, value in known.items() if value is not None},  # type: ignore[arg-type]
        )
        fit_classifier(table, columns(id_column, time_column, value_column, covariates, timezone), whole)
        return
    from training.fit import TrainConfig, fit

    setup_logging("info")
    given = {
        "epochs": epochs,
        "max_seconds": None if max_minutes is None else max_minutes * 60,
        "learning_rate": learning_rate,
    }
    config = TrainConfig(
        out=out,
        name=name,
        step=step,
        season=season,
        horizon=horizon,
        quantiles=numbers(quantiles, "--quantiles"),
        test_steps=test,
        cell=cell,  # type: ignore[arg-type]  # checked by the model's config
        hidden_size=hidden_size,
        layers=layers,
        dropout=dropout,
        seed=seed,
        resume=resume,
        **{field: value for field, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    read = columns(id_column, time_column, value_column, covariates, timezone)
    if trials:
        from training.trials import search

        search(table, read, config, trials)
    else:
        fit(table, read, config)


@app.command()
def backtest(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    table: Table,
    id_column: ItsIdColumn = None,
    time_column: ItsTimeColumn = None,
    value_column: ItsValueColumn = None,
    timezone: ItsTimezone = None,
    last: Annotated[
        int | None,
        typer.Option(min=1, help="Forecast from the last so many steps of each series.  \\[default: as held back]"),
    ] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Of those steps, every so-manieth.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Beside the seasonal naive: ets, theta (both of statsforecast) or none.  \\[default: ets,theta]"
        ),
    ] = None,
    baseline_origins: Annotated[
        int | None,
        typer.Option(min=1, help="Origins at which those are fitted.  \\[default: 120, or what takes four minutes]"),
    ] = None,
    forecasts: Annotated[Path | None, typer.Option(help="Write all forecasts to this Parquet file.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with tables and pictures to this .html file or directory.")
    ] = None,
) -> None:
    """Replay a table as it would be served and say how good the forecasts were, beside what else one might use.

    Example: carousel backtest models/sales sales.csv --report sales.html
    """
    from model.bundle import load_bundle
    from training.evaluate import run

    setup_logging("info")
    loaded = load_bundle(bundle)
    read = columns_of(loaded, id_column, time_column, value_column, timezone)
    run(
        loaded,
        table,
        read,
        last=last,
        every=every,
        baselines=baselines,
        baseline_origins=baseline_origins,
        forecasts=forecasts,
        report=report,
    )


@app.command("inspect")
def inspect_(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    table: Table,
    stream: Annotated[str, typer.Option(help="The series to let through the model, by its id.")],
    out: Annotated[Path, typer.Option(help="Directory to write page, pictures and numbers to.")] = Path("inspected"),
    last: Annotated[int, typer.Option(min=2, help="Look at the last so many steps of it.")] = 400,
    id_column: ItsIdColumn = None,
    time_column: ItsTimeColumn = None,
    value_column: ItsValueColumn = None,
    timezone: ItsTimezone = None,
) -> None:
    """Open a model up: each gate, C and h through time, how long units remember, how far gradients reach back.

    Writes index.html (with all pictures in it), summary.json and trace.parquet.
    """
    from model.bundle import load_bundle
    from training.inspect import run

    setup_logging("info")
    loaded = load_bundle(bundle)
    read = columns_of(loaded, id_column, time_column, value_column, timezone)
    run(loaded, table, read, stream, last=last, out=out)


@app.command()
def memory(
    out: Annotated[Path, typer.Option(help="Directory to write page, pictures and numbers to.")] = Path("memory"),
    steps: Annotated[int, typer.Option(min=10, help="Length of the adding problem.")] = 400,
    needle: Annotated[str, typer.Option(help="Steps that a needle is to be remembered.")] = "50,100,200,500,1000",
    updates: Annotated[int, typer.Option(min=1, help="Updates that a cell may take to learn to add.")] = 1000,
    needle_updates: Annotated[int, typer.Option(min=1, help="And to remember a needle.")] = 600,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results, on the same machine.")] = 0,
) -> None:
    """Measure how far back RNN, GRU and LSTM can remember, and show why: by how far their gradients reach.

    The adding problem and a needle in a haystack; some minutes on one core. Writes index.html and memory.json.
    """
    from training.memory import MemoryConfig, run

    setup_logging("info")
    lengths = tuple(int(length) for length in numbers(needle, "--needle"))
    run(MemoryConfig(steps, lengths, updates, needle_updates, seed), out)


@app.command()
def replay(
    table: Table,
    bootstrap_servers: Servers = "127.0.0.1:9092",
    topic: Annotated[
        str, typer.Option(envvar="CAROUSEL_OBSERVATIONS_TOPIC", help="Topic to write to.")
    ] = "carousel.observations",
    speed: Annotated[float, typer.Option(min=0, help="Table time per wall time; 0: as fast as Kafka takes it.")] = 1,
    align: Annotated[bool, typer.Option("--align", help="Let all series begin at once, whatever their dates.")] = False,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many rows of each series.")] = None,
    id_column: ItsIdColumn = None,
    time_column: ItsTimeColumn = None,
    value_column: ItsValueColumn = None,
    covariates: Annotated[
        str | None, typer.Option(help="Further columns to send: NAME[,NAME...].  \\[default: those of the bundle]")
    ] = None,
    timezone: ItsTimezone = None,
    model: Annotated[
        Path | None, typer.Option(help="Bundle that was trained on such a table: it knows the columns.")
    ] = None,
) -> None:
    """Play a table into Kafka as if it were live: keyed by series, in the order of time, at a chosen speed.

    Example: carousel replay sales.csv --model models/sales --speed 86400
    """
    from deploy.replay import ReplayConfig, run

    quiet("kafka")
    config = ReplayConfig(bootstrap_servers=bootstrap_servers, topic=topic, speed=speed, align=align, last=last)
    bundle = None
    if model:
        from model.bundle import load_bundle  # with torch, for which who names the columns need not wait

        bundle = load_bundle(model)
    run(table, columns_of(bundle, id_column, time_column, value_column, timezone, covariates), config)


@app.command()
def broker(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: any free one.")] = 9092,
    data: Annotated[
        Path | None, typer.Option(help="Directory for its data.  \\[default: a temporary one, removed on stop]")
    ] = None,
) -> None:
    """Run a genuine Apache Kafka in the foreground, on this machine only. Ctrl-C stops it.

    The first start fetches it (about 50 MB); later ones need no network.
    """
    from deploy.broker import run

    run(port, data)


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="throughput, step, latency, http, restore, memory, growth, training.  \\[default: throughput step]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, all in turn; medians count.")] = 3,
    streams: Annotated[
        int | None, typer.Option(min=1, help="Streams that are followed.  \\[default: as suits each, mostly 1000]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Observations of each.  \\[default: as suits each, 20 or 100]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured at a time, at most.")] = 5,
    rates: Annotated[str, typer.Option(help="Observations a second at which latency is measured.")] = "300,1000",
    most_streams: Annotated[
        int, typer.Option(min=1_000, help="How far growth goes; 1000000 takes minutes, and gigabytes.")
    ] = 100_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 1,
    transport: Annotated[
        list[str] | None, typer.Option(help="The worker's Kafka client; may be repeated.  \\[default: kafka-python]")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Bundle to serve.  \\[default: LSTM 64 x 2, 24 x 9, rank 6, not trained]")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMMAND",
            help="Another program, measured beside: it reads BOOTSTRAP, IN_TOPIC, OUT_TOPIC and GROUP from its"
            " environment and answers each observation once. May be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write JSON, table and picture: to FILE.json and beside it, or a directory.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write a flame graph of the worker: .svg, .html or .json (speedscope).")
    ] = None,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option(envvar="CAROUSEL_BOOTSTRAP_SERVERS", help="An existing Kafka instead of the embedded one."),
    ] = None,
) -> None:
    """Measure how fast and how large the worker is, beside the limits of its parts; all in one run, in turns.

    Example: carousel bench throughput latency --against "python rival.py" --out figures/
    """
    from deploy.bench.load import BenchConfig
    from deploy.bench.suite import run

    quiet("kafka")
    config = BenchConfig(
        what=tuple(what or BenchConfig.what),
        rounds=rounds,
        streams=streams,
        steps=steps,
        threads=threads,
        rates=numbers(rates, "--rates"),
        seconds=seconds,
        most_streams=most_streams,
        bootstrap_servers=bootstrap_servers,
        transports=tuple(transport or BenchConfig.transports),
        model=model,
        against=tuple(against or ()),
        out=out,
        profile=profile,
    )
    run(config)


@app.command()
def chaos(
    short: Annotated[bool, typer.Option("--short", help="The small run that `make test` makes, of some 40 s.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal loads and faults.  \\[default: drawn anew, and told]")
    ] = None,
    observations: Annotated[int | None, typer.Option(help="Observations that are sent.  \\[default: 20000]")] = None,
    streams: Annotated[int | None, typer.Option(help="Streams that they are of.  \\[default: 500]")] = None,
    rate: Annotated[float | None, typer.Option(help="Most observations sent a second.  \\[default: 300]")] = None,
    kills: Annotated[int | None, typer.Option(help="How often a worker is killed -9.  \\[default: 20]")] = None,
    terms: Annotated[int | None, typer.Option(help="How often one is stopped by SIGTERM.  \\[default: 2]")] = None,
    stops: Annotated[
        int | None, typer.Option(help="How often one is stopped (SIGSTOP) beyond its session.  \\[default: 2]")
    ] = None,
    adds: Annotated[int | None, typer.Option(help="How many workers are added and removed.  \\[default: 1]")] = None,
    twins: Annotated[int | None, typer.Option(help="How often two processes take one slot.  \\[default: 1]")] = None,
    evictions: Annotated[
        int | None, typer.Option(help="How often one is thrown out of its group.  \\[default: 2]")
    ] = None,
    broker_kills: Annotated[int | None, typer.Option(help="How often Kafka is killed -9.  \\[default: 3]")] = None,
    aborts: Annotated[
        int | None, typer.Option(help="Transactions of observations that are aborted.  \\[default: 12]")
    ] = None,
    guarantee: Annotated[
        str | None, typer.Option(help="exactly_once or at_least_once.  \\[default: exactly_once]")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="kafka-python or librdkafka.  \\[default: kafka-python]")
    ] = None,
    limit_s: Annotated[float | None, typer.Option(help="Give up after so many seconds.  \\[default: 1800]")] = None,
) -> None:
    """Torment workers and Kafka with a seeded plan of faults, then prove that the forecasts are as if nothing happened.

    Status 0 only if every forecast, every dead letter and every final state equals those of an undisturbed run.
    """
    from deploy.chaos.plan import SHORT, ChaosConfig
    from deploy.chaos.run import run

    quiet("kafka")
    given = {name: value for name, value in locals().items() if name in ChaosConfig.__annotations__}
    given["seed"] = secrets.randbelow(10**6) if seed is None else seed
    config = {name: value for name, value in given.items() if value is not None}
    if not run(replace(SHORT if short else ChaosConfig(), **config)):
        raise typer.Exit(1)


def command_of_settings() -> Any:
    """`serve` with a flag for every setting, so that neither can be forgotten when one is added."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option(help="YAML file with settings, by these names with _.")],
        )
    ]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else field.default
        # A list is given as text, and so is a bool: a flag with its opposite would leave no room for the names.
        as_text = get_origin(field.annotation) is list or field.annotation is bool
        kind = str if as_text else field.annotation
        text = f"{field.description}  \\[default: {default}; env: CAROUSEL_{name.upper()}]"
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    kind | None,  # type: ignore[operator]
                    typer.Option(help=text, show_default=False),
                ],
            )
        )

    def command(config: Path | None, **flags: Any) -> None:
        """Follow the streams of a Kafka topic and answer every observation with a forecast; serve the HTTP API.

        Each setting comes from its flag, else from its CAROUSEL_* variable, else from the YAML file, else from its
        default. SIGTERM or Ctrl-C ends it in order.
        """
        settings = Settings.load(flags, config)
        from service.logs import handler_of

        setup_logging(settings.log_level, handler_of(settings))
        try:
            run_workers(settings)
        except CarouselError as error:
            if settings.log_format == "console":
                raise
            logging.getLogger("carousel").critical("%s", error)
            raise typer.Exit(1) from error

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


app.command("serve")(command_of_settings())


def run_workers(settings: Settings) -> None:
    if settings.workers > 1:
        from service.supervisor import supervise

        supervise(settings)
    else:
        from service.serve import serve

        serve(settings)


def columns(id_column: str, time_column: str, value_column: str, covariates: str, timezone: str | None) -> Columns:
    from training.table import Columns

    names = tuple(name.strip() for name in covariates.split(",") if name.strip())
    return Columns(unique_id=id_column, ds=time_column, y=value_column, covariates=names, timezone=timezone)


def columns_of(
    bundle: Bundle | None,
    id_column: str | None,
    time_column: str | None,
    value_column: str | None,
    timezone: str | None,
    covariates: str | None = None,
) -> Columns:
    """The columns that are named; of those that are not, the bundle's, and of what it does not know, the usual ones."""
    usual = {"id_column": "unique_id", "time_column": "ds", "value_column": "y", "timezone": None}
    known = usual | (dict(bundle.training) if bundle else {})
    return columns(
        id_column or known["id_column"],
        time_column or known["time_column"],
        value_column or known["value_column"],
        ",".join(bundle.config.covariates) if bundle and covariates is None else covariates or "",
        timezone or known["timezone"],
    )


def refuse(context: typer.Context, options: Sequence[str], beside: str) -> None:
    """Raises CarouselError if one of these was given, which would be of no effect."""
    for option in options:
        source = context.get_parameter_source(option)
        if source and source.name != "DEFAULT":
            raise CarouselError(f"--{option.replace('_', '-')} means nothing with {beside}: leave it out")


def numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(sorted(float(part) for part in text.replace(",", " ").split()))
    except ValueError as error:
        raise CarouselError(f"{option} takes numbers with commas between them, not {text!r}") from error


def setup_logging(level: str, handler: logging.Handler | None = None) -> None:
    """To stderr, or where the handler writes; it keeps its format if it has one."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[handler or logging.StreamHandler(sys.stderr)],
    )
    if level != "debug":
        quiet("kafka", "httpx")  # a broker that is away is worth a line, not fifty; a request passed on is worth none


def quiet(*loggers: str) -> None:
    """Libraries whose log would spoil a terminal's page; what matters of it comes back as an error."""
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def main() -> None:
    """Run the command; what the user can mend ends in one line and status 1, Ctrl-C in status 130."""
    try:
        app()
    except CarouselError as error:
        print(f"carousel: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
