"""Grafana's dashboards: `make dashboards` writes deploy/grafana/dashboards from them.

Two, for two questions. *Health*: does it run, and keep up? By worker, at the pace of scrapes. *Forecasts*: are they any
good? By job, over hours, as truths come slowly; from the recording rules that the alerts stand on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

DIRECTORY = Path(__file__).parent / "grafana/dashboards"
RUNBOOKS = "/public/carousel/runbooks.md"
"""Where docker-compose.yml lets Grafana serve docs/runbooks.md."""
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WORKERS = 'job=~"$job", instance=~"$instance"'
WIDTH, HEIGHT = 8, 8
Query = tuple[str, str]
"""PromQL, and the name of what it gives."""
Figures = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, table.Panel, heatmap.Panel)


# Queries.


def of(metric: str, more: str = "") -> str:
    """What the chosen workers tell.

    >>> of("carousel_ready")
    'carousel_ready{job=~"$job", instance=~"$instance"}'
    """
    return f"{metric}{{{WORKERS}{more}}}"


def of_jobs(name: str, more: str = "") -> str:
    """What is known of the chosen jobs, all their workers together: the names with colons are of
    deploy/prometheus/rules.yml.
    """
    return f'{name}{{job=~"$job"{more}}}'


def total(query: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({query})" if by else f"sum({query})"


def rate(counter: str, *by: str) -> str:
    """A second.

    >>> rate(of_jobs("carousel_steps_bridged_total"), "job")
    'sum by (job) (rate(carousel_steps_bridged_total{job=~"$job"}[$__rate_interval]))'
    """
    return total(f"rate({counter}[$__rate_interval])", *by)


def quantile(share: float, histogram: str, *by: str) -> str:
    return f"histogram_quantile({share:g}, {rate(of(f'{histogram}_bucket'), 'le', *by)})"


def quantiles(histogram: str, name: str = "") -> list[Query]:
    """The middle of a histogram, and what one in a hundred exceeds."""
    return [(quantile(share / 100, histogram), f"{name} p{share}".strip()) for share in (50, 99)]


# Panels.


def panel(kind: P, title: str, unit: str, says: str, queries: list[Query], alerts: tuple[str, ...]) -> P:
    """What all have. alerts: whose runbooks to look into from here."""
    kind.title(title).unit(unit).description(says).datasource(SOURCE).height(HEIGHT).span(WIDTH)
    for number, (query, name) in enumerate(queries):
        asked = prometheus.Dataquery().expr(query).legend_format(name).datasource(SOURCE).ref_id(chr(ord("A") + number))
        kind.with_target(asked.range())
    if alerts:
        links = [dashboard.DashboardLink(f"Runbook: {alert}").url(f"{RUNBOOKS}#{alert.lower()}") for alert in alerts]
        kind.links([link.type(models.DashboardLinkType.LINK).target_blank(True) for link in links])
    return kind


def graph(title: str, unit: str, says: str, *queries: Query, alerts: tuple[str, ...] = ()) -> timeseries.Panel:
    lines = panel(timeseries.Panel(), title, unit, says, list(queries), alerts)
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST).calcs(["lastNotNull"])
    tooltip = common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
    lines.legend(legend.placement(shapes.LegendPlacement.BOTTOM).show_legend(True)).tooltip(tooltip)
    return lines.line_width(1).fill_opacity(8).show_points(shapes.VisibilityMode.NEVER)


def stacked(lines: timeseries.Panel) -> timeseries.Panel:
    """Parts of a whole."""
    return lines.fill_opacity(25).stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))


def number(
    title: str, unit: str, says: str, query: str, steps: dict[str, float | None], alerts: tuple[str, ...] = ()
) -> stat.Panel:
    """One number, large. steps: its colours, each with the value that it begins at."""
    shown = panel(stat.Panel(), title, unit, says, [(query, title)], alerts)
    thresholds = [models.Threshold(color=color, value=value) for color, value in steps.items()]
    shown.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(thresholds))
    shown.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    shown.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return shown.graph_mode(shapes.BigValueGraphMode.AREA).height(4).span(4)


def rows(title: str, says: str, query: str, hidden: tuple[str, ...], alerts: tuple[str, ...] = ()) -> table.Panel:
    """Labels as a table. hidden: those that tell nothing."""
    listed = panel(table.Panel(), title, "string", says, [], alerts)
    asked = prometheus.Dataquery().expr(query).datasource(SOURCE).ref_id("A").format(PromQueryFormat.TABLE)
    listed.with_target(asked.instant())
    excluded = dict.fromkeys(("Time", "Value", "__name__", *hidden), True)
    organized = models.DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})
    return listed.with_transformation(organized).filterable(True).height(6).span(12)


# Dashboards.


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Some of the values of a label, or all."""
    every = models.VariableOption(text=["All"], value=["$__all"])
    asked = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).current(every)
    asked.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    return asked.multi(True).include_all(True).all_value(".+")


