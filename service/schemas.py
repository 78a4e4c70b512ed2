"""What HTTP requests and answers look like: their fields, types and units, as the OpenAPI description tells them.

Requests are checked against these, strictly. Answers are written without them, for speed; a test checks each.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.errors import Rejected
from service.records import STREAM_ID_MAX, check_stream


def _stream_id(stream: str) -> str:
    try:
        return check_stream(stream)
    except Rejected as error:
        raise PydanticCustomError("stream_id", str(error)) from error


StreamId = Annotated[
    str,
    AfterValidator(_stream_id),
    Field(
        description="Id of a stream: the key of its records.",
        json_schema_extra={"minLength": 1, "maxLength": STREAM_ID_MAX},
        examples=["sensor-1"],
    ),
]
PARTITION_SAYS = "The partition of the observations topic: where several have a stream of this id, and one is meant."
Partition = Annotated[int, Field(ge=0, le=2**31 - 1, description=PARTITION_SAYS)]
TimeMs = Annotated[int, Field(description="Epoch milliseconds.")]
ByQuantile = dict[str, list[float]]
Scalar = float | None


class Strict(BaseModel):
    """Nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(strict=True, extra="forbid")


class GivenObservation(Strict):
    """One observation of a history."""

    ts: Annotated[Any, WithJsonSchema({"type": ["integer", "string"]})] = Field(
        description="When it was observed: epoch milliseconds, or RFC 3339 text with an offset from UTC."
    )
    value: FiniteFloat | None = Field(description="In the series' own unit; null: nothing was observed.")
    covariates: dict[str, FiniteFloat | None] = Field(
        {}, description="Further numbers by name, of those that the model knows; one left out is unknown."
    )


class PredictRequest(Strict):
    """Name a stream, give a history, or both."""

    stream: StreamId | None = Field(None, description="Id of a live stream to forecast, or to go on from.")
    partition: Partition | None = Field(None, description=PARTITION_SAYS)
    history: list[GivenObservation] | None = Field(
        None,
        min_length=1,
        description="Observations in the order of their times. Each is placed on the model's grid as the worker would:"
        " a missing step counts as not observed, a second one for a step and one out of order are ignored, and after a"
        " gap too long (`max_gap` of `/v1/model`) what lies before it is forgotten.",
    )
    horizon: int | None = Field(
        None, ge=1, description="Answer the first so many steps; at most, and by default, the model's horizon."
    )
    quantiles: list[FiniteFloat] | None = Field(
        None, min_length=1, description="Answer these of the model's quantiles; by default all."
    )
    raw: bool = Field(False, description="Answer the quantiles as the model gives them, without their calibration.")


Order = Literal["id", "anomaly", "error", "heard"]


