"""The contract of the services under hostile input: only a Problem, which names the field, and the same reading as a slow reader."""
from __future__ import annotations

import json
import math
import time as clock
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from delta_go.domain import REGIMES, InputError
from delta_go.learning.features import compute_features
from delta_go.learning.predictor import BOUNDS, PREDICTOR_FEATURES, check_inputs
from delta_go.market.candles import COLUMNS, Candles
from delta_go.serving import contract
from delta_go.serving.contract import MAX_JUMP, MAX_VOLUME, PRICES, Problem, RegimeRequest, candles_of, encode, parse_regimes, parse_trades, problem_body

STEP, WINDOW, START = 3600, 20, 1_735_689_600
CANARY = "canary-5ecret"


def bars(count: int = 24, seed: int = 3) -> dict[str, list[float]]:
    """A small believable market."""
    generator = np.random.default_rng(seed)
    close = np.round(100 * np.exp(np.cumsum(generator.normal(0, .01, count))), 2)
    opened = np.append(100.0, close[:-1])
    return {"open": opened.tolist(), "high": (np.maximum(opened, close) + .25).tolist(), "low": (np.minimum(opened, close) - .25).tolist(),
            "close": close.tolist(), "volume": generator.integers(0, 1000, count).astype(float).tolist()}


def regime_body(**changes: Any) -> dict[str, Any]:
    """A request that is accepted, as a dict, with some fields changed."""
    return {"symbol": "BTCUSD", **bars(), "time": [START + STEP * row for row in range(24)], "resolution": "1h", **changes}


TRADE = {"symbol": "BTCUSD", "regime": "bull", "side": 1, "rsi": 55.5, "funding": None, "hour": 3}
NOW = START + 24 * STEP
PARSERS = {"regimes": parse_regimes, "trades": parse_trades}
VALID = {"regimes": json.dumps(regime_body()).encode(), "trades": json.dumps(TRADE).encode()}


def answer(body: bytes, parse: Any) -> Problem | None:
    """The refusal of a body, checked for its own form; None when it was accepted. Anything else raised fails the test."""
    try:
        requests, _ = parse(body)
        for request in requests:
            if isinstance(request, RegimeRequest):
                candles_of(request, STEP, WINDOW, NOW)
    except Problem as problem:
        check_problem(problem)
        return problem
    return None


def check_problem(problem: Problem) -> None:
    """A refusal agrees with itself, names a field and repeats nothing long."""
    assert problem.status == contract.CODES[problem.code] and problem.status < 500
    assert problem.errors and all(error.reason and (error.pointer == "" or error.pointer.startswith("/")) for error in problem.errors)
    document = json.loads(problem_body(problem, "/", "r", "t"))
    assert list(document) == ["type", "title", "status", "detail", "instance", "code", "errors", "request_id", "trace_id"]
    assert len(document["detail"]) < 1200 and CANARY not in json.dumps(document)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(CANARY),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=10)
names = st.sampled_from((*RegimeRequest.__struct_fields__, *PREDICTOR_FEATURES, "regime", "requests", "__class__"))


@pytest.mark.parametrize("form", PARSERS)
@given(body=st.binary(max_size=200))
@settings(max_examples=150)
def test_noise_is_refused_as_a_problem(form: str, body: bytes) -> None:
    assert answer(body, PARSERS[form]) is not None or form == "trades" and json.loads(body) == {}


@pytest.mark.parametrize("form", PARSERS)
@given(data=st.data())
@settings(max_examples=120)
def test_damaged_bodies_raise_nothing_but_problems(form: str, data: st.DataObject) -> None:
    body = bytearray(VALID[form])
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, len(body)))
        last = min(len(body), first + data.draw(st.integers(0, 12)))
        body[first:last] = data.draw(st.binary(max_size=6) | st.sampled_from([b'"', b"[", b"{", b"\\", b"1e999", b"NaN", b"null", b'"open":', b'"rsi":5,', b"\xff", b"9" * 30]))
    answer(bytes(body), PARSERS[form])


@pytest.mark.parametrize("form", PARSERS)
@given(document=values | st.dictionaries(names | st.text(max_size=5), values, max_size=6), wrapped=st.booleans())
@settings(max_examples=120)
def test_any_json_raises_nothing_but_problems(form: str, document: Any, wrapped: bool) -> None:
    answer(json.dumps({"requests": [document]} if wrapped else document).encode(), PARSERS[form])