def board(name: str, says: str, since: str, refresh: str) -> dashboard.Dashboard:
    """An empty one, over the time since `since`."""
    begun = dashboard.Dashboard(f"Carousel: {name}").uid(f"carousel-{name}").description(says).tags(["carousel"])
    begun.time(since, "now").refresh(refresh).readonly().tooltip(models.DashboardCursorSync.CROSSHAIR)
    others = dashboard.DashboardLink("Carousel").type(models.DashboardLinkType.DASHBOARDS).tags(["carousel"])
    begun.link(others.keep_time(True).include_vars(True))
    begun.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    return begun.with_variable(choice("job", "Job", "label_values(carousel_build_info, job)"))


def section(onto: dashboard.Dashboard, title: str, *panels: Figures | text.Panel) -> None:
    onto.with_row(dashboard.Row(title))
    for shown in panels:
        onto.with_panel(shown)


def health() -> dashboard.Dashboard:
    """Does it run, and keep up?"""
    made = board("health", "Carousel's workers: what comes in, what goes out, how fast.", "now-1h", "10s")
    made.with_variable(choice("instance", "Worker", 'label_values(carousel_build_info{job=~"$job"}, instance)'))
    for shown in glance():
        made.with_panel(shown)
    alerts, about = of_jobs("ALERTS", ', alertname=~"Carousel.+"'), "Alerts that fire, or are about to (pending)."
    section(made, "Alerts", rows("Alerts", f"{about} Each has a section in the runbooks.", alerts, ("job",)).span(24))
    section(made, "Records in, forecasts out", *flow())
    section(made, "The group, commits and restores", *group())
    section(made, "Inside the worker", *inside())
    section(made, "HTTP", *http())
    section(made, "Processes", *processes())
    return made


def glance() -> list[Figures]:
    there, had = of_jobs("carousel_partitions"), of_jobs("carousel_partitions_assigned")
    firing = total(of_jobs("ALERTS", ', alertname=~"Carousel.+", alertstate="firing"'))
    return [
        number(
            "Workers ready",
            "short",
            "Workers that take part in their group. Fewer than run: some start, or have lost Kafka.",
            f"{total(of('carousel_ready'))} or vector(0)",
            {"red": None, "green": 1},
            ("CarouselNotReady", "CarouselWorkerDown"),
        ),
        number(
            "Forecasts",
            "cps",
            "Forecasts delivered to Kafka, a second.",
            rate(of("carousel_forecasts_produced_total")),
            {"blue": None},
            ("CarouselStalled",),
        ),
        number(
            "End to end, p99",
            "s",
            "From an observation record's timestamp to its forecast's delivery: 99 of 100 of the last 5 minutes were"
            " faster. A replay stamps its records when it sends them.",
            f"max({of_jobs('job:carousel_end_to_end_latency_seconds:p99_rate5m')})",
            {"green": None, "yellow": 1, "red": 5},
            ("CarouselLatencyHigh",),
        ),
        number(
            "Lag",
            "short",
            "Records in Kafka that no worker has read yet. It should fall, or stay near zero.",
            total(of("carousel_consumer_lag_records")),
            {"green": None, "yellow": 10_000, "red": 100_000},
            ("CarouselLagGrows",),
        ),
        number(
            "Partitions without owner",
            "short",
            "Partitions of the observations topic that no worker has: their streams get no forecasts.",
            total(f"max by (job) ({there}) - {total(had, 'job')}"),
            {"green": None, "red": 1},
            ("CarouselPartitionWithoutOwner",),
        ),
        number(
            "Alerts firing",
            "short",
            "How many alerts fire just now; the table below names them.",
            f"{firing} or vector(0)",
            {"green": None, "red": 1},
        ),
    ]


