"""The loops of `model.fused`, over the rows of a block, compiled by numba when they are first called.

They say again what features.py, cells.py, quantiles.py, regression.py, waiting.py, calibration.py, scoring.py and
anomaly.py say of whole batches, in the same order and words: those are the definition, these are the fast copy.

What differs from model to model comes as an argument, the constants of those files too: so each function is compiled
once for all models, and what numba keeps on disk is right even after a constant was changed. (It looks at the time of
this file alone. For that reason, too, all of it is one file.)

Missing values are NaN here as there. So fastmath is what it allows without assuming that there are none: to fuse, to
reorder sums and to divide by multiplying. A loop touches few arrays, or the compiler would not see that it may take
eight numbers at once. A "row" is a row of the block as float64, float32 and so on: r64, r32, r16 are the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "arcp"},
    "_nrt": False,  # no counting of references, a fifth of the time: so nothing is allocated in here
}


def compiled(function: F, options: Mapping[str, Any] = OPTIONS) -> F:
    """Compiled at the first call, from disk where it was before. numba keeps it beside this file or in the user's
    cache, whichever can be written to; where neither can, it compiles anew in each process.
    """
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no locator available
        return cast(F, numba.njit(**options)(function))


def _fetching(_: Any, array: Any, place: Any) -> Any:
    """Ask the processor for the memory at a place of an array of bytes, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kinds = [ir.IntType(32)] * 3
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch.p0", fnty=ir.FunctionType(ir.VoidType(), [data.type, *kinds])
        )
        numbers = [ir.Constant(kind, value) for kind, value in zip(kinds, (0, 2, 1), strict=True)]  # read, L2, data
        builder.call(prefetch, [builder.gep(data, [arguments[1]]), *numbers])
        return context.get_dummy_value()

    return types.void(array, place), generate


_fetch: Any = intrinsic(_fetching)


def _sliding(_: Any, line: Any, by: Any) -> Any:  # noqa: ARG001 - its type is given below
    """line[:-by] = line[by:], where they lie. The compiler itself would go number by number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        numbers = builder.sub(builder.extract_value(array.shape, 0), arguments[1])
        source = builder.gep(array.data, [arguments[1]])
        move: Any = cgutils.raw_memmove
        move(builder, array.data, source, numbers, array.itemsize)
        return context.get_dummy_value()

    return types.void(line, types.int64), generate


_slide: Any = intrinsic(_sliding)


INT, FLOAT, SINGLE = np.int64, np.float64, np.float32

OFFSETS = np.dtype(
    [
        (name, INT)
        for name in (
            *("values", "steps", "gap", "weight", "value_sum", "deviation_sum", "naive_weight", "naive_sum"),
            *("gram", "moment", "h", "c", "gates", "scale", "base", "offsets"),
            *("waiting_base", "waiting_offsets", "waiting_stretch", "stretch", "roughness", "scores", "surprise"),
        )
    ]
)
"""Where in a row each tensor of the state begins, in numbers of its own dtype."""

MODEL = np.dtype(
    [
        *((name, INT) for name in ("past", "season", "context", "horizon", "count", "warmup", "yearly")),
        *((name, INT) for name in ("cell", "hidden", "layers", "inputs", "middle", "low", "high", "calibrates")),
        *((name, INT) for name in ("blends", "rank", "lags", "every", "phases", "step_ms", "day_ms", "week_shift_ms")),
        *((name, FLOAT) for name in ("memory", "year_ms", "clip", "prior", "floor", "tiny", "share")),
        *((name, FLOAT) for name in ("learning_memory", "learning_prior")),
        *((name, FLOAT) for name in ("mood", "mood_steps", "absurd", "smooth", "limit", "soft", "usual")),
        *((name, FLOAT) for name in ("forget_steps", "tail", "certain")),
    ]
)
"""The sizes of a model and the constants of its parts. count: of its quantiles; low, middle, high: which of them are
the tracked ones and the median; blends, calibrates, yearly: 0 or 1; cell: its place in CELLS."""

CELLS = ("lstm", "gru", "rnn")


# --- Functions of one number, of which the compiler takes eight at once -----------------------------------------------


@compiled
def exp(x: Any) -> Any:
    """e^x in float32, to its rounding, with x cut at -87 and 88. After Cephes: 2^n by bits, the rest a polynomial."""
    x = min(max(x, SINGLE(-87.0)), SINGLE(88.0))
    n = np.rint(x * SINGLE(1.44269504))
    r = x - n * SINGLE(0.693359375) + n * SINGLE(2.12194440e-4)
    p = SINGLE(1.9875691500e-4) * r + SINGLE(1.3981999507e-3)
    p = p * r + SINGLE(8.3334519073e-3)
    p = p * r + SINGLE(4.1665795894e-2)
    p = p * r + SINGLE(1.6666665459e-1)
    p = p * r + SINGLE(5.0000001201e-1)
    return (p * r * r + r + SINGLE(1)) * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@compiled
def log(x: Any) -> Any:
    """ln x in float32 of x >= 0, to its rounding; about -87 of 0, and 89 of infinity. After Cephes."""
    bits = SINGLE(max(x, SINGLE(1.17549435e-38))).view(np.int32)
    exponent = np.int32((bits >> 23) - 126)
    m = np.int32((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)  # in [0.5, 1)
    small = m < SINGLE(0.707106781)
    e = SINGLE(exponent) - (SINGLE(1) if small else SINGLE(0))
    m = m - SINGLE(1) + (m if small else SINGLE(0))
    p = SINGLE(7.0376836292e-2) * m - SINGLE(1.1514610310e-1)
    p = p * m + SINGLE(1.1676998740e-1)
    p = p * m - SINGLE(1.2420140846e-1)
    p = p * m + SINGLE(1.4249322787e-1)
    p = p * m - SINGLE(1.6668057665e-1)
    p = p * m + SINGLE(2.0000714765e-1)
    p = p * m - SINGLE(2.4999993993e-1)
    p = p * m + SINGLE(3.3333331174e-1)
    z = m * m
    return p * m * z - SINGLE(2.12194440e-4) * e - SINGLE(0.5) * z + m + SINGLE(0.693359375) * e


@compiled
def softplus(x: Any) -> Any:
    """ln(1 + e^x) in float32. With z = e^-|x|, ln(1 + z) is 2 artanh(z / (2 + z)), whose series soon ends.
    e^-30 is nothing beside any forecast, and squares of less would be too small for the processor's fast ways.
    """
    z = exp(max(-abs(x), SINGLE(-30)))
    s = z / (SINGLE(2) + z)
    q = s * s
    p = SINGLE(1 / 15) * q + SINGLE(1 / 13)
    p = p * q + SINGLE(1 / 11)
    p = p * q + SINGLE(1 / 9)
    p = p * q + SINGLE(1 / 7)
    p = p * q + SINGLE(1 / 5)
    p = p * q + SINGLE(1 / 3)
    return max(x, SINGLE(0)) + SINGLE(2) * s * (p * q + SINGLE(1))


@compiled
def tanh(x: Any) -> Any:
    """tanh x in float32, to its rounding: a quotient of polynomials, Eigen's."""
    x = min(max(x, SINGLE(-7.90531110763549805)), SINGLE(7.90531110763549805))
    q = x * x
    p = SINGLE(-2.76076847742355e-16) * q + SINGLE(2.00018790482477e-13)
    p = p * q + SINGLE(-8.60467152213735e-11)
    p = p * q + SINGLE(5.12229709037114e-08)
    p = p * q + SINGLE(1.48572235717979e-05)
    p = p * q + SINGLE(6.37261928875436e-04)
    p = p * q + SINGLE(4.89352455891786e-03)
    d = SINGLE(1.19825839466702e-06) * q + SINGLE(1.18534705686654e-04)
    d = d * q + SINGLE(2.26843463243900e-03)
    d = d * q + SINGLE(4.89352518554385e-03)
    return x * p / d


