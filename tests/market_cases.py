"Markets, plans and a second reading of the fill rules, for the tests of the floors that trade."
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np

from delta_go.domain import REGIMES
from delta_go.market.candles import Candles
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.plan import Plan
from delta_go.trading.risk import RiskLimits

HOUR = 3600


def candles(symbol, rows, start=0, step=HOUR, hours=None):
    "Candles from (open, high, low, close) rows; `hours` gives their places when some are missing."
    places = np.arange(len(rows)) if hours is None else np.array(hours)
    columns = np.array(rows, float).reshape(-1, 4)
    return Candles(symbol, step, start + places * step, *(columns[:, i].copy() for i in range(4)), np.ones(len(rows)))


def plan(length, words=("pullback", "breakout"), **signals):
    "A plan that proposes nothing, but for `at={bar: dict of columns}`."
    def blank(value, kind):
        return np.full(length, value, kind)
    empty = Plan(blank(0, np.int64), blank(np.nan, float), blank(np.nan, float), blank(0, np.int64), blank(0, np.int64),
                 blank(0.0, float), blank(np.nan, float), blank(1, np.int64), blank(0, np.int64), words)
    for bar, columns in signals.get("at", {}).items():
        for name, value in ({"max_bars": 100, "confidence": 0.5} | columns).items():
            getattr(empty, name)[bar] = value
    return empty


def random_case(seed, bars=140, symbols=("BTCUSD", "ETHUSD", "SOLUSD")):
    "A wild market with holes, gaps, funding and signals of every kind; the limits and costs to trade it with."
    rng = np.random.default_rng(seed)
    start = int(rng.integers(0, 3)) * 5 * HOUR
    market, plans, funding, products = {}, {}, {}, {}
    for symbol in symbols[: int(rng.integers(1, len(symbols) + 1))] if seed % 4 == 0 else symbols:
        price, digits = {"BTCUSD": (60_000.0, 1), "ETHUSD": (3_000.0, 2), "SOLUSD": (150.0, 4)}[symbol]
        volatility = rng.choice([0.004, 0.012, 0.03])
        close = price * np.exp(np.cumsum(rng.normal(0, volatility, bars)))
        gap = np.where(rng.random(bars) < 0.2, rng.normal(0, 1.5 * volatility, bars), 0.0)
        open_ = np.r_[price, close[:-1]] * np.exp(gap)
        high = np.maximum(open_, close) * (1 + rng.exponential(0.6 * volatility, bars))
        low = np.minimum(open_, close) * (1 - rng.exponential(0.6 * volatility, bars))
        keep = rng.random(bars) > 0.12
        keep[: int(rng.integers(0, 6))] = False
        keep[bars - int(rng.integers(0, 6)):] = False
        market[symbol] = Candles(symbol, HOUR, (start + np.arange(bars) * HOUR)[keep], *(x.round(digits)[keep] for x in (open_, high, low, close)), np.ones(keep.sum()))
        plans[symbol] = _random_plan(rng, market[symbol].close, digits)
        moments = np.arange(0, start + (bars + 8) * HOUR, 8 * HOUR)
        moments = moments[rng.random(len(moments)) > 0.25]
        funding[symbol] = (moments, rng.normal(0, 0.002, len(moments)).round(6))
        products[symbol] = replace(PRODUCTS[symbol], max_size=int(PRODUCTS[symbol].max_size if rng.random() < 0.7 else rng.integers(1, 60)))
    limits = RiskLimits(
        risk_per_trade=float(rng.choice([0.005, 0.01, 0.05])), max_position=float(rng.choice([0.3, 1.0, 3.0])), max_exposure=float(rng.choice([0.5, 1.5, 6.0])),
        leverage=float(rng.choice([1.0, 3.0, 20.0, 80.0])), daily_loss=float(rng.choice([0.01, 0.03, 0.05])), max_drawdown=float(rng.choice([0.03, 0.1, 0.5])))
    return market, plans, products, funding, limits, Costs(slippage_bps=float(rng.choice([0.0, 5.0, 10.0])))