def flow() -> list[Figures]:
    lag = "carousel_consumer_lag_records"
    latency = "job:carousel_end_to_end_latency_seconds"
    return [
        graph(
            "Read and delivered",
            "cps",
            "Records read from Kafka, and forecasts delivered to it. They part where records are late, duplicate, ended"
            " or rejected, or where deliveries fail.",
            (rate(of("carousel_records_consumed_total"), "topic"), "read from {{topic}}"),
            (rate(of("carousel_forecasts_produced_total")), "forecasts delivered"),
            alerts=("CarouselStalled",),
        ),
        stacked(
            graph(
                "Records by outcome",
                "cps",
                "Observed and missing ones move their stream on; duplicate and late ones change nothing; ended ones end"
                " their stream; rejected ones become dead letters.",
                (rate(of("carousel_observations_total"), "outcome"), "{{outcome}}"),
            )
        ),
        stacked(
            graph(
                "Dead letters by reason",
                "cps",
                "Why records were rejected. The codes are those in the dead letters' header carousel.errors.reason.",
                (rate(of("carousel_records_rejected_total"), "reason"), "{{reason}}"),
                alerts=("CarouselRecordsRejected",),
            )
        ),
        graph(
            "End to end",
            "s",
            "From an observation record's timestamp to its forecast's delivery, over 5 minutes; what is slower than"
            " 10 s counts as 10 s. Lag and clocks that differ between machines count too.",
            (of_jobs(f"{latency}:p50_rate5m"), "p50, {{job}}"),
            (of_jobs(f"{latency}:p99_rate5m"), "p99, {{job}}"),
            alerts=("CarouselLatencyHigh",),
        ),
        graph(
            "Lag",
            "short",
            "Records that were not yet read: of all partitions, of the one that has most, and of each. One that grows"
            " alone has a hot key, or a worker that stands still.",
            (total(of(lag), "topic"), "all of {{topic}}"),
            (f"max by (topic) ({of(lag)})", "most in one"),
            (total(of(lag), "topic", "partition"), "partition {{partition}}"),
            alerts=("CarouselLagGrows", "CarouselStalled"),
        ),
        graph(
            "Wait",
            "s",
            "How long a record that comes now waits for its turn, at the pace of the last 5 minutes.",
            (of_jobs(f"job:{lag}:wait_seconds"), "{{job}}"),
            alerts=("CarouselLagGrows",),
        ),
    ]


def group() -> list[Figures]:
    return [
        graph(
            "Partitions",
            "short",
            "Partitions of the observations topic, those that each worker has, and those whose states are just being"
            " restored. The sum of the workers' falls short while partitions move.",
            (f"max by (job) ({of('carousel_partitions')})", "of the topic"),
            (total(of("carousel_partitions_assigned"), "instance"), "{{instance}}"),
            (total(of("carousel_restoring_partitions")), "being restored"),
            alerts=("CarouselPartitionWithoutOwner",),
        ),
        graph(
            "Restores",
            "s",
            "From a partition's assignment to its first observation. Meanwhile the worker is not ready; its other"
            " partitions go on.",
            (
                "histogram_quantile(0.99, "
                + total(of("carousel_state_restore_duration_seconds_bucket"), "le", "instance")
                + ")",
                "p99 since the start, {{instance}}",
            ),
            alerts=("CarouselRestoreSlow",),
        ),
        graph(
            "Restores: progress",
            "percentunit",
            "The part of the replays of just now that is done; all of it where nothing is restored.",
            (of("carousel_restore_progress_ratio"), "{{instance}}"),
            alerts=("CarouselNotReady",),
        ).max(1),
        graph(
            "Commits and snapshots",
            "cps",
            "Transactions that stand, and those that were aborted because the group had moved on: what was aborted is"
            " done again. Beside them the buckets of states that they wrote.",
            (rate(of("carousel_commits_total"), "outcome"), "{{outcome}}"),
            (rate(of("carousel_snapshots_written_total")), "snapshots"),
            alerts=("CarouselCommitsAborted",),
        ),
        graph(
            "Time of a commit",
            "s",
            "To deliver forecasts and dead letters, write snapshots and commit the offsets, once a commit interval.",
            *quantiles("carousel_commit_duration_seconds"),
            alerts=("CarouselLatencyHigh",),
        ),
        graph(
            "Aborted commits",
            "percentunit",
            "Share of a worker's commits of the last quarter of an hour that were aborted.",
            (of_jobs("job_instance:carousel_commits_aborted:ratio_rate15m", ', instance=~"$instance"'), "{{instance}}"),
            alerts=("CarouselCommitsAborted",),
        ),
    ]


