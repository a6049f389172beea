"""Calibration of forecasts: a map of their sample paths, and conformal bands; kept as a JSON file.

Log returns are of a price over the last close. Fitted by `kronos_qlib.evaluation.calibration`.

Shapes: W forecasts, S samples, P steps, K levels of quantiles, B bands of `BANDS`; G groups by volatility.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from kronos_qlib.data.windows import CLOSE
from kronos_qlib.extensions import identity_of
from kronos_qlib.files import whole_file
from kronos_qlib.forecast.engine.sampling import Sampling
from kronos_qlib.nn import Kronos, KronosTokenizer
from kronos_qlib.nn.checkpoint import digest_of_weights
from kronos_qlib.settings import Settings

Floats = NDArray[np.float64]
Row = tuple[float, ...]

FILE = "calibration.json"
BANDS = 50, 80, 90  # per cent, of the bands about the median that conformal offsets widen or narrow
GRID = np.linspace(0, 1, 101)  # the levels of conformity scores that are kept
ADAPTATION_RATE = 0.02  # of a day's misses beyond their share; Gibbs & Candès call it gamma
LEAST_VOLATILITY = 1e-8  # for a close that never moved
LEAST_RATIO = 0.01  # a price drawn below 1 % of the last close, or below zero, counts as that: it needs a logarithm
BandKind = Literal["split", "adaptive"]


class ForecastIdentity(Settings):
    """What decides the distribution of forecasts: digests of the weights, how paths are drawn and bars normalised."""

    tokenizer: str
    model: str
    temperature: float
    top_k: int
    top_p: float
    s2_rotation: str
    anchor: bool
    filter: dict[str, Any] | None = None
    quantizer: dict[str, Any] | None = None
    normalisation: Any = "unit_free"

    @classmethod
    def of(cls, tokenizer: KronosTokenizer, model: Kronos, sampling: Sampling) -> "ForecastIdentity":
        """Return that of forecasts by these networks, drawn like this."""
        drawn = {name: getattr(sampling, name) for name in cls.model_fields if hasattr(sampling, name)}
        drawn |= {"filter": identity_of(sampling.filter), "quantizer": tokenizer.config.get("quantizer")}
        return cls(tokenizer=digest_of_weights(tokenizer), model=digest_of_weights(model), **drawn)


class FittedOn(Settings):
    """The forecasts that a calibration was fitted on.

    first, last: score dates. until: the date of the last bar that was looked at.
    """

    segment: str
    freq: str
    synthetic: bool
    lookback: int
    samples: int
    windows: int
    days: int
    first: str
    last: str
    until: str


class Calibration(Settings):
    """A calibration, fitted on earlier forecasts.

    At each step, with c the mean log return of the samples and s = √(S / (S − 1)), because deviations from their own
    mean are too small by that, a log return x becomes slope · c + spread · s · (x − c): the four prices of a bar alike,
    by the c of the close, so that their order stays. Volume and amount stay.

    terciles: the volatilities [2] that divide three groups with a map each; none, and one map, where that did better.
    slopes, spreads: [G, P]. conformity: [P, B, 101], the scores max(low − y, y − high) of the log returns y that came,
    in units of the lookback's daily volatility · √step, at the levels `GRID`: the offsets of split conformal bands
    (conformalised quantile regression, Romano et al. 2019) are those at the bands' levels.
    """

    version: Literal[1] = 1
    identity: Annotated[ForecastIdentity, Field(strict=False)]
    fitted_on: Annotated[FittedOn, Field(strict=False)]
    terciles: Row
    slopes: tuple[Row, ...]
    spreads: tuple[Row, ...]
    conformity: tuple[tuple[Row, ...], ...]

    @model_validator(mode="after")
    def _shapes_agree(self) -> "Calibration":
        groups = len(self.terciles) + 1
        steps = {len(row) for row in (*self.slopes, *self.spreads)} | {len(self.conformity)}
        sizes = {len(bands) for bands in self.conformity} | {
            len(GRID) + len(BANDS) - len(row) for bands in self.conformity for row in bands
        }
        if groups not in (1, 3) or {len(self.slopes), len(self.spreads)} != {groups} or len(steps) != 1:
            raise ValueError("slopes, spreads and conformity are of different shapes")
        if sizes != {len(BANDS)} or not self.horizon:
            raise ValueError(f"conformity should have {len(BANDS)} bands of {len(GRID)} levels for each step")
        if not (np.array(self.spreads) > 0).all() or (np.diff([*self.terciles]) < 0).any():
            raise ValueError("spreads should be above 0, and terciles in order")
        if (np.diff(np.array(self.conformity)) < 0).any():
            raise ValueError("conformity should not fall from level to level")
        return self

    @property
    def horizon(self) -> int:
        """Steps it was fitted for, P."""
        return len(self.conformity)

    @property
    def offsets(self) -> Floats:
        """The offsets of split conformal bands [P, B], in units of volatility · √step."""
        return np.array(self.conformity)[:, range(len(BANDS)), BANDS]

    def save(self, path: Path) -> Path:
        """Write it as a JSON file, whole or not at all."""
        with whole_file(path) as draft:
            draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    def describe(self) -> str:
        """Say in one line what it was fitted on and what it does."""
        on = self.fitted_on
        slopes, spreads = np.array(self.slopes), np.array(self.spreads)
        maps = "a map for each tercile of volatility" if self.terciles else "one map for all volatilities"
        synthetic = ", synthetic bars" if on.synthetic else ""
        return (
            f"fitted on {on.windows:,} forecasts from {on.samples} samples of {on.days} days of {on.segment} "
            f"({on.first} … {on.last}, bars to {on.until}{synthetic}): location × {slopes.min():.2f} … "
            f"{slopes.max():.2f}, spread × {spreads.min():.2f} … {spreads.max():.2f}, {maps}"
        )

    def check(self, identity: ForecastIdentity, horizon: int) -> None:
        """Raise a ValueError for forecasts of other weights or settings, or of more steps, than it was fitted on."""
        for name, own in self.identity:
            given = getattr(identity, name)
            if given != own:
                what = f"a {name} of other weights" if name in ("tokenizer", "model") else f"{name} {own}, not {given}"
                raise ValueError(f"the calibration was fitted on forecasts with {what}")
        if horizon > self.horizon:
            raise ValueError(f"the calibration has {self.horizon} steps, and the forecast {horizon}")

    def map_closes(self, closes: NDArray[np.floating], volatility: Floats) -> Floats:
        """Map closes of sample paths [W, S, P], ratios to the last close.

        Args:
            volatility: of the lookback's bar-to-bar log returns [W], see `bar_volatility`.
        """
        return self._map(closes[..., None], closes, volatility)[..., 0]

    def map_bars(self, bars: NDArray[np.floating], last_close: Floats, volatility: Floats) -> Floats:
        """Map sample paths [W, S, P, 6] in price units; last_close, volatility: [W]."""
        result = bars.astype(np.float64)
        start = last_close[:, None, None, None]
        ratios = result[..., : CLOSE + 1] / start
        result[..., : CLOSE + 1] = self._map(ratios, ratios[..., CLOSE], volatility) * start
        return result

    def _map(self, ratios: NDArray[np.floating], closes: NDArray[np.floating], volatility: Floats) -> Floats:
        """Map prices [W, S, P, …] by the location of the closes [W, S, P]; all ratios to the last close."""
        samples, steps = closes.shape[1:]
        logs = np.log(np.maximum(np.asarray(ratios, np.float64), LEAST_RATIO))
        drawn = np.log(np.maximum(np.asarray(closes, np.float64), LEAST_RATIO))
        centre = drawn.mean(1)[:, None, :, None]
        group = np.searchsorted(self.terciles, volatility)
        slope, spread = (np.array(rows)[group, None, :steps, None] for rows in (self.slopes, self.spreads))
        return np.exp(slope * centre + bessel_factor(samples) * spread * (logs - centre))

    def quantiles(
        self, closes: Floats, volatility: Floats, levels: NDArray[np.floating], offsets: Floats | None = None
    ) -> Floats:
        """Return the quantiles [W, P, K] of mapped closes [W, S, P], with conformal offsets, in the closes' unit.

        Between the bands' levels and the median the offset is interpolated, beyond the outermost it is the outermost's.
        An outer band contains the inner ones.

        Args:
            levels: [K], increasing, 0.5 among them.
            offsets: [P, B] or [W, P, B]; by default those of split conformal bands.
        """
        steps = closes.shape[2]
        offsets = self.offsets[:steps] if offsets is None else offsets
        moves = offsets @ _level_weights(levels) * _scale(volatility, steps)[..., None]
        moved = sample_quantiles(closes, levels) * np.exp(moves)
        middle = int(np.searchsorted(levels, 0.5))
        lower = np.minimum.accumulate(moved[..., middle::-1], axis=-1)[..., ::-1]
        upper = np.maximum.accumulate(moved[..., middle:], axis=-1)
        return np.concatenate([lower, upper[..., 1:]], axis=-1)

    def adaptive_offsets(
        self,
        closes: Floats,
        volatility: Floats,
        realised: Floats,
        dates: NDArray[np.datetime64],
        ends: NDArray[np.datetime64],
    ) -> Floats:
        """Return the offsets [W, P, B] of bands that adapt to what came: adaptive conformal inference.

        For each step and band a level α begins at the band's and, with the misses err of the forecasts whose bar came
        since the score date before, becomes α + rate · (nominal − mean err) (Gibbs & Candès 2021; here one update a
        day, of all instruments together); the offset is the conformity score at 1 − α. What is used on a date are the
        bars up to it. It begins anew with the first of these forecasts.

        Args:
            closes: mapped, [W, S, P]. realised: what came [W, P], NaN where unknown. dates: score dates [W]. ends: of
            the bars that came [W, P]. Ratios to the last close.
        """
        scores, steps = conformity_scores(closes, realised, volatility), closes.shape[2]
        known = np.array(self.conformity)[:steps]
        nominal = 1 - np.array(BANDS) / 100
        alpha = np.broadcast_to(nominal, (steps, len(BANDS))).copy()
        days, own = np.unique(dates, return_inverse=True)
        due = np.where(np.isnat(ends), len(days), np.searchsorted(days, ends))  # the score date that first knows it
        result = np.empty_like(scores)
        for day in range(len(days)):
            for step in range(steps):
                came = due[:, step] == day
                if came.any():
                    missed = (scores[came, step] > result[came, step]).mean(0)
                    alpha[step] = np.clip(alpha[step] + ADAPTATION_RATE * (nominal - missed), 0, 1)
            offsets = [[np.interp(1 - a, GRID, row) for a, row in zip(*pair)] for pair in zip(alpha, known)]
            result[own == day] = np.array(offsets)
        return result


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration from the JSON file that `Calibration.save` has written.

    Raises:
        ValueError: the file is damaged or no calibration, in one line. OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        return Calibration.model_validate_json(content)
    except ValidationError as error:
        problem: Any = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path} is no calibration of kronos-qlib: {f'{key}: ' if key else ''}{message}") from None


def conformity_grid(scores: Floats) -> Floats:
    """Return the conformity scores [N, …] at the levels of `GRID` [101, …]: the ⌈(N + 1) · level⌉th smallest.

    The greatest where there are not so many, which is a shade too small then.
    """
    ordered, count = np.sort(scores, axis=0), len(scores)
    rank = np.ceil((count + 1) * GRID - 1e-9).astype(int)
    return ordered[np.clip(rank, 1, count) - 1]


def conformity_scores(closes: Floats, realised: Floats, volatility: Floats) -> Floats:
    """Compute by how much the closes that came [W, P] lie outside each band of mapped closes [W, S, P]: [W, P, B].

    Below zero inside; of log returns, in units of volatility · √step. NaN where no bar came.
    """
    shares = np.array(BANDS) / 200
    low, high = (np.log(sample_quantiles(closes, 0.5 + sign * shares)) for sign in (-1, 1))
    came = np.log(realised)[..., None]
    return np.maximum(low - came, came - high) / _scale(volatility, closes.shape[2])[..., None]


def sample_quantiles(closes: Floats, levels: NDArray[np.floating]) -> Floats:
    """Return quantiles [W, P, K] of samples [W, S, P], of expected probability `levels` if there are enough samples.

    Hyndman & Fan (1996), type 6; a level p needs 1 / p − 1 samples, 19 for 5 %. Type 7, numpy's own, lies nearer to the
    median, the more so the fewer samples there are.
    """
    return np.moveaxis(np.quantile(closes, levels, axis=1, method="weibull"), 0, -1)


def bessel_factor(samples: int) -> float:
    """Return what deviations from the samples' own mean are multiplied by, to have the spread of the distribution."""
    return math.sqrt(samples / (samples - 1)) if samples > 1 else 1.0


def bar_volatility(closes: NDArray[np.floating]) -> Floats:
    """Compute the standard deviation of the bar-to-bar log returns of closes [..., L]: [...], above zero."""
    returns = np.diff(np.log(np.asarray(closes, np.float64)), axis=-1)
    return np.maximum(returns.std(axis=-1, ddof=1), LEAST_VOLATILITY)


def _scale(volatility: Floats, steps: int) -> Floats:
    return volatility[:, None] * np.sqrt(np.arange(1, steps + 1))


def _level_weights(levels: NDArray[np.floating]) -> Floats:
    """Return the share [B, K] that each band's offset has in the move of each level, below zero under the median."""
    nominal = 200 * np.abs(np.asarray(levels) - 0.5)
    weights = [np.interp(nominal, [0, *BANDS], [0, *unit]) for unit in np.eye(len(BANDS))]
    return np.array(weights) * np.sign(np.asarray(levels) - 0.5)