class Page(BaseModel):
    """Which streams to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1_000, description="Most streams in an answer.")
    after: str = Field("", max_length=STREAM_ID_MAX, description="List ids after this one: `next` of the page before.")
    q: str = Field("", max_length=STREAM_ID_MAX, description="List only ids that contain this text.")
    stream: StreamId | None = Field(None, description="List only the stream of this id, if it is there.")
    order: Order = Field(
        "id",
        description="What comes first: the least `id`, the oddest last value (`anomaly`), the largest MASE one step"
        " ahead (`error`), or who was `heard` last. All but `id` list the first `limit` only, without further pages.",
    )


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Forecast(Answer):
    """A forecast, as the forecasts topic has it, with the times that it is for."""

    stream: str | None = Field(description="Id of the stream; null for a history of no stream.")
    ts: TimeMs = Field(description="Time of the last observation seen, epoch milliseconds.")
    slot: int = Field(description="The place of that observation on the model's grid, in steps.")
    step_ms: int | None = Field(description="The model's step, milliseconds; null: each observation is a step.")
    model: str = Field(description="Id of the model.")
    count: int = Field(description="Observations seen since the stream began (or began afresh).")
    observed: Scalar = Field(description="The last value, in the series' own unit; null: nothing was observed.")
    anomaly: Scalar = Field(
        description="How odd that observation, and a little those before it, were to the forecasts that stood open for"
        " them: -log10 of the probability of the like, 2 is one in a hundred; null: not observed, or still warming."
    )
    quantiles: ByQuantile = Field(
        description="By quantile, one number a step of the horizon, in the series' own unit: element k is for the step"
        " k + 1 after the last one seen. At each step they increase with the quantile."
    )
    status: Literal["warming", "live"] = Field(
        description="`warming` until so many steps were seen (`warmup` of `/v1/model`)."
    )
    timestamps: list[int] | None = Field(
        description="The time of each step of the horizon, epoch milliseconds; null if the model has no clock."
    )


class HorizonScores(Answer):
    """How good the forecasts of a live stream were, the last 500 or so counting most."""

    scored: float = Field(description="Forecasts whose truth came; older ones count for less than 1 each.")
    mase: Scalar = Field(
        description="Absolute error of the median over that of the seasonal naive forecast; below 1: better."
    )
    pinball: Scalar = Field(description="Mean quantile loss (doubled), in the series' own unit.")
    coverage: Scalar = Field(description="Share of truths within the outermost quantiles, 0 to 1.")


class Scores(HorizonScores):
    """How good the forecasts one step ahead of a live stream were, and those of other horizons."""

    by_horizon: dict[str, HorizonScores] = Field(description="By steps ahead: 1, 2, 4, 8 ... and the last.")
    total: HorizonScores = Field(description="Of these horizons together.")


class Stream(Answer):
    """A live stream."""

    stream: str = Field(description="Id of the stream.")
    partition: int = Field(description="The partition of the observations topic that it was last heard in.")
    ts: TimeMs = Field(description="Time of its last observation, epoch milliseconds.")
    count: int = Field(description="Observations since it began (or began afresh).")
    observed: Scalar = Field(description="Its last value, in the series' own unit; null: nothing was observed.")
    status: Literal["warming", "live"] = Field(description="Whether it has seen `warmup` steps.")
    anomaly: Scalar = Field(description="How odd its last value was, as a forecast tells it.")
    scores: Scores = Field(description="How good its forecasts were.")


class StreamDetail(Stream):
    """A live stream with its open forecast."""

    forecast: Forecast = Field(description="The forecast that stands open, as `/v1/predict` tells it.")


class StreamPage(Answer):
    """Some of the streams, in order."""

    streams: list[Stream] = Field(description="At most `limit`, in the order asked for.")
    total: int = Field(description="How many streams match, on all pages; an id that two workers have counts twice.")
    next: str | None = Field(description="Give this as `after` for the next page; null: this is the last.")


class Layer(Answer):
    """A layer of the recurrence after its last step; each list has one number a hidden unit."""

    h: list[float] = Field(description="Hidden state, -1 to 1.")
    c: list[float] = Field(description="Cell state C, the constant error carousel; zeros for a GRU or RNN.")
    gates: dict[str, list[float]] = Field(
        description="What the gates were in the last step. LSTM: `input`, `forget`, `output` (0 to 1) and the"
        " `candidate` (-1 to 1); GRU: `reset`, `update` (0 to 1) and the `candidate`; a plain RNN has none."
    )


class StreamState(Answer):
    """What the model remembers of a stream."""

    stream: str = Field(description="Id of the stream.")
    partition: int = Field(description="The partition of the observations topic that it was last heard in.")
    ts: TimeMs = Field(description="Time of its last observation, epoch milliseconds.")
    steps: int = Field(description="Steps seen, missing ones included.")
    gap: int = Field(description="Steps since a value was last observed.")
    level: Scalar = Field(description="Its mean of late, in its own unit; null: no value was observed yet.")
    scale: float = Field(description="Its mean deviation from that of late, in its own unit.")
    layers: list[Layer] = Field(description="The recurrent layers, the one nearest to the input first.")


class PastObservation(Answer):
    """An observation beside what had been forecast for it."""

    ts: TimeMs = Field(description="Its time, epoch milliseconds.")
    value: Scalar = Field(description="In the series' own unit; null: nothing was observed.")
    forecast: dict[str, float] | None = Field(
        description="By quantile, what had been forecast one step before, in the series' own unit; null: nothing was."
    )
    anomaly: Scalar = Field(description="How odd it was, as a forecast tells it; null: nobody could say.")


class StreamHistory(Answer):
    """The recent past of a stream, oldest first."""

    stream: str = Field(description="Id of the stream.")
    partition: int = Field(description="The partition of the observations topic that it was last heard in.")
    quantiles: list[str] = Field(description="The quantiles kept: the outermost ones and the median.")
    observations: list[PastObservation] = Field(description="Oldest first; as many as the service keeps.")


class ForecastRow(BaseModel):
    """One step of a forecast; and for each quantile a field with its name, `_` for the dot: `q0_1`, `q0_5`, `q0_9`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    step: int = Field(description="Steps ahead of the last one seen, from 1 on.")
    ts: TimeMs | None = Field(description="The time that it is for, epoch milliseconds; null: the model has no clock.")
    time: str | None = Field(description="The same as RFC 3339 text, in UTC.")