def inside() -> list[Figures]:
    shares = [
        (rate(of(f"carousel_{part}_duration_seconds_sum"), "instance"), f"{part}s, {{{{instance}}}}")
        for part in ("wave", "step", "commit")
    ]
    return [
        graph(
            "Where the time goes",
            "percentunit",
            "Share of a worker's time spent in waves and in commits; the model's step is a part of the waves. Both"
            " together near 100 %: the worker can do no more, add one.",
            *shares,
            alerts=("CarouselLatencyHigh",),
        ),
        graph(
            "Time of a wave, and of the model's step in it",
            "s",
            "A wave: gather, advance, scatter, encode.",
            *quantiles("carousel_wave_duration_seconds", "wave"),
            *quantiles("carousel_step_duration_seconds", "step"),
        ),
        graph(
            "Streams in a wave",
            "short",
            "Streams advanced together. More of them make a step cheaper for each.",
            *quantiles("carousel_wave_rows"),
        ),
        graph(
            "Streams",
            "short",
            "Streams with a state, by worker.",
            (of("carousel_active_streams"), "{{instance}}"),
            alerts=("CarouselStreamsEvicted",),
        ),
        graph("State", "bytes", "Bytes of the states in use, by worker.", (of("carousel_state_bytes"), "{{instance}}")),
        graph(
            "Snapshots",
            "Bps",
            "Bytes of states written to the state topic. A bucket that does not change is not written again.",
            (rate(of("carousel_snapshot_bytes_total"), "instance"), "{{instance}}"),
            alerts=("CarouselRestoreSlow",),
        ),
        graph(
            "Gaps",
            "cps",
            "Missing steps made up for gaps in streams, and streams that began afresh because a gap was too long. Many"
            " mean a producer that stops and starts.",
            (rate(of("carousel_steps_bridged_total")), "steps bridged"),
            (rate(of("carousel_streams_restarted_total")), "streams restarted"),
        ).span(12),
        graph(
            "Streams forgotten",
            "cps",
            "Streams forgotten to bound the state: idle for longer than idle_limit_s, or not heard for longest in a"
            " full partition.",
            (rate(of("carousel_streams_evicted_total"), "reason"), "{{reason}}"),
            alerts=("CarouselStreamsEvicted",),
        ).span(12),
    ]


def http() -> list[Figures]:
    dropped = total(f"increase({of('carousel_events_dropped_total')}[$__rate_interval])")
    return [
        graph(
            "Requests",
            "reqps",
            "By route and status; paths that are no route count as none.",
            (rate(of("http_request_duration_seconds_count"), "handler", "status"), "{{handler}} {{status}}"),
        ).span(6),
        graph(
            "Time of a request, p99",
            "s",
            "Until its answer began, by route: 99 of 100 were faster.",
            (quantile(0.99, "http_request_duration_seconds", "handler"), "{{handler}}"),
        ).span(6),
        graph(
            "Passed on to other workers",
            "reqps",
            "Requests about streams that another worker has, by what became of them.",
            (rate(of("carousel_requests_forwarded_total"), "outcome"), "{{outcome}}"),
            alerts=("CarouselForwardingFails",),
        ).span(6),
        graph(
            "Readers of events",
            "short",
            "Open requests to /v1/events, and events not sent because their reader was too slow.",
            (total(of("carousel_event_readers")), "readers"),
            (dropped, "events dropped"),
            alerts=("CarouselEventsDropped",),
        ).span(6),
    ]