@compiled
def sigmoid(x: Any) -> Any:
    return SINGLE(0.5) * tanh(SINGLE(0.5) * x) + SINGLE(0.5)


@compiled
def half(x: Any) -> Any:
    """The bits of x as a float16, rounded to the nearest, a tie to even; |x| < 65,520, as that of any gate is."""
    bits = SINGLE(x).view(np.int32)
    size = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
    # Below 2^-14: adding 0.5 shifts the digits to where a float16 has them, and rounds.
    small = SINGLE(size.view(np.float32) + SINGLE(0.5)).view(np.int32) - 0x3F000000
    return np.uint16((small if size < 0x38800000 else normal) | ((bits >> 16) & 0x8000))


@compiled
def scaled(value: Any, level: Any, scale: Any, clip: Any) -> Any:
    """A value in a step's own units: 0 where unknown, cut at +-clip."""
    units = (value - level) / scale
    return SINGLE(min(max(units, -clip), clip)) if units == units else SINGLE(0)


@compiled
def copy(source: Array, target: Array) -> None:
    for j in range(len(target)):
        target[j] = source[j]


@compiled
def fetch(row: Array, first: Any, size: Any) -> None:
    """Ask for bytes of a row that are soon needed. States come from far away: a few of their lines at a time come while
    something is computed, many at once would be waited for.
    """
    for place in range(first, first + size, 64):
        _fetch(row, place)


@compiled
def foresee(a: Any, m: Any, row: Array, layer: Any, part: Any) -> None:
    """Ask for a part, 0 ... 3, of a layer's share of what `follow` will need of a row: it lies in one piece."""
    size = 8 * (a.surprise - a.scale) // (4 * m.layers) + 1
    fetch(row, 8 * a.scale + (4 * layer + part) * size, size)


@compiled
def inside(rows: Array, count: Any) -> bool:
    """Whether all rows are among the first `count`: nobody else would notice."""
    outside = 0
    for row in rows:
        outside += not 0 <= row < count
    return outside == 0


# --- Matrix products --------------------------------------------------------------------------------------------------

_LANES = 16
_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
TILE_ROWS, _VECTORS = (8, 2) if _WIDE else (4, 1)
TILE_COLUMNS = _LANES * _VECTORS
"""What of a product is summed at a time: as much as there are registers for."""