class Model(Answer):
    """The model that is served."""

    id: str = Field(description="Its name and the first digits of its weights' checksum; equal ids forecast equally.")
    step_ms: int | None = Field(description="Milliseconds between slots; null: each observation is one step.")
    season: int = Field(description="Steps after which its series resemble themselves; 1: no season.")
    horizon: int = Field(description="Steps forecast.")
    quantiles: list[float] = Field(description="Quantiles forecast, increasing.")
    covariates: list[str] = Field(description="Names of further numbers that it takes with each observation.")
    warmup: int = Field(description="Steps after which a forecast counts as live.")
    context: int = Field(description="Steps that it remembers as they were.")
    max_gap: int = Field(description="Missing steps that are bridged; after more a stream starts afresh.")
    training: dict[str, Any] = Field(description="How it came to be: table, seed, options.")
    scores: dict[str, dict[str, Scalar]] = Field(
        description="From its backtest, by method, then by measure: wql, mase, coverage."
    )


class ClassifyRequest(Strict):
    """What a classifier is asked: a history, to be told what it is."""

    history: list[GivenObservation] = Field(
        min_length=1,
        description="Observations in the order of their times, placed on the grid as a forecaster's are.",
    )


class Classified(Answer):
    """What a classifier says of a history; `label` and `probabilities`, or `value` where it was trained to regress."""

    model: str = Field(description="Id of the model.")
    ts: TimeMs = Field(description="Time of the last observation that counted, epoch milliseconds.")
    count: int = Field(description="How many observations counted.")
    label: str = Field("", description="The most probable class.")
    probabilities: dict[str, float] = Field({}, description="By class; they sum to 1.")
    value: float | None = Field(None, description="The value told, in the unit of the labels that it was trained on.")


class ClassifierModel(Answer):
    """The classifier that is served."""

    id: str = Field(description="Its name and the first digits of its weights' checksum; equal ids answer equally.")
    labels: list[str] = Field(description="The classes; none: it tells a value.")
    steps: int = Field(description="Of a longer history the last so many steps are read.")
    step_ms: int | None = Field(description="Milliseconds between slots; null: each observation is one step.")
    season: int = Field(description="Steps after which its series resemble themselves; 1: no season.")
    covariates: list[str] = Field(description="Names of further numbers that it takes with each observation.")
    max_gap: int = Field(description="Missing steps that are bridged; what lies before a longer gap is forgotten.")
    training: dict[str, Any] = Field(description="How it came to be: table, label, seed, options.")
    scores: dict[str, dict[str, Scalar]] = Field(
        description="On series held back, by method, then by measure: accuracy, macro_f1, log_loss, or mae, rmse."
    )


class Health(Answer):
    """It is well."""

    status: Literal["alive", "ready"] = Field(description="What was asked about.")


class FieldError(Answer):
    """What is wrong with one field; its value is not repeated."""

    loc: list[str | int] = Field(description="Where it is: `body`, `query` or `path`, then names and indexes.")
    msg: str = Field(description="What it must be.")


class Problem(Answer):
    """An error, after RFC 9457."""

    type: Literal["about:blank"] = Field(description="The status says which kind it is.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong, and what to do.")
    errors: list[FieldError] = Field([], description="With status 422: the fields at fault.")