def processes() -> list[Figures]:
    return [
        graph(
            "CPU",
            "percentunit",
            "Of one core, by worker: HTTP and torch have threads of their own, so it may be over 100 %.",
            (rate(of("process_cpu_seconds_total"), "instance"), "{{instance}}"),
        ).span(6),
        graph(
            "Memory",
            "bytes",
            "What the process has of the machine's memory. Of addresses it reserves far more, and uses none of it.",
            (of("process_resident_memory_bytes"), "resident, {{instance}}"),
        ).span(6),
        graph(
            "Open files",
            "percentunit",
            "Connections, too, are files: the share of what the system allows.",
            (f"{of('process_open_fds')} / {of('process_max_fds')}", "{{instance}}"),
        ).span(6),
        graph(
            "Running for",
            "s",
            "How long ago each process began: where it falls, a worker was started again.",
            (f"time() - {of('process_start_time_seconds')}", "{{instance}}"),
            alerts=("CarouselWorkerDown",),
        ).span(6),
        rows("Carousel", "The version of each worker.", of("carousel_build_info"), ("job",)),
        rows(
            "Model",
            "The model that each worker serves: equal ids forecast equally.",
            of("carousel_model_info"),
            ("job",),
            ("CarouselMixedModels",),
        ),
    ]


def forecasts() -> dashboard.Dashboard:
    """Are they any good?"""
    made = board("forecasts", "How good Carousel's forecasts are, over all streams and for some.", "now-6h", "1m")
    made.with_variable(choice("stream", "Stream", 'label_values(carousel_watched_observed{job=~"$job"}, stream)'))
    section(made, "All streams: how good", *accuracy())
    section(made, "All streams: how odd", *oddity())
    section(made, "Watched streams (setting watched_streams)", watched(), how_to_draw())
    return made


def accuracy() -> list[Figures]:
    held, level = "job_level_horizon:carousel_intervals_hit:ratio_rate6h", "job_level:carousel_intervals:level"
    dashes = models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [10, 10]})
    beside = [dashes, models.DynamicConfigValue(id_val="custom.fillOpacity", value=0)]
    return [
        graph(
            "Coverage",
            "percentunit",
            "Share of the truths of 6 hours that fell into the interval forecast for them, by level and steps ahead;"
            " dashed, the level itself. Lower means too sure, higher too vague.",
            (of_jobs(held), "{{horizon}} ahead, level {{level}}"),
            (of_jobs(level), "level {{level}}"),
            alerts=("CarouselCoverageOff",),
        ).override_by_regexp("level.*", beside),
        graph(
            "Skill",
            "percentunit",
            "What of the seasonal naive forecast's error is saved, by steps ahead: 0 is no better than repeating the"
            " last season, 100 % without error. Over 6 hours; large series count most.",
            (of_jobs("job_horizon:carousel_forecast_error:skill_rate6h"), "{{horizon}} ahead"),
            alerts=("CarouselWorseThanNaive",),
        ).max(1),
        graph(
            "Quantile loss",
            "short",
            "Mean quantile loss (doubled) of a forecast, in the unit of the series, by steps ahead. Over 6 hours; large"
            " series count most.",
            (of_jobs("job_horizon:carousel_forecast_pinball:mean_rate6h"), "{{horizon}} ahead"),
            alerts=("CarouselWorseThanNaive",),
        ),
        graph(
            "Off the level",
            "percentunit",
            "Coverage less the level, by steps ahead: 0 is as promised.",
            (f"{of_jobs(held)} - on (job, level) group_left () {of_jobs(level)}", "{{horizon}} ahead, level {{level}}"),
            alerts=("CarouselCoverageOff",),
        ),
        graph(
            "Beside the naive forecast",
            "percentunit",
            "Absolute error of the median over that of the seasonal naive forecast, by steps ahead, as it comes: below"
            " 100 % is better than it.",
            (
                f"{rate(of_jobs('carousel_forecast_error_total'), 'horizon')}"
                f" / {rate(of_jobs('carousel_forecast_naive_error_total'), 'horizon')}",
                "{{horizon}} ahead",
            ),
            alerts=("CarouselWorseThanNaive",),
        ),
        graph(
            "Truths",
            "short",
            "How many forecasts had their truth come within 6 hours, by steps ahead: of few, little can be said.",
            (of_jobs("job_level_horizon:carousel_intervals_scored:increase6h"), "{{horizon}} ahead, level {{level}}"),
        ),
    ]