@pytest.mark.parametrize("form", PARSERS)
@given(field=names, value=values)
@settings(max_examples=120)
def test_a_spoiled_field_is_the_field_that_is_named(form: str, field: str, value: Any) -> None:
    good = json.loads(VALID[form])
    problem = answer(json.dumps(good | {field: value}).encode(), PARSERS[form])
    if problem is not None and problem.code == "malformed_json":
        with pytest.raises(ValueError, match="not JSON compliant"):  # infinity is no JSON, and so no field of any
            json.dumps(value, allow_nan=False)
    elif problem is not None and field != "requests":
        assert problem.errors[0].pointer.split("/")[1] == field or problem.code in ("candles", "short_window")


HOSTILE = [b"", b" ", b"null", b"[]", b"0", b'"text"', b"[" * 200_000, b'{"open":' * 100_000, b'{"open":' + b"[" * 200_000, b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"{}\x00",
           b"{} {}", b'{"rsi": 1e999}', b'{"rsi": NaN}', b'{"rsi": Infinity}', b'{"rsi": "55"}', b'{"rsi": true}', b'{"rsi": [1]}', b'{"rsi": 01}', b'{"rsi": 1' + b"0" * 400 + b"}",
           b'{"rsi": 9' + b"9" * 100_000 + b"}", b'{"symbol": "\\ud800"}', b'{"symbol": "\xed\xa0\x80"}', b'{"symbol": "a\x00"}', b'{"symbol": "a\\u0000"}', b'{"symbol": "a\\n"}',
           b'{"symbol": "' + b"A" * 33 + b'"}', b'{"symbol": "\\"\\""}', b'{"symbol": "BTCUSD\\n"}', b'{"' + b"k" * 900_000 + b'": 1}', b'{"a` - at `$.rsi": 1}', b'{"' + b" - at `$" * 100_000 + b'": 1}',
           b'{"regime": "bull\' - at `$.rsi`"}', b'{"requests": {}}', b'{"requests": [{}], "requests": [{}]}', b'{"requests": [' + b"{}," * 64 + b"{}]}", b'{"requests": [[]]}', b"x" * (2**20 + 1)]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_the_catalogue_of_hostile_bodies_is_refused_at_once(number: int) -> None:
    for parse in PARSERS.values():
        start = clock.process_time()
        assert answer(HOSTILE[number], parse) is not None
        assert clock.process_time() - start < 1


class Twice(Exception):
    """The slow reader found a key twice."""


def slow_reading(body: bytes) -> Any:
    """A body as a reader that looks at every pair."""
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise Twice
        return dict(pairs)
    return json.loads(body, object_pairs_hook=once)


def spell(draw: Any, key: str) -> str:
    """A key as JSON, sometimes with escapes."""
    place = draw(st.integers(-6, len(key) - 1))
    return json.dumps(key) if place < 0 else f'"{key[:place]}\\u{ord(key[place]):04x}{key[place + 1:]}"'


@st.composite
def trade_bodies(draw: Any) -> bytes:
    """One or several trade requests in which keys come as they like, and names may hold quotation marks."""
    texts = {"symbol": st.sampled_from(['"BTCUSD"', "null", '"\\"\\""', '"a\\u0022"', '"\\\\"', '"\\\\\\""']), "regime": st.sampled_from(['"bull"', "null", '"b\\u0075ll"'])}
    item = st.lists(st.sampled_from(["symbol", "regime", "rsi", "hour", "trend"]), max_size=6)
    space = draw(st.sampled_from(["", " ", "\n\t "]))
    items = ["{" + ("," + space).join(f"{spell(draw, key)}:{space}{draw(texts.get(key, st.sampled_from(['1', '2.5', 'null'])))}" for key in draw(item)) + "}"
             for _ in range(draw(st.integers(1, 3)))]
    if len(items) == 1:
        return items[0].encode()
    return ("{" + ",".join(f"{spell(draw, 'requests')}: [{', '.join(items)}]" for _ in range(draw(st.sampled_from([1, 1, 1, 2])))) + "}").encode()


@given(body=trade_bodies())
@example(b'{"symbol": "\\"\\"", "symbol": "A"}')
@example(b'{"requests": [{"rsi": 1}, {"rsi": 2}], "requests": [{"rsi": 1, "rsi": 1}]}')
@settings(max_examples=120)
def test_duplicates_are_seen_as_a_slow_reader_sees_them(body: bytes) -> None:
    problem = answer(body, parse_trades)
    try:
        document = slow_reading(body)
    except Twice:
        assert problem is not None and problem.code == "duplicate_key"
        return
    odd = any('"' in (item.get("symbol") or "") or "\\" in (item.get("symbol") or "") for item in document.get("requests", [document]))
    assert (problem is not None) == odd and (problem is None or problem.code == "invalid_value")


def test_a_duplicate_in_a_batch_is_placed() -> None:
    problem = answer(b'{"requests": [{"rsi": 1}, {"rsi": 1, "rsi": 2}]}', parse_trades)
    assert problem is not None and problem.errors[0].pointer == "/requests/1/rsi"