def padded(width: int) -> int:
    """How many columns a product has whose matrix has so many."""
    return -(-width // TILE_COLUMNS) * TILE_COLUMNS


def panels(matrix: Array) -> Array:
    """A matrix [K, N], or a stack of them, in the order in which `multiply` reads it: panels [N / TILE_COLUMNS, K,
    TILE_COLUMNS], the last one filled up with zeros.
    """
    *stack, depth, width = matrix.shape
    filled = np.zeros((*stack, depth, padded(width) // TILE_COLUMNS, TILE_COLUMNS), SINGLE)
    filled.reshape(*stack, depth, padded(width))[..., :width] = matrix
    return np.ascontiguousarray(filled.swapaxes(-3, -2))


def _tiling(_: Any, left: Any, row: Any, panel: Any, out: Any, column: Any) -> Any:
    """out[row : row + TILE_ROWS, column : column + TILE_COLUMNS] = left[row : row + TILE_ROWS] @ panel. The compiler
    itself does not find out that all sums may stay in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(n: int) -> Any:
            return context.make_array(signature.args[n])(context, builder, arguments[n])

        index, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), _LANES)
        none = ir.Constant(vector, ir.Undefined)
        declared: Any = cgutils.get_or_insert_function
        fma = declared(builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32")

        def lines(of: Any) -> list[Any]:
            """Where the tile's rows begin."""
            width = builder.extract_value(of.shape, 1)
            first = builder.mul(arguments[1], width)
            return [builder.gep(of.data, [builder.add(first, builder.mul(index(r), width))]) for r in range(TILE_ROWS)]

        def vectors(start: Any) -> list[Any]:
            return [
                builder.bitcast(builder.gep(start, [index(_LANES * v)]), vector.as_pointer()) for v in range(_VECTORS)
            ]

        left, panel, out = array(0), array(2), array(3)
        from_left, to_out, depth = lines(left), lines(out), builder.extract_value(left.shape, 1)
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(index(0), before)
        sums = [[builder.phi(vector) for _ in range(_VECTORS)] for _ in range(TILE_ROWS)]
        places = vectors(builder.gep(panel.data, [builder.mul(k, index(TILE_COLUMNS))]))
        columns = [builder.load(place, align=4) for place in places]
        grown = []
        for r in range(TILE_ROWS):
            number = builder.load(builder.gep(from_left[r], [k]))
            one = builder.insert_element(none, number, ir.IntType(32)(0))
            each = builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None))
            grown.append([builder.call(fma, [each, columns[v], sums[r][v]]) for v in range(_VECTORS)])
        following = builder.add(k, index(1))
        k.add_incoming(following, loop)
        for r in range(TILE_ROWS):
            for v in range(_VECTORS):
                sums[r][v].add_incoming(ir.Constant(vector, None), before)
                sums[r][v].add_incoming(grown[r][v], loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for r in range(TILE_ROWS):
            for v, place in enumerate(vectors(builder.gep(to_out[r], [arguments[4]]))):
                builder.store(grown[r][v], place, align=4)
        return context.get_dummy_value()

    return types.void(left, row, panel, out, column), generate


_tile: Any = intrinsic(_tiling)


@compiled
def multiply(left: Array, matrix: Array, out: Array, rows: Any) -> None:
    """out[:rows] = left[:rows] @ matrix, of float32: left [R, K], matrix as `panels` makes it, out [R,
    padded(N)]. R is a multiple of TILE_ROWS; rows up to the next such multiple are written.
    """
    for panel in range(len(matrix)):
        for row in range(0, rows, TILE_ROWS):
            _tile(left, row, matrix[panel], out, panel * TILE_COLUMNS)


# --- features.py ------------------------------------------------------------------------------------------------------


@compiled
def perceive(
    at: Array,
    model: Array,
    block: Array,
    rows: Array,
    values: Array,
    ts_ms: Array,
    covariates: Array,
    standard: Array,
    first: Array,
    seen: tuple[Array, ...],
) -> Any:
    """`Features.forward`, for each row: the state as far as it goes, and what the matrix products want.

    standard [2, covariates]: means and deviations. first [2, layers x hidden]: h and C of a new stream. seen, to be
    filled: inputs [n, F + hidden], the first layer's, h behind x; upper [layers, n, 2 hidden], the others', h only,
    from number 1 on; looks [n, L + H], the shortcut's; regressors [2 n, lags], of now and, below, of H steps ago for
    those that learn now; levels [n]; times [6], in which those of a year that is not looked at stay 0. -> how many
    rows of the regressors those are.
    """
    a, m = at[0], model[0]
    inputs, upper, looks, regressors, levels, times = seen
    all64, all32, integers = block.view(np.float64), block.view(np.float32), block.view(np.int64)
    told_ms = ts_ms[0] - 1
    n = regressed = len(rows)
    for i in range(n):
        r64, r32, row = all64[rows[i]], all32[rows[i]], integers[rows[i]]
        following, third = block[rows[min(i + 1, n - 1)]], 8 * (m.past + 7) // 3 + 1
        fetch(following, 8 * a.values, third)
        if ts_ms[i] != told_ms:  # the streams of a wave often share a clock
            told_ms = ts_ms[i]
            calendar(m, told_ms, times)
        recall(a, m, r32, row, first, inputs[i], upper, i)
        known = r64[a.values : a.values + m.past]
        naive = fill(known, values[i], m.season)
        fetch(following, 8 * a.values + third, third)
        level, scale, naive_scale = remember(a, m, r64, values[i], naive)
        levels[i], r64[a.scale] = level, scale
        row[a.steps] += 1
        row[a.gap] = 0 if values[i] == values[i] else row[a.gap] + 1
        fetch(following, 8 * a.values + 2 * third, third)
        x = inputs[i]
        x[0] = scaled(values[i], level, scale, m.clip)
        x[1] = scaled(naive, level, scale, m.clip)
        x[2] = scaled(known[m.past - m.season], level, scale, m.clip)
        x[3] = 1 if values[i] == values[i] else 0
        x[4] = math.log1p(row[a.gap]) / 4 if row[a.gap] else 0.0
        x[5] = math.log1p(row[a.steps]) / 8
        x[6] = min(max(math.log(naive_scale / scale), -m.clip), m.clip)
        copy(times, x[7:13])
        consider(covariates[i], standard, x[13:], m.clip)
        look(m, known, r64[a.base : a.base + m.horizon], level, scale, looks[i])
        fetch(following, 4 * a.h, 4 * m.layers * m.hidden)
        if m.blends:
            regress(m, known, 0, scale, regressors[i])
            if learns(m, row[a.steps], values[i]):
                regress(m, known, m.horizon, scale, regressors[regressed])
                regressed += 1
    return regressed


@compiled
def recall(a: Any, m: Any, r32: Array, row: Array, first: Array, inputs: Array, upper: Array, i: Any) -> None:
    """h of a row, behind the inputs of each layer; of a new stream, h and C are those learned."""
    size = m.layers * m.hidden
    if row[a.steps] == 0:
        copy(first[0], r32[a.h : a.h + size])
        copy(first[1], r32[a.c : a.c + size])
    copy(r32[a.h : a.h + m.hidden], inputs[m.inputs :])
    for layer in range(1, m.layers):
        copy(r32[a.h + layer * m.hidden : a.h + (layer + 1) * m.hidden], upper[layer, i, m.hidden :])


@compiled
def fill(known: Array, value: Any, season: Any) -> Any:
    """Let a value join those known, or where it is missing the one a season before. -> that."""
    last = len(known) - 1
    naive = known[len(known) - season]
    _slide(known, 1)
    known[last] = value if value == value else naive
    return naive


@compiled
def remember(a: Any, m: Any, r64: Array, value: Any, naive: Any) -> Any:
    """The sums of level and scale, moved on. -> level, scale and that of the seasonal naive error."""
    if value == value:
        keep = 1 - 1 / m.memory
        r64[a.weight] = r64[a.weight] * keep + 1
        r64[a.value_sum] = r64[a.value_sum] * keep + value
    weight = r64[a.weight]
    level = r64[a.value_sum] / max(weight, 2.2250738585072014e-308)
    if value == value:
        r64[a.deviation_sum] = r64[a.deviation_sum] * (1 - 1 / m.memory) + abs(value - level)
    error = abs(value - naive)
    if error == error:
        keep = 1 - 1 / m.memory
        r64[a.naive_weight] = r64[a.naive_weight] * keep + 1
        r64[a.naive_sum] = r64[a.naive_sum] * keep + error
    naive_weight = r64[a.naive_weight]
    prior, least = m.prior * abs(level), m.floor * abs(level) + m.tiny
    left, naive_left = 1 - weight / m.memory, 1 - naive_weight / m.memory
    scale = (r64[a.deviation_sum] + left * prior) / (weight + left) + least
    naive_scale = (r64[a.naive_sum] + naive_left * prior) / (naive_weight + naive_left) + least
    return level, scale, naive_scale


@compiled
def calendar(m: Any, ts_ms: Any, times: Array) -> None:
    """Time of day, of week and of year as points on circles: three sines, three cosines."""
    day = ts_ms % m.day_ms / m.day_ms
    week = (ts_ms + m.week_shift_ms) % (7 * m.day_ms) / (7 * m.day_ms)
    year = float(ts_ms) % m.year_ms / m.year_ms
    times[0], times[3] = math.sin(2 * math.pi * day), math.cos(2 * math.pi * day)
    times[1], times[4] = math.sin(2 * math.pi * week), math.cos(2 * math.pi * week)
    if m.yearly:
        times[2], times[5] = math.sin(2 * math.pi * year), math.cos(2 * math.pi * year)


@compiled
def consider(covariates: Array, standard: Array, x: Array, clip: Any) -> None:
    """Covariates in units of their deviations, then which are unknown."""
    known = len(covariates)
    for k in range(known):
        x[k] = scaled(covariates[k], standard[0, k], standard[1, k], clip)
        x[known + k] = 0 if covariates[k] == covariates[k] else 1


@compiled
def look(m: Any, known: Array, base: Array, level: Any, scale: Any, looks: Array) -> None:
    """`Features.base`, `recent` and the curve."""
    recent = known[m.past - m.context :]
    for j in range(m.context):
        looks[j] = scaled(recent[j], level, scale, m.clip)
    curve, j = looks[m.context :], 0
    for h in range(m.horizon):
        value = known[m.past - m.season + j]
        base[h] = value if value == value else level
        j = j + 1 if j + 1 < m.season else 0
    for h in range(m.horizon):
        curve[h] = scaled(base[h], level, scale, m.clip)


# --- cells.py ---------------------------------------------------------------------------------------------------------


@compiled
def lstm(
    at: Array, model: Array, block: Array, rows: Array, layer: Any, sums: Array, bias: Array, outputs: Array
) -> None:
    """`lstm_cell` from its sums [n, 4 hidden], which become gates. h goes to the row and to outputs [n, >= hidden]."""
    a, m = at[0], model[0]
    hidden = m.hidden
    all32, all16 = block.view(np.float32), block.view(np.uint16)
    for i in range(len(rows)):
        row = block[rows[i]]
        fetch(row, 4 * (a.c + layer * hidden), 4 * hidden)
        fetch(row, 2 * (a.gates + layer * 4 * hidden), 8 * hidden)
        gates, h = sums[i], outputs[i]
        into, keep, candidate, out = gates[:hidden], gates[hidden:], gates[2 * hidden :], gates[3 * hidden :]
        for j in range(2 * hidden):
            gates[j] = sigmoid(gates[j] + bias[j])
        foresee(a, m, row, layer, 0)
        candidate_bias, out_bias = bias[2 * hidden :], bias[3 * hidden :]
        for j in range(hidden):
            candidate[j] = tanh(candidate[j] + candidate_bias[j])
        foresee(a, m, row, layer, 1)
        for j in range(hidden):
            out[j] = sigmoid(out[j] + out_bias[j])
        foresee(a, m, row, layer, 2)
        r32 = all32[rows[i]]
        c = r32[a.c + layer * hidden : a.c + (layer + 1) * hidden]
        for j in range(hidden):
            c[j] = keep[j] * c[j] + into[j] * candidate[j]
        foresee(a, m, row, layer, 3)
        for j in range(hidden):
            h[j] = out[j] * tanh(c[j])
        copy(h, r32[a.h + layer * hidden : a.h + (layer + 1) * hidden])
        show(gates, all16[rows[i]][a.gates + layer * 4 * hidden : a.gates + (layer + 1) * 4 * hidden])


@compiled
def gru(
    at: Array, model: Array, block: Array, rows: Array, layer: Any, sums: Array, bias: Array, outputs: Array
) -> None:
    """`gru_cell` from its sums [n, 4 hidden]: r, z, and what x and h say to n, apart."""
    a, m = at[0], model[0]
    hidden = m.hidden
    all32, all16 = block.view(np.float32), block.view(np.uint16)
    for i in range(len(rows)):
        for part in range(4):
            foresee(a, m, block[rows[i]], layer, part)
        gates, r32, output = sums[i], all32[rows[i]], outputs[i]
        reset, update, candidate, from_h = gates[:hidden], gates[hidden:], gates[2 * hidden :], gates[3 * hidden :]
        for j in range(4 * hidden):
            gates[j] += bias[j]
        for j in range(2 * hidden):
            gates[j] = sigmoid(gates[j])
        for j in range(hidden):
            candidate[j] = tanh(candidate[j] + reset[j] * from_h[j])
        h = r32[a.h + layer * hidden : a.h + (layer + 1) * hidden]
        for j in range(hidden):
            h[j] = update[j] * h[j] + (SINGLE(1) - update[j]) * candidate[j]
        copy(h, output[:hidden])
        show(gates[: 3 * hidden], all16[rows[i]][a.gates + layer * 3 * hidden : a.gates + (layer + 1) * 3 * hidden])


@compiled
def rnn(
    at: Array, model: Array, block: Array, rows: Array, layer: Any, sums: Array, bias: Array, outputs: Array
) -> None:
    """`rnn_cell` from its sums [n, hidden]."""
    a, hidden = at[0], model[0].hidden
    all32 = block.view(np.float32)
    for i in range(len(rows)):
        h, x = outputs[i], sums[i]
        for j in range(hidden):
            h[j] = tanh(x[j] + bias[j])
        copy(h, all32[rows[i]][a.h + layer * hidden : a.h + (layer + 1) * hidden])


@compiled
def show(gates: Array, shown: Array) -> None:
    """Gates as float16, for those who look inside."""
    for j in range(len(shown)):
        shown[j] = half(gates[j])


# --- quantiles.py -----------------------------------------------------------------------------------------------------


@compiled
def order(m: Any, raw: Array, bias: Array, location: Array, shift: Array, quantiles: Array, steps: Array) -> None:
    """`OrderedQuantiles.forward`: raw [Q x H], by quantile, and location [H], without biases -> quantiles [Q, H]."""
    horizon, middle = m.horizon, m.middle
    for j in range(m.count * horizon):
        raw[j] += bias[j]
    for j in range(m.count * horizon):
        steps[j] = softplus(raw[j])
    center, mine = quantiles[middle], raw[middle * horizon :]
    for h in range(horizon):
        center[h] = mine[h] + (location[h] + shift[h])
    for side in (1, -1):
        last, sign, q = steps, SINGLE(side), middle + side
        while 0 <= q < m.count:
            step, quantile = steps[q * horizon :], quantiles[q]
            if q != middle + side:
                for h in range(horizon):
                    step[h] += last[h]
            for h in range(horizon):
                quantile[h] = center[h] + sign * step[h]
            last = step
            q += side


# --- regression.py ----------------------------------------------------------------------------------------------------


@compiled
def learns(m: Any, steps: Any, value: Any) -> Any:
    """Whether `Regression._learn` learns at this step, unless a value before it was missing."""
    return value == value and m.rank and steps >= m.lags + m.horizon and steps % m.every == 0


@compiled
def regress(m: Any, known: Array, ago: Any, scale: Any, regressors: Array) -> None:
    """The lags among `Regression.regressors`."""
    window = known[m.past - ago - m.lags : m.past - ago]
    last = window[m.lags - 1]
    for j in range(m.lags):
        regressors[j] = scaled(window[j], last, scale, m.clip)


@compiled
def complete(m: Any, ts_ms: Any, parts: Array, rest: Array) -> None:
    """To parts [(1 + r) x H or more], made of the lags, what the other regressors make: phase, day (if the model has
    those) and constant, each of which is a row of rest [phases + 7 + 1, (1 + r) x H].
    """
    constant = rest[len(rest) - 1]
    for j in range(len(constant)):
        parts[j] += constant[j]
    if m.phases:
        phase = rest[ts_ms // m.step_ms % m.season * m.phases // m.season]
        for j in range(len(phase)):
            parts[j] += phase[j]
        day = rest[m.phases + ts_ms // m.day_ms % 7]
        for j in range(len(day)):
            parts[j] += day[j]


@compiled
def learn(a: Any, m: Any, r64: Array, parts: Array, missed: Array) -> None:
    """`Regression._learn`: gram and moment of a row, from parts [(1 + r) x H] of H steps ago."""
    scale, known = r64[a.scale], r64[a.values : a.values + m.past]
    start, targets = known[m.past - m.horizon - 1], known[m.past - m.horizon :]
    total = start
    for h in range(m.horizon):
        total += targets[h]
        missed[h] = SINGLE(min(max((targets[h] - start) / scale, -m.clip), m.clip)) - parts[h]
    if total != total:  # one was unknown
        return
    evidence, keep = float(m.every), 1 - m.every / m.learning_memory
    gram, moment = r64[a.gram : a.gram + m.rank * m.rank], r64[a.moment : a.moment + m.rank]
    for k in range(m.rank):
        along = parts[(1 + k) * m.horizon : (2 + k) * m.horizon]
        moment[k] = moment[k] * keep + evidence * dot(along, missed)
        for other in range(k + 1):
            term = dot(along, parts[(1 + other) * m.horizon : (2 + other) * m.horizon])
            gram[k * m.rank + other] = gram[k * m.rank + other] * keep + evidence * term
            gram[other * m.rank + k] = gram[k * m.rank + other]


@compiled
def dot(left: Array, right: Array) -> Any:
    total = SINGLE(0)
    for h in range(len(left)):
        total += left[h] * right[h]
    return total


@compiled
def solve(gram: Array, moment: Array, prior: Any, factor: Array, own: Array) -> None:
    """own of (gram + prior I) own = moment, by L D L^T, which is as good as any of so well conditioned a matrix."""
    rank = len(moment)
    for i in range(rank):
        own[i], pivot = moment[i], gram[i * rank + i] + prior
        for j in range(i):
            total = gram[i * rank + j]
            for k in range(j):
                total -= factor[k, i] * factor[j, k]
            factor[j, i] = total  # above the diagonal D L^T, below it L, on it 1 / D: few divisions
            factor[i, j] = total * factor[j, j]
            pivot -= total * factor[i, j]
            own[i] -= factor[i, j] * own[j]
        factor[i, i] = 1 / pivot
    for i in range(rank - 1, -1, -1):
        own[i] *= factor[i, i]
        for k in range(i + 1, rank):
            own[i] -= factor[k, i] * own[k]


@compiled
def blend(
    a: Any, m: Any, r64: Array, level: Any, steps: Any, now: Array, own: Array, spread: Array, quantiles: Array
) -> None:
    """`Forecaster.blend`: quantiles [Q, H] with those of the regression; now [(1 + r) x H]: its parts."""
    moves = now[: m.horizon]
    for k in range(m.rank):
        coefficient = SINGLE(own[k])
        along = now[(1 + k) * m.horizon : (2 + k) * m.horizon]
        for h in range(m.horizon):
            moves[h] += coefficient * along[h]
    if steps < m.context:
        return
    last, scale, base = r64[a.values + m.past - 1], r64[a.scale], r64[a.base : a.base + m.horizon]
    last = last if last == last else level
    for h in range(m.horizon):  # what the regression says, as an offset from the base
        moves[h] = SINGLE((last - base[h]) / scale + moves[h])
    share = SINGLE(m.share)
    for q in range(m.count):
        mine, about = quantiles[q], spread[q]
        for h in range(m.horizon):
            mine[h] = (SINGLE(1) - share) * mine[h] + share * (moves[h] + about[h])


# --- waiting.py -------------------------------------------------------------------------------------------------------


@compiled
def pass_on(line: Array, places: Array, width: Any, left: Array) -> None:
    """Let the heads of all lines leave, and the others step forward; the ends are then to be filled. line
    [W x width], places [2, K]: where each begins and ends, left [K, width].
    """
    for k in range(places.shape[1]):
        for j in range(width):
            left[k, j] = line[places[0, k] * width + j]
    _slide(line, width)


# --- calibration.py ---------------------------------------------------------------------------------------------------


@compiled
def track(
    a: Any,
    m: Any,
    r64: Array,
    r32: Array,
    missed: Array,
    offsets: Array,
    used: Array,
    counts: Array,
    gain: Array,
    share: Array,
    issued: Array,
    spare: Array,
) -> None:
    """`Calibration.track`: missed [K] and offsets [K, Q] of the forecasts that left, used [K, 2] of their stretch,
    counts [K] -> issued [K, 2].
    """
    lines, tiny = len(missed), SINGLE(1.17549435e-38)
    error = 0.0
    for k in range(lines):
        off, middle = missed[k] - offsets[k, m.middle], offsets[k, m.middle]
        below = max(-off, 0.0) / max(abs(offsets[k, m.low] - middle), tiny)
        above = max(off, 0.0) / max(abs(offsets[k, m.high] - middle), tiny)
        if k == 0 and counts[0]:
            error = max(below, above)
        spare[2 * k], spare[2 * k + 1] = below, above
    for j in range(len(spare)):
        spare[j] = log(spare[j])
    if counts[0]:
        known = 1 / m.mood_steps
        r64[a.roughness] = (1 - known) * r64[a.roughness] + known * min(error, m.absurd)
    mood = SINGLE(m.mood * math.log(max(r64[a.roughness] / m.usual, m.smooth)))
    limit, soft = SINGLE(m.limit), SINGLE(2 * m.soft)
    for k in range(lines):
        for side in range(2):
            s = r32[a.stretch + 2 * k + side]
            if counts[k]:
                beyond = (spare[2 * k + side] - used[k, side]) / soft + SINGLE(0.5)
                beyond = min(max(beyond, SINGLE(0)), SINGLE(1))
                s = min(max(s + gain[k, side] * (beyond - share[side]), -limit), limit)
                r32[a.stretch + 2 * k + side] = s
            issued[k, side] = s + mood


# --- scoring.py, anomaly.py -------------------------------------------------------------------------------------------


@compiled
def settle(
    a: Any, m: Any, r64: Array, k: Any, value: Any, naive: Any, opened: Array, levels: Array, sums: Array
) -> None:
    """`LiveScores.settle` of one line: the measures of opened [Q] join those of the row, and sums [5]."""
    loss = 0.0
    for q in range(m.count):
        error = value - opened[q]
        loss += levels[q] * error + max(-error, 0.0)
    scores = r64[a.scores + 5 * k : a.scores + 5 * (k + 1)]
    keep = 1 - 1 / m.forget_steps
    for j in range(5):
        scores[j] *= keep
    held = 1.0 if opened[0] <= value and value <= opened[m.count - 1] else 0.0
    error, naive_error = abs(value - opened[m.middle]), abs(value - naive)
    scores[0] += 1
    scores[1] += 2 * loss / m.count
    scores[2] += error
    scores[3] += naive_error
    scores[4] += held
    sums[0] += 1
    sums[1] += 2 * loss / m.count
    sums[2] += error
    sums[3] += naive_error
    sums[4] += held


@compiled
def surprise(m: Any, value: Any, opened: Array, levels: Array) -> Any:
    """-ln of the two-sided tail probability of a value under quantiles opened [Q >= 2]."""
    tiny, last = 2.2250738585072014e-308, m.count - 1
    below = levels[0]
    for q in range(last):
        width = max(opened[q + 1] - opened[q], tiny)
        below += (levels[q + 1] - levels[q]) * min(max((value - opened[q]) / width, 0.0), 1.0)
    first, final = max(opened[1] - opened[0], tiny), max(opened[last] - opened[last - 1], tiny)
    under = max(opened[0] - value, 0.0) * (levels[1] - levels[0]) / (levels[0] * first)
    over = max(value - opened[last], 0.0) * (levels[last] - levels[last - 1]) / ((1 - levels[last]) * final)
    lower, upper = -math.log(below), -math.log(1 - below)
    if under > 0:
        lower += m.tail * math.log1p(under / m.tail)
    if over > 0:
        upper += m.tail * math.log1p(over / m.tail)
    return min(max(max(lower, upper) - math.log(2), 0.0), m.certain)


@compiled
def rate(total: Any, weights: Array) -> Any:
    """`Anomaly._score`: weights [6] of the tails whose rates are 1, 2, 4 ..., summing to 1."""
    power, tail = math.exp(-total), 0.0
    for j in range(len(weights)):
        tail += weights[j] * power
        power *= power
    return abs(math.log10(min(max(tail, 0.0), 1.0)))


# --- follow.py --------------------------------------------------------------------------------------------------------


@compiled
def follow(
    at: Array,
    model: Array,
    block: Array,
    rows: Array,
    values: Array,
    ts_ms: Array,
    levels: Array,
    heard: tuple[Array, ...],
    head: tuple[Array, ...],
    lines: tuple[Array, ...],
    scratch: tuple[Array, ...],
    found: tuple[Array, ...],
) -> None:
    """From what the matrix products say to the forecasts and the rest of the state: `Forecaster.forecast` and `blend`,
    then `Follower.advance`.

    heard: raw [n, Q x H], location [n, H], parts [2 n, (1 + r) x H], of which those behind n are of who learns now.
    head: bias [Q x H], shift [H], rest, spread [Q, H]. lines: places [2, K], horizons [K], gain [K, 2], share [2],
    between [K, H], levels [Q], weights [6].
    scratch: as `model.fused` makes it. found, to be filled: issued [n, Q, H], sums [K, 5], anomaly [n], opened [n, Q],
    scales [n], stood [n].
    """
    a, m = at[0], model[0]
    raw, location, parts = heard
    bias, shift, rest, spread = head
    places, horizons, gain, share, between, quantile_levels, weights = lines
    issued, sums, anomaly, opened, scales, stood = found
    quantiles, softened, missed, factor, own, left_base, left, used, stretch, counts, off, spare, factors, curve = (
        scratch
    )
    all64, all32, integers = block.view(np.float64), block.view(np.float32), block.view(np.int64)
    count, number, horizon = m.count, len(horizons), m.horizon
    regressed, width = len(rows), places[1, number - 1] + 1
    for i in range(len(rows)):
        r64, r32, steps = all64[rows[i]], all32[rows[i]], integers[rows[i]][a.steps]
        scale, base = r64[a.scale], r64[a.base : a.base + horizon]
        scales[i], stood[i] = scale, steps

        order(m, raw[i], bias, location[i], shift, quantiles, softened)
        if m.blends:
            complete(m, ts_ms[i], parts[i], rest)
            if learns(m, steps, values[i]):
                complete(m, ts_ms[i] - horizon * m.step_ms, parts[regressed], rest)
                learn(a, m, r64, parts[regressed], missed)
                regressed += 1
            if m.rank:
                gram, moment = r64[a.gram : a.gram + m.rank * m.rank], r64[a.moment : a.moment + m.rank]
                solve(gram, moment, m.learning_prior, factor, own)
            blend(a, m, r64, levels[i], steps, parts[i], own, spread, quantiles)
        offsets = r32[a.offsets : a.offsets + horizon * count]
        for q in range(count):
            mine = quantiles[q]
            for h in range(horizon):
                offsets[h * count + q] = mine[h]

        waiting = r64[a.waiting_base : a.waiting_base + width]
        pass_on(waiting, places, 1, left_base)
        waiting_offsets = r32[a.waiting_offsets : a.waiting_offsets + width * count]
        pass_on(waiting_offsets, places, count, left)
        waiting_stretch = r32[a.waiting_stretch : a.waiting_stretch + width * 2]
        pass_on(waiting_stretch, places, 2, used)
        for k in range(number):
            end, ahead = places[1, k], horizons[k] - 1
            waiting[end] = base[ahead]
            for q in range(count):
                waiting_offsets[end * count + q] = scale * offsets[ahead * count + q]
            total = SINGLE(0)
            for q in range(count):
                total += left[k, q]
            issued_at = steps - horizons[k]
            counts[k] = values[i] == values[i] and issued_at >= m.warmup and math.isfinite(total)
            off[k] = values[i] - left_base[k, 0]
        if m.calibrates:
            track(a, m, r64, r32, off, left, used, counts, gain, share, stretch, spare)
        for k in range(number):
            waiting_stretch[places[1, k] * 2] = stretch[k, 0]
            waiting_stretch[places[1, k] * 2 + 1] = stretch[k, 1]

        for k in range(number):
            if k and not counts[k]:
                continue
            below, above, middle = exp(used[k, 0]), exp(used[k, 1]), left[k, m.middle]
            for q in range(count):
                curve[q] = left_base[k, 0] + (middle + (above if q > m.middle else below) * (left[k, q] - middle))
            if k == 0:
                copy(curve, opened[i])
            if counts[k]:
                settle(a, m, r64, k, values[i], left_base[k, 0], curve, quantile_levels, sums[k])
        anomaly[i] = np.nan
        if counts[0] and count > 1:
            r64[a.surprise] = r64[a.surprise] / 2 + surprise(m, values[i], opened[i], quantile_levels)
            anomaly[i] = rate(r64[a.surprise], weights)

        issue(m, base, scale, quantiles, stretch, between, factors, issued[i])


@compiled
def issue(
    m: Any, base: Array, scale: Any, quantiles: Array, stretch: Array, weights: Array, factors: Array, issued: Array
) -> None:
    """`Follower.standing`: the forecast as it is issued, [Q, H] in the series' own units, from the stretch [K, 2] of
    the settled horizons and their weights [K, H]. factors [2, H] is scratch.
    """
    horizon, center = m.horizon, quantiles[m.middle]
    for side in range(2):
        factor = factors[side]
        for h in range(horizon):
            factor[h] = 0
        for k in range(len(weights)):
            mine, s = weights[k], stretch[k, side]
            for h in range(horizon):
                factor[h] += mine[h] * s
        for h in range(horizon):
            factor[h] = exp(factor[h])
    for q in range(m.count):
        mine, factor, values = quantiles[q], factors[1 if q > m.middle else 0], issued[q]
        for h in range(horizon):
            values[h] = base[h] + scale * (center[h] + factor[h] * (mine[h] - center[h]))


# --- A step -----------------------------------------------------------------------------------------------------------


@compiled
def step(
    at: Array,
    model: Array,
    block: Array,
    wave: tuple[Array, ...],
    begin: tuple[Array, ...],
    seen: tuple[Array, ...],
    weights: tuple[Array, ...],
    biases: Array,
    sums: Array,
    top: Array,
    heard: tuple[Array, ...],
    head: tuple[Array, ...],
    lines: tuple[Array, ...],
    scratch: tuple[Array, ...],
    found: tuple[Array, ...],
) -> None:
    """All stages for all rows of a wave, piece by piece: `FusedStep.advance`.

    wave: rows, values, ts_ms, covariates, ends of its pieces. weights, as `panels` makes them: those of the first
    layer, of the others [layers - 1, ...], head, shortcut, regression. biases [layers, gates x hidden]. sums, top: the
    buffers of a layer's sums and of the last one's h.
    """
    m = model[0]
    rows, values, ts_ms, covariates, ends = wave
    standard, initial = begin
    first, upper, looks, regressors, levels, _ = seen
    first_weights, upper_weights, head_weights, shortcut, maps = weights
    raw, location, parts = heard
    issued, scores, anomaly, opened, scales, stood = found
    start = 0
    for stop in ends:
        piece, size = rows[start:stop], stop - start
        wanted = values[start:stop], ts_ms[start:stop], covariates[start:stop]
        regressed = perceive(at, model, block, piece, *wanted, standard, initial, seen)
        for layer in range(m.layers):
            if layer == 0:
                multiply(first, first_weights, sums, size)
            else:
                multiply(upper[layer], upper_weights[layer - 1], sums, size)
            h = upper[layer + 1] if layer + 1 < m.layers else top
            if m.cell == 0:
                lstm(at, model, block, piece, layer, sums, biases[layer], h)
            elif m.cell == 1:
                gru(at, model, block, piece, layer, sums, biases[layer], h)
            else:
                rnn(at, model, block, piece, layer, sums, biases[layer], h)
        multiply(top, head_weights, raw, size)
        multiply(looks, shortcut, location, size)
        if m.blends:
            multiply(regressors, maps, parts, regressed)
        follow(
            *(at, model, block, piece, values[start:stop], ts_ms[start:stop], levels),
            *(heard, head, lines, scratch),
            (
                issued[start:stop],
                scores,
                anomaly[start:stop],
                opened[start:stop],
                scales[start:stop],
                stood[start:stop],
            ),
        )
        start = stop