def oddity() -> list[Figures]:
    counted, scores = rate(of_jobs("carousel_anomaly_score_count")), "carousel_anomaly_score_bucket"
    below, spread = rate(of_jobs(scores, ', le="3.0"')), rate(of_jobs(scores), "le")
    asked = prometheus.Dataquery().expr(spread).legend_format("{{le}}").datasource(SOURCE).ref_id("A")
    cells = panel(
        heatmap.Panel(),
        "Anomaly scores",
        "cps",
        "How odd observations were to the forecasts that stood open for them: 2 is one in a hundred, 3 one in a"
        " thousand. The colour tells how many a second.",
        [],
        ("CarouselManyAnomalies",),
    ).with_target(asked.format(PromQueryFormat.HEATMAP).range())
    linear = common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LINEAR)
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return [
        graph(
            "Odd observations",
            "percentunit",
            "Share of observations whose anomaly score is above 2 (within the hour) and above 3 (as they come). While"
            " all is as ever some 1 to 3 % and less than 1 %: many more at once mean that the world has changed, or a"
            " source is broken.",
            (of_jobs("job:carousel_anomalies:ratio_rate1h"), "above 2"),
            (f"1 - {below} / {counted}", "above 3"),
            alerts=("CarouselManyAnomalies",),
        ).span(12),
        cells.calculate(False).color(color).scale_distribution(linear).span(12),
    ]


def watched() -> timeseries.Panel:
    """A panel for each stream. Three quantiles are told; they never cross, so their order says which is which."""
    told = ("carousel_watched_forecast", "carousel_watched_observed")
    forecast, observed = (of_jobs(metric, ', stream=~"$stream"') for metric in told)
    band = [
        models.DynamicConfigValue(id_val="custom.fillBelowTo", value="lowest"),
        models.DynamicConfigValue(id_val="custom.fillOpacity", value=20),
    ]
    lines = graph(
        "$stream",
        "short",
        "What was observed, and what had been forecast for that very moment one step before: the median, and the band"
        " between the outermost quantiles. In the unit of the series, at the time when it came.",
        (f"max by (stream) ({forecast})", "highest"),
        (f"quantile by (stream) (0.5, {forecast})", "median"),
        (f"min by (stream) ({forecast})", "lowest"),
        (f"max by (stream) ({observed})", "observed"),
        alerts=("CarouselCoverageOff",),
    )
    lines.fill_opacity(0).override_by_name("highest", band).repeat("stream").repeat_direction("h").max_per_row(2)
    return lines.height(10).span(24)


DRAWN = """\
Prometheus takes no sample from the future, so what is forecast from now on is not in it. Carousel tells it as rows:

`GET /v1/streams/{id}/forecast` → `[{"step": 1, "ts": 1795262400000, "time": "2026-11-21T12:00:00.000Z", "q0_1": 21.9, \
"q0_5": 23.0, "q0_9": 24.8}, ...]`

With the Infinity data source (`yesoreyeram-infinity-datasource`), which is not part of Grafana and has to be installed:

1. A panel of kind *Time series*, data source *Infinity*; type *JSON*, parser *Backend*, source *URL*, format *Table*.
2. URL: `http://carousel:8000/v1/streams/${stream}/forecast`. Any worker answers for any stream. No root selector.
3. Columns: `time` as *Time*; `q0_1`, `q0_5`, `q0_9` as *Number*, or whichever quantiles the model has.
4. The panel's time range must reach into the future: `now-1h` to `now+24h`, say.
"""


def how_to_draw() -> text.Panel:
    told = text.Panel().title("To draw what is forecast from now on").content(DRAWN).mode(TextMode.MARKDOWN)
    return told.description("How to add a panel with the forecast itself.").height(9).span(24)


def rendered(made: dashboard.Dashboard) -> str:
    """As a file, in an order that only changes where the dashboard does."""
    built = made.build()
    for number, shown in enumerate(built.panels or (), 1):
        shown.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """What is to stand in which file."""
    return {DIRECTORY / f"{make.__name__}.json": rendered(make()) for make in (health, forecasts)}


def main() -> None:
    """Write them."""
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