number = st.floats(-1e7, 1e7) | st.sampled_from([0, 1, -1, 0.2, 23, 100, 0.5])


@given(inputs=st.dictionaries(st.sampled_from(PREDICTOR_FEATURES), number | st.none(), max_size=25), regime=st.sampled_from([*REGIMES, None]))
@settings(max_examples=150)
def test_trade_requests_are_judged_as_the_predictor_judges_its_inputs(inputs: dict[str, float | None], regime: str | None) -> None:
    try:
        expected = check_inputs(inputs | {"regime": regime})
    except InputError:
        expected = None
    problem = answer(json.dumps(inputs | {"regime": regime}).encode(), parse_trades)
    assert (problem is None) == (expected is not None)
    if expected is not None:
        (request,), _ = parse_trades(json.dumps(inputs).encode())
        for name, value in zip(PREDICTOR_FEATURES, expected.tolist()):
            given = getattr(request, name)
            assert given == value if type(given) is float else math.isnan(value) and (given is None if name in inputs else given is msgspec.UNSET)


@pytest.mark.parametrize("field", BOUNDS)
def test_bounds_include_their_ends_and_nothing_beyond(field: str) -> None:
    low, high, _ = BOUNDS[field]
    for value, good in ((low, True), (high, True), (math.nextafter(low, -math.inf), False), (math.nextafter(high, math.inf), False)):
        problem = answer(json.dumps({field: value}).encode(), parse_trades)
        assert (problem is None) == good
        assert problem is None or problem.errors[0].pointer == f"/{field}"


@given(text=st.from_regex(r"[1-9][0-9]{0,25}\.[0-9]{1,40}(e-?[0-9]{1,2})?", fullmatch=True))
@settings(max_examples=150)
def test_numbers_are_read_to_the_bit(text: str) -> None:
    assert contract._REGIME.decode(f'{{"symbol":"A","open":[{text}],"high":[],"low":[],"close":[],"volume":[]}}').open == [float(text)]


def believable(request: dict[str, Any]) -> bool:
    """The market rules one candle at a time, in plain Python."""
    rows = list(zip(*(request[name] for name in COLUMNS[1:])))
    for opened, high, low, close, volume in rows:
        prices = (opened, high, low, close)
        if not all(math.isfinite(value) for value in (*prices, volume)) or not all(PRICES[0] <= price <= PRICES[1] for price in prices):
            return False
        if high < max(opened, close) or low > min(opened, close) or not 0 <= volume <= MAX_VOLUME:
            return False
    closes = [row[3] for row in rows]
    if any(max(older, newer) > MAX_JUMP * min(older, newer) for older, newer in zip(closes, closes[1:])):
        return False
    times = request["time"]
    if times is None:
        return True
    steps = all(newer - older == STEP for older, newer in zip(times, times[1:]))
    return steps and times[0] >= 0 and times[0] % STEP == 0 and times[-1] + STEP <= NOW + 5


spoils = st.tuples(st.sampled_from(COLUMNS[1:]), st.integers(0, 23), st.sampled_from(
    [0.0, -0.0, -1.0, 1e-12, 1e-9, 1e12, 1.1e12, 1e300, 1e15, 2e15, 5e-324, math.nan, math.inf, -math.inf, 49.0, 99.0, 100.0, 201.0, 250.0]))
time_spoils = st.sampled_from([0, 1, STEP, -STEP, 300, -START, -START - STEP, 10**12, 2**63 - START - 1, 2**63, 2**80, -2**64])


@given(changes=st.lists(spoils, max_size=3), shifts=st.lists(st.tuples(st.integers(0, 23), time_spoils), max_size=2), dated=st.booleans(), all_rows=st.sampled_from([0, 0, STEP, -STEP, 60, -START - 24 * STEP]))
@settings(max_examples=250)
def test_fast_and_slow_checks_agree_with_plain_python(changes: list[tuple[str, int, float]], shifts: list[tuple[int, int]], dated: bool, all_rows: int) -> None:
    request = regime_body()
    for name, row, value in changes:
        request[name][row] = value
    request["time"] = [time + all_rows for time in request["time"]] if dated else None
    for row, shift in shifts if dated else ():
        request["time"][row] += shift
    typed = RegimeRequest(**{name: value for name, value in request.items() if value is not None})
    try:
        candles, checked = candles_of(typed, STEP, WINDOW, NOW)
    except Problem as problem:
        check_problem(problem)
        assert problem.code == "candles" and not believable(request)
        return
    assert believable(request) and checked == dated and len(candles) == WINDOW
    assert {name: getattr(candles, name).tolist() for name in COLUMNS[1:]} == {name: request[name][-WINDOW:] for name in COLUMNS[1:]}
    assert candles.time.tolist() == (request["time"][-WINDOW:] if dated else [-STEP * left for left in range(WINDOW, 0, -1)])