def _random_plan(rng, close, digits):
    n = len(close)
    side = np.where(rng.random(n) < 0.3, rng.choice([-1, 1], n), 0)
    stop = (close * (1 - side * rng.choice([0.0004, 0.005, 0.02, 0.1], n))).round(digits + 1)
    target = (close * (1 + side * rng.choice([0.002, 0.01, 0.05], n))).round(digits + 1)
    return Plan(side, np.where(side == 0, np.nan, stop), np.where(side == 0, np.nan, target), rng.integers(1, 13, n), rng.integers(0, 5, n),
                rng.choice([0.3, 0.5, 0.7], n), rng.random(n).round(4), rng.choice([-1, 0, 1, 1, 1, 1], n), rng.integers(0, 2, n), ("pullback", "breakout"))


# The second reading. Exact fractions and dictionaries, written from the text of the fill rules; it calls nothing of the package's.

def exact(number):
    return Fraction(repr(float(number)))


def on_grid(price, tick, side):
    "The grid price that is worse for a buyer (+1) or a seller (-1)."
    return (math.ceil(price / tick) if side > 0 else math.floor(price / tick)) * tick


class Reading:
    "One account under the fill rules, bar by bar."

    def __init__(self, market, plans, products, funding, limits, costs, policy, cash=10_000):
        self.symbols = sorted(market)
        self.bars = {s: {int(t): tuple(exact(x) for x in row) for t, *row in zip(c.time, c.open, c.high, c.low, c.close)} for s, c in market.items()}
        self.plans = {s: {int(t): {name: getattr(p, name)[i] for name in p.__dataclass_fields__ if name != "words"} for i, t in enumerate(market[s].time)} for s, p in plans.items()}
        self.funding = {s: {int(t): exact(r) for t, r in zip(*funding.get(s, ((), ())))} for s in self.symbols}
        self.products, self.limits, self.gated = products, limits, policy == "gate"
        self.slippage = exact(costs.slippage_bps) / 10_000
        self.fee_rate = {s: exact(products[s].taker_fee) * (1 + exact(costs.gst)) for s in self.symbols}
        self.value = {s: exact(products[s].contract_value) for s in self.symbols}
        self.tick = {s: exact(products[s].tick_size) for s in self.symbols}
        self.step, self.start = next(iter(market.values())).step, exact(cash)
        self.last = {s: max(bars) for s, bars in self.bars.items()}
        self.held, self.rows, self.marks, self.price = {}, [], [], {}
        self.earned, self.peak, self.latched, self.day, self.yesterday = Fraction(0), exact(cash), False, None, exact(cash)

    def run(self):
        for time in sorted(set().union(*self.bars.values())):
            for symbol in self.symbols:
                if time in self.bars[symbol]:
                    self.price[symbol] = self.bars[symbol][time][3]
                    if symbol in self.held:
                        self.play(symbol, time)
            self.marks.append((time + self.step, self.marked()))
            self.decide(time)
        self.rows.sort(key=lambda row: (row["exit_time"], row["entry_time"], row["symbol"]))
        return self

    def market_fill(self, symbol, price, side):
        return on_grid(price * (1 + side * self.slippage), self.tick[symbol], side)

    def play(self, symbol, time):
        held, (open_, high, low, close) = self.held[symbol], self.bars[symbol][time]
        side, coins = held["side"], held["size"] * self.value[symbol]
        if "entry_time" in held and time in self.funding[symbol]:
            held["funding"] += side * self.funding[symbol][time] * coins * open_
        if "leaving" in held:
            return self.close(symbol, time, self.market_fill(symbol, open_, -side), held["leaving"])
        if "entry_time" not in held:
            held["entry_time"], held["entry_price"] = time, self.market_fill(symbol, open_, side)
            margin = held["entry_price"] / exact(self.limits.leverage)
            held["bankruptcy"] = held["entry_price"] - side * margin
            held["liquidation"] = held["bankruptcy"] + side * held["entry_price"] * exact(self.products[symbol].maintenance_margin)
        held["bars"] += 1
        worst, best = (low, high) if side > 0 else (high, low)

        def beyond(price, level, direction):
            return direction * (price - level) >= 0

        stop, target = held["stop"], held["target"]
        if side * (held["liquidation"] - stop) > 0:   # the stop lies beyond the liquidation
            if beyond(open_, target, side):
                self.close(symbol, time, open_, "take_profit")
            elif beyond(worst, held["liquidation"], -side):
                self.close(symbol, time, on_grid(held["bankruptcy"], self.tick[symbol], -side), "liquidation")
            elif beyond(best, target, side):
                self.close(symbol, time, target, "take_profit")
        elif beyond(open_, stop, -side):
            self.close(symbol, time, self.market_fill(symbol, open_, -side), "stop_loss")
        elif beyond(open_, target, side):
            self.close(symbol, time, open_, "take_profit")
        elif beyond(worst, stop, -side):
            self.close(symbol, time, self.market_fill(symbol, stop, -side), "stop_loss")
        elif beyond(best, target, side):
            self.close(symbol, time, target, "take_profit")
        if symbol in self.held and time == self.last[symbol]:
            self.close(symbol, time, self.market_fill(symbol, close, -side), "end")

    def close(self, symbol, time, price, reason):
        held = self.held.pop(symbol)
        coins = held["size"] * self.value[symbol]
        fees = self.fee_rate[symbol] * coins * (held["entry_price"] + price)
        pnl = held["side"] * (price - held["entry_price"]) * coins - fees - held["funding"]
        self.earned += pnl
        self.rows.append({"symbol": symbol, "side": "buy" if held["side"] > 0 else "sell", "size": held["size"], "entry_time": held["entry_time"], "entry_price": held["entry_price"],
                          "exit_time": time, "exit_price": price, "exit_reason": reason, "stop_price": held["stop"], "target_price": held["target"], "fees": fees,
                          "funding": held["funding"], "pnl": pnl, "regime": held["regime"], "regime_confidence": held["confidence"], "probability": held["probability"], "reason": held["reason"]})

    def marked(self):
        equity = self.start + self.earned
        for symbol, held in self.held.items():
            if "entry_time" in held:
                coins = held["size"] * self.value[symbol]
                equity += held["side"] * (self.price[symbol] - held["entry_price"]) * coins - self.fee_rate[symbol] * coins * held["entry_price"] - held["funding"]
        return equity

    def blocked(self):
        closed, equity = self.marks[-1]
        midnight = closed // 86_400 * 86_400
        if midnight != self.day:
            self.day = midnight
            self.yesterday = ([self.start] + [mark for at, mark in self.marks[-2:] if at <= midnight])[-1]
        self.peak = max(self.peak, equity)
        self.latched |= equity <= self.peak * (1 - exact(self.limits.max_drawdown))
        return self.gated and (self.latched or equity <= self.yesterday * (1 - exact(self.limits.daily_loss)))

    def decide(self, time):
        equity, blocked, exposure = self.marks[-1][1], self.blocked(), Fraction(0)
        asking = []
        for symbol in self.symbols:
            here = time in self.bars[symbol] and time < self.last[symbol]
            signal = self.plans[symbol][time] if here else None
            held = self.held.get(symbol)
            if held and here and held["bars"] >= held["max_bars"]:
                held["leaving"] = "time"
            elif held and here and signal["side"] == -held["side"]:
                held["leaving"] = "signal"
            elif held:
                exposure += held["size"] * self.value[symbol] * self.price[symbol]
            elif here and signal["side"] != 0:
                asking.append((-signal["confidence"], symbol, signal))
        for _, symbol, signal in sorted(asking, key=lambda x: x[:2]):
            if blocked or (self.gated and signal["permitted"] != 1):
                continue
            side, close = int(signal["side"]), self.price[symbol]
            stop, target = on_grid(exact(signal["stop"]), self.tick[symbol], -side), on_grid(exact(signal["target"]), self.tick[symbol], side)
            risk = exact(self.limits.risk_per_trade) * exact(self.limits.regime_risk[signal["regime"]])
            room = min(exact(self.limits.max_position) * equity, min(exact(self.limits.max_exposure), exact(self.limits.leverage)) * equity - exposure)
            distance = abs(close - stop)
            if distance == 0 or equity <= 0 or room <= 0:
                continue
            size = min(equity * risk // (distance * self.value[symbol]), room // (close * self.value[symbol]), self.products[symbol].max_size)
            if size > 0:
                exposure += size * self.value[symbol] * close
                self.held[symbol] = {"side": side, "size": int(size), "stop": stop, "target": target, "bars": 0, "max_bars": int(signal["max_bars"]), "funding": Fraction(0),
                                     "regime": REGIMES[signal["regime"]], "confidence": float(signal["confidence"]), "probability": float(signal["probability"]),
                                     "reason": ("pullback", "breakout")[signal["reason"]]}
