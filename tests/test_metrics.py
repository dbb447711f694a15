"""The evidence's numbers: curves, intervals, trades and the summary."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import REGIMES, InputError, Trade
from delta_go.evidence import metrics
from delta_go.market.candles import Candles

HOUR, VALUES = 3_600, {"BTCUSD": 0.001, "ETHUSD": 0.01}


def candles_of(symbol, closes):
    close = np.asarray(closes, float)
    open_ = np.concatenate([close[:1], close[:-1]])
    return Candles(symbol, HOUR, np.arange(len(close)) * HOUR, open_, np.maximum(open_, close), np.minimum(open_, close), close,
                   np.ones(len(close)))


def trade(symbol, side, size, entry, leave, prices, fees=0.0, funding=0.0, regime="bull", exit_reason="time"):
    coins = (1 if side == "buy" else -1) * size * VALUES[symbol]
    pnl = coins * (prices[1] - prices[0]) - fees - funding
    return Trade(symbol, side, size, entry * HOUR, prices[0], leave * HOUR, prices[1], exit_reason, 0.0, 0.0, fees, funding, pnl,
                 0.0, regime, 0.9, 0.6, "")


def record_of(trades, candles):
    ledger, times = metrics.ledger_columns(trades), next(iter(candles.values())).time
    blank = metrics.TrackRecord(times, HOUR, np.full(len(times), 10_000.0), ledger, candles, VALUES)
    return metrics.TrackRecord(times, HOUR, metrics.marked_equity(blank, ledger), ledger, candles, VALUES)


@st.composite
def accounts(draw):
    bars = draw(st.integers(60, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    candles = {symbol: candles_of(symbol, 1_000 * np.exp(np.cumsum(rng.normal(0, 0.01, bars)))) for symbol in VALUES}
    trades = []
    for symbol, bars_of in candles.items():
        bar = int(rng.integers(0, 10))
        while bar < bars - 2:
            leave = min(bar + int(rng.integers(0, 30)), bars - 1)
            trades.append(trade(symbol, ("buy", "sell")[rng.integers(2)], int(rng.integers(1, 50)), bar, leave,
                                (bars_of.open[bar], bars_of.close[leave]), float(rng.random()), float(rng.normal(0, 0.2)),
                                REGIMES[rng.integers(5)]))
            bar = leave + 1 + int(rng.integers(0, 20))
    return record_of(sorted(trades, key=lambda row: row.exit_time), candles)


def by_hand(record):
    "Marked equity by a plain loop over bars and trades."
    ledger, equity = record.ledger, []
    for time_ in record.times:
        value = record.start_equity
        for row in range(len(ledger["pnl"])):
            symbol, coins = ledger["symbol"][row], ledger["size"][row] * VALUES[ledger["symbol"][row]]
            coins *= 1 if ledger["side"][row] == "buy" else -1
            entry, leave = ledger["entry_price"][row], ledger["exit_price"][row]
            if ledger["exit_time"][row] <= time_:
                value += ledger["pnl"][row]
            elif ledger["entry_time"][row] <= time_:
                close = record.candles[symbol].close[time_ // HOUR]
                value += coins * (close - entry) - ledger["fees"][row] * entry / (entry + leave)
        equity.append(value)
    return np.array(equity)


@settings(max_examples=15)
@given(accounts())
def test_marked_equity_is_what_a_plain_loop_says(record):
    assert np.allclose(record.equity, by_hand(record), atol=1e-6)
    assert np.isclose(record.equity[-1], record.start_equity + record.ledger["pnl"].sum())


@settings(max_examples=15)
@given(accounts())
def test_parts_add_up_and_the_summary_is_strict_json(record):
    summary = metrics.summarise_backtest(record)
    json.dumps(summary, allow_nan=False)
    for parts in ("by_symbol", "by_regime"):
        for name in ("net_return", "fees", "funding", "trades"):
            assert np.isclose(sum(card[name] for card in summary[parts].values()), summary[name], atol=1e-9)
        assert all(tuple(card) == metrics.SUMMARY_KEYS for card in summary[parts].values())
    assert tuple(summary)[:-2] == metrics.SUMMARY_KEYS and 0 <= summary["exposure"] <= 1 and summary["max_drawdown"] >= 0


@settings(max_examples=15)
@given(accounts(), st.floats(0, 0.001))
def test_gross_less_costs_is_net(record, slippage):
    costs = metrics.cost_breakdown(record.ledger, VALUES, slippage)
    assert np.isclose(costs["gross"] - costs["slippage"] - costs["fees"] - costs["funding"], costs["net"])


def test_known_account_to_the_cent():
    candles = {"BTCUSD": candles_of("BTCUSD", [100, 110, 90, 120] + [120] * 44)}
    record = record_of([trade("BTCUSD", "buy", 1_000, 0, 3, (100.0, 120.0), fees=2.0, funding=1.0)], candles)
    summary = metrics.summarise_backtest(record)
    assert np.isclose(summary["net_return"], 17 / 10_000) and summary["trades"] == 1
    assert np.isclose(summary["exposure"], 3 / 48) and np.isclose(summary["buy_and_hold_return"], 0.2)
    peak, trough = 10_010 - 200 / 220, 9_990 - 200 / 220
    assert np.isclose(summary["max_drawdown"], 1 - trough / peak)
    assert np.isclose(summary["turnover"], 220 / record.equity.mean() / (2 / 365))
    assert summary["profit_factor"] is None and summary["win_rate"] == 1.0
    assert np.isclose(metrics.net_exposure(record)[1], 110 / record.equity[1])
    assert np.isclose(metrics.trade_returns(record.ledger, VALUES)[0], 0.17)


def test_targets_do_not_slip():
    target = metrics.ledger_columns([trade("BTCUSD", "buy", 1_000, 0, 3, (100.0, 120.0), exit_reason="take_profit")])
    stop = metrics.ledger_columns([trade("BTCUSD", "buy", 1_000, 0, 3, (100.0, 120.0), exit_reason="stop_loss")])
    assert np.isclose(metrics.cost_breakdown(target, VALUES, 0.001)["slippage"], 0.1)
    assert np.isclose(metrics.cost_breakdown(stop, VALUES, 0.001)["slippage"], 0.22)


def test_no_trades_is_all_null_and_no_error():
    record = record_of([], {"BTCUSD": candles_of("BTCUSD", [100.0] * 72)})
    summary = metrics.summarise_backtest(record)
    assert summary["trades"] == 0 and summary["net_return"] == 0 and summary["exposure"] == 0
    assert all(summary[name] is None for name in ("sharpe", "sharpe_ci95", "calmar", "profit_factor", "win_rate"))
    json.dumps(summary, allow_nan=False)
    assert len(metrics.trade_draws(record.ledger, VALUES, np.arange(3))) == 0


def test_one_bar_is_enough_for_a_summary():
    record = record_of([trade("BTCUSD", "buy", 1, 0, 0, (100.0, 100.0))], {"BTCUSD": candles_of("BTCUSD", [100.0])})
    json.dumps(metrics.summarise_backtest(record), allow_nan=False)


def test_a_table_is_a_ledger_too():
    pandas = pytest.importorskip("pandas")
    columns = metrics.ledger_columns([trade("BTCUSD", "buy", 1, 0, 1, (100.0, 101.0))])
    again = metrics.ledger_columns(pandas.DataFrame(columns))
    assert all(list(again[name]) == list(columns[name]) for name in columns)
    with pytest.raises(InputError, match="missing are pnl"):
        metrics.ledger_columns(pandas.DataFrame(columns).drop(columns="pnl"))


@pytest.mark.parametrize("equity, words", [([1.0, 2.0], "one equity value a bar"), ([1.0, np.nan, 2.0], "finite"), ([], "one equity")])
def test_a_curve_that_does_not_fit_is_refused(equity, words):
    with pytest.raises(InputError, match=words):
        metrics.TrackRecord(np.arange(3) * HOUR, HOUR, np.array(equity), metrics.ledger_columns([]), {}, VALUES)


def test_a_trade_outside_the_curve_is_refused():
    with pytest.raises(InputError, match="outside"):
        record_of([trade("BTCUSD", "buy", 1, 0, 90, (1.0, 1.0))], {"BTCUSD": candles_of("BTCUSD", [1.0] * 50)})


@pytest.mark.parametrize("change", [{"size": 0}, {"pnl": float("nan")}, {"entry_price": float("inf")}])
def test_a_trade_without_size_or_with_nan_is_refused(change):
    with pytest.raises(InputError, match="finite money and at least one contract"):
        record_of([replace(trade("BTCUSD", "buy", 1, 0, 1, (1.0, 1.0)), **change)], {"BTCUSD": candles_of("BTCUSD", [1.0] * 50)})


def test_days_end_at_midnight_and_holes_are_days_without_return():
    times = np.array([22, 23, 24, 24 * 4]) * HOUR          # closes 23:00, 00:00, 01:00 and, three days on, 01:00
    days, returns = metrics.daily_returns(times, np.array([101.0, 110.0, 121.0, 121.0]), HOUR, 100.0)
    assert days.tolist() == [0, 1, 2, 3, 4] and np.allclose(returns, [0.1, 0.1, 0, 0, 0])


def test_nothing_is_lost_after_ruin():
    _, returns = metrics.daily_returns(np.arange(3) * 86_400, np.array([50.0, -10.0, -20.0]), 86_400, 100.0)
    assert returns.tolist() == [-0.5, -1.0, 0.0]
    assert metrics.calmar(np.array([50.0, -10.0]), 100.0, 1.0) is None


def test_moments_are_their_definition():
    sample = np.random.default_rng(0).standard_t(6, 700)
    moments, centred = metrics.return_moments(sample), sample - sample.mean()
    assert np.isclose(moments.skew, np.mean(centred**3) / np.mean(centred**2) ** 1.5)
    assert np.isclose(moments.kurtosis, np.mean(centred**4) / np.mean(centred**2) ** 2)
    assert np.isclose(moments.sharpe, sample.mean() / sample.std(ddof=1))


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1_000))
def test_resampled_sums_are_sums_of_circular_blocks(rows, block, seed):
    block = min(block, rows)
    values = np.random.default_rng(seed).normal(size=rows)
    sums = metrics.resampled_sums(values[:, None], block, 5, seed)[:, 0]
    whole, rest = divmod(rows, block)
    starts = np.random.default_rng(seed).integers(0, rows, (5, whole + 1))
    index = [[(start + step) % rows for start in line[:-1] for step in range(block)] + [(line[-1] + step) % rows for step in range(rest)]
             for line in starts]
    assert np.allclose(sums, values[np.array(index)].sum(axis=1)) and len(index[0]) == rows


def autoregressive(rows, phi, seed):
    noise = np.random.default_rng(seed).standard_t(5, rows + 50)
    for row in range(1, len(noise)):
        noise[row] += phi * noise[row - 1]
    return noise[50:]


@pytest.mark.parametrize("phi", [0.0, 0.3])
def test_intervals_cover_near_their_level(phi):
    covered, rejected = 0, 0
    for seed in range(300):
        draws = metrics.mean_draws(autoregressive(500, phi, seed), 500, seed)
        low, high = metrics.interval(draws)
        covered += low <= 0 <= high
        rejected += metrics.bootstrap_p(draws) < 0.05
    assert 0.90 <= covered / 300 <= 0.98 and rejected / 300 <= 0.09


def test_block_length_grows_with_memory_and_stays_in_bounds():
    lengths = [np.mean([metrics.block_length(autoregressive(1_000, phi, seed)) for seed in range(5)]) for phi in (0.0, 0.5, 0.9)]
    assert lengths == sorted(lengths) and lengths[0] < 20 < lengths[2]
    for rows in (1, 2, 3, 5, 10, 40):
        assert 1 <= metrics.block_length(np.random.default_rng(rows).normal(size=rows)) <= max(rows // 3, 1)
    assert metrics.block_length(np.zeros(100)) == 5


def test_bootstrap_repeats():
    returns = np.random.default_rng(0).normal(0.001, 0.02, 1_800)
    columns = np.column_stack([returns, returns**2])
    first, again = (metrics.bootstrap_draws(columns, metrics.sharpe_of(1_800), 8) for _ in range(2))
    assert np.array_equal(first, again)
    low, high = metrics.sharpe_ci95(returns)
    assert low < metrics.sharpe(returns) < high