@pytest.mark.parametrize("changes, code, pointer", [
    ({"symbol": 7}, "wrong_type", "/symbol"), ({"symbol": ""}, "invalid_value", "/symbol"), ({"close": []}, "candles", "/close"), ({"volume": [1.0]}, "candles", "/volume"),
    ({"time": [START]}, "candles", "/time"), ({"time": None}, "wrong_type", "/time"), ({"time": [START + .5]}, "wrong_type", "/time/0"), ({"time": [float(START)] * 24}, "wrong_type", "/time/0"),
    ({"resolution": "5m"}, "wrong_resolution", "/resolution"), ({"resolution": "hourly"}, "wrong_resolution", "/resolution"), ({"leverage": 5}, "unknown_field", "/leverage"),
    ({name: [1.0] * 19 for name in COLUMNS}, "wrong_type", "/time/0"), ({**{name: [1.0] * 19 for name in COLUMNS[1:]}, "time": [1] * 19}, "short_window", "/close"),
    ({**{name: [1.0] * 5001 for name in COLUMNS[1:]}, "time": [1] * 5001}, "candles", "/close"), ({"time": [1000 * (START + STEP * row) for row in range(24)]}, "candles", "/time/0")])
def test_each_rule_names_its_field(changes: dict[str, Any], code: str, pointer: str) -> None:
    problem = answer(json.dumps(regime_body(**changes)).encode(), parse_regimes)
    assert problem is not None and (problem.code, problem.errors[0].pointer) == (code, pointer)


def test_a_candle_counts_as_closed_five_seconds_early() -> None:
    request = msgspec.convert(regime_body(), RegimeRequest)
    assert candles_of(request, STEP, WINDOW, NOW - 5)[1]
    with pytest.raises(Problem, match="/requests/2/time/23: bars that are not closed"):
        candles_of(request, STEP, WINDOW, NOW - 6, "/requests/2")


def test_candles_before_the_window_are_checked_too() -> None:
    request = regime_body()
    request["low"][0] = -1.0
    problem = answer(json.dumps(request).encode(), parse_regimes)
    assert problem is not None and problem.errors[0].pointer == "/low/0"


def test_features_of_a_request_are_those_of_the_candles() -> None:
    table = bars(230)
    direct = Candles("BTCUSD", STEP, START + STEP * np.arange(230), **{name: np.array(column) for name, column in table.items()})
    body = json.dumps({"symbol": "BTCUSD", **table, "time": direct.time.tolist()}).encode()
    candles, _ = candles_of(parse_regimes(body)[0][0], STEP, 200, START + 230 * STEP)
    assert compute_features(candles).values.tobytes() == compute_features(direct).values[-1:].tobytes()


@pytest.mark.parametrize("header", ["application/json", "application/json;charset=utf-8", 'Application/JSON; charset="UTF-8"'])
def test_json_in_utf8_is_taken(header: str) -> None:
    contract.check_media_type(header)


@pytest.mark.parametrize("header", [None, "", "text/plain", "text/json", "application/problem+json", "application/json; charset=latin-1", "application/json; v=1", "application/jsonx",
                                    "application/json; charset=utf-8; charset=utf-8", "application/json, text/plain", ";", "application/json;"])
def test_other_media_types_are_refused(header: str | None) -> None:
    with pytest.raises(Problem) as caught:
        contract.check_media_type(header)
    assert caught.value.status == 415


leaves = st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats() | st.text(max_size=5)


@given(data=st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8))
@settings(max_examples=120)
def test_what_is_encoded_can_be_read_back_or_is_withheld(data: Any) -> None:
    try:
        body = encode(data)
    except Problem as problem:
        assert problem.code == "internal" and ("NaN" in json.dumps(data) or "Infinity" in json.dumps(data))
        return
    assert json.loads(body) == data and repr(json.loads(body)) == repr(json.loads(json.dumps(data, allow_nan=False)))


def test_a_probability_that_is_not_a_number_is_withheld() -> None:
    provenance = dict.fromkeys(("model_version", "model_name", "model_sha256", "feature_schema", "service_version", "git_sha", "request_id"), "x")
    fields = dict(symbol="A", regime="bull", confidence=.5, state_probabilities={"bull": .5, "bear": .5}, features={"hour": None}, as_of=None, spacing_checked=False, warnings=[], data_end=1, **provenance)
    assert b'"hour":null' in encode([contract.RegimeAnswer(**fields)])
    for change in ({"confidence": math.nan}, {"state_probabilities": {"bull": math.inf}}, {"features": {"rsi": -math.inf}}):
        with pytest.raises(Problem):
            encode({"answers": [contract.RegimeAnswer(**fields | change)]})
