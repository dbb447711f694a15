"""Hostile requests for the two services, each made from its number alone: the bytes to send, and the statuses that may come back."""
from __future__ import annotations

import codecs
import gzip
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from delta_go.domain import REGIMES
from delta_go.learning.predictor import BOUNDS, PREDICTOR_FEATURES
from delta_go.market.simulate import simulate_market

KEY = "hostile-key-0f3b9c6d1e7a4582b0c4d9e8f7a61532"   # the one the service knows
CANARY = "canary!5ecret-value"                          # planted wherever a caller could put a secret
LIMIT = 2**20
GOOD, BAD, ANY = frozenset({200}), frozenset({400, 413, 422}), frozenset({200, 400, 413, 422})
FIELDS = {"hmm-detector": ("symbol", "open", "high", "low", "close", "volume", "time", "resolution"),
          "trade-predictor": ("symbol", "regime", *PREDICTOR_FEATURES)}
PATHS = {"hmm-detector": "/detect_regime", "trade-predictor": "/predict_trade"}
PRICES, COLUMNS = ("open", "high", "low", "close"), ("open", "high", "low", "close", "volume")


@dataclass
class Shot:
    """One request."""
    kind: str                       # what was done to it
    raw: bytes                      # what goes over the wire
    may: frozenset[int]             # statuses that are right
    body: bytes | None = None       # the JSON in it
    head: bool = False              # answered without a body
    answers: int = 1                # due on the connection
    last: bool = False              # nothing can follow: our end is closed after it
    silent: bool = False            # the server may close without a word: no request was there


@dataclass
class Draft:
    """A body on its way from good to bad."""
    service: str
    document: Any
    kind: str = "valid"
    may: frozenset[int] = GOOD
    text: bytes = b""
    dice: random.Random = field(default_factory=random.Random)

    def now(self, kind: str, may: frozenset[int]) -> None:
        """Something was done: what may come back is what both changes allow; a refused body stays refused."""
        self.kind = kind if self.kind == "valid" else f"{self.kind} + {kind}"
        self.may = BAD if BAD in (self.may, may) else ANY if ANY in (self.may, may) else may


# Literals: what JSON text has and Python values have not ------------------------------------------------------------------

def literal(text: str) -> str:
    """A value that is written as it stands."""
    return f"@@{text}@@"


def write(document: Any, **style: Any) -> str:
    """JSON with literals in place."""
    text = json.dumps(document, **style)
    return re.sub(r'"@@((?:[^"\\]|\\.)*)@@"', lambda match: json.loads(f'"{match[1]}"'), text) if "@@" in text else text


WRONG = (True, False, "", "1.5", "text", [], {}, [1.0], {"a": 1}, [[]], CANARY)
NO_NUMBERS = tuple(map(literal, (
    "NaN", "Infinity", "-Infinity", "nan", "inf", "1e999", "-1e999", "1e+309", "0x10", "01", "+1", ".5", "1.", "1e", "--1", "1_000", "1e5.5", "tru",
    "undefined", "'1'", "9" * 25, "9" * 400, "-" + "9" * 400, "1" * 20_000, "\u0661", "1,", ",", "1 2", "-", "1e400000000000000000000", "\\u0031", "//1")))
ODD_NUMBERS = tuple(map(literal, (
    "-0.0", "-0", "0", "5e-324", "-5e-324", "1e-310", "2.2250738585072014e-308", "1e308", "1.7976931348623157e308", "-1.7976931348623157e308", "9007199254740993",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551615", "18446744073709551616", "1e12", "1e-9", "1E+2", "1e-999", "0." + "0" * 400 + "1",
    "1" + "0" * 300, "3." + "0" * 300 + "1", "-1", "1e5", "0.1000000000000000055511151231257827021181583404541015625", "1e-400000000000000000000", "0e999999999")))
NO_NAMES = ("", "x" * 33, "x" * 100_000, CANARY, "\ud800", "BTC USD", "BTCUSD\0", "\u0411\u0422\u0426", "../../etc/passwd", "<script>alert(1)</script>", "BTCUSD\n", "\U0001f600",
            "%s%n", "{{7*7}}", "' OR 1=1 --", "\u202eDSUCTB", "$.close[0]", "BTCUSD` - at `$.open")
NO_FIELDS = ("rsi ", "Open", "", "symbol\0", "__proto__", "constructor", "a" * 1_000, CANARY, "\ud83d", "\u00e9", "$.close[0]", "` - at `$.close[7]", " - at `$.close[7]", "x - at `$.rsi", "requests[0]", "open/0", "~0~1",
             "Request", "closes", "x` - at `$.requests[3]", "\n", "\\", '"', "requests ", "a" * 40, "a" * 41)
NO_STAMPS = (-1, 1.5, 10**11, 10**12, 2**63 - 1, 2**63, -2**63, 2**64, "0", None, True)


def nest(dice: random.Random) -> str:
    """Brackets within brackets."""
    depth = dice.choice((5, 60, 500, 1_000, 5_000, 100_000, 200_000))
    opening, middle, closing = dice.choice((("[", "", "]"), ("[", "1", "]"), ('{"a":', "1", "}"), ('{"symbol":', "{}", "}"), ('{"requests":[', "{}", "]}"), ("[[],", "1", "]")))
    return opening * (depth // len(opening) + 1) + (middle + closing * (depth // len(opening) + 1) if dice.random() < 0.6 else "")


# Good questions -----------------------------------------------------------------------------------------------------------

@cache
def markets() -> dict[str, dict[str, list]]:
    """Candles of the symbols that have a model."""
    market = simulate_market(bars=5_300, seed=5).candles
    return {symbol: {name: getattr(bars, name).tolist() for name in (*COLUMNS, "time")} for symbol, bars in market.items()}


def good_window(dice: random.Random) -> dict[str, Any]:
    """Candles that are answered, of a usual length or not, with times or without."""
    symbol = dice.choice(list(markets()))
    bars = dice.choices((200, 201, dice.randrange(200, 700), 5_000), (80, 10, 9, 0.5))[0]
    start = dice.randrange(0, 5_300 - bars)
    document = {"symbol": symbol, **{name: values[start:start + bars] for name, values in markets()[symbol].items()}, "resolution": "1h"}
    if dice.random() < 0.3:
        del document["time"]
    if dice.random() < 0.3:
        del document["resolution"]
    return document


def good_signal(dice: random.Random) -> dict[str, Any]:
    """What is known about a signal: all, some or nothing."""
    share = dice.choice((0.0, 0.3, 0.7, 1.0, 1.0))
    document: dict[str, Any] = {}
    for name, (low, high, _) in BOUNDS.items():
        if dice.random() < share:
            document[name] = dice.choice((low, high, 0 if low <= 0 else low, None, *[dice.uniform(low, high)] * 6))
    weights = [dice.choice((0, dice.random(), 1e-300)) for _ in REGIMES] + [1e-6]
    for name, weight in zip(PREDICTOR_FEATURES, weights):
        if name in document:
            document[name] = weight / sum(weights) if sum(weights) > 1e-3 else 0.2
    if "side" in document:
        document["side"] = dice.choice((-1, 1, -1.0, 1.0, None))
    if dice.random() < 0.5:
        document["symbol"] = dice.choice(("BTCUSD", "requests", "NaN", "null", "x" * 32, "_", ".", None))
    if dice.random() < 0.5:
        document["regime"] = dice.choice((*REGIMES, None))
    return document


def extreme_window(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Candles no market has printed, though it could."""
    document, bars = good_window(dice), 0
    bars = len(document["close"])
    kind = dice.choice(("constant", "doubling", "sawtooth", "tiny", "huge", "no volume", "odd volume", "one dash", "whole numbers", "giant shadows", "last bits"))
    close = document["close"]
    if kind == "constant":
        close = [dice.choice((100.0, 1e-9, 1e12, 0.1))] * bars
    elif kind == "doubling":
        close = [1e-9 * 1.99 ** (min(row % 130, 130 - row % 130)) for row in range(bars)]
    elif kind == "sawtooth":
        close = [100.0, 199.9] * (bars // 2) + [100.0] * (bars % 2)
    elif kind == "tiny":
        close = [1e-9 * (1 + row % 3 * 1e-16) for row in range(bars)]
    elif kind == "huge":
        close = [1e12 - row % 7 for row in range(bars)]
    elif kind == "one dash":
        close = [100.0] * bars
        close[dice.randrange(bars)] = dice.choice((51.0, 199.0))
    elif kind == "last bits":
        close = [math.nextafter(100.0, 200.0) if row % 2 else 100.0 for row in range(bars)]
    elif kind == "whole numbers":
        close = [100 + row % 5 for row in range(bars)]
    if kind in ("constant", "doubling", "sawtooth", "tiny", "huge", "one dash", "last bits", "whole numbers"):
        opened = [close[0], *close[:-1]]
        document |= {"open": opened, "close": close, "high": [*map(max, opened, close)], "low": [*map(min, opened, close)]}
    if kind == "giant shadows":
        document |= {"high": [1e12] * bars, "low": [1e-9] * bars}
    if kind in ("no volume", "odd volume"):
        document["volume"] = [0 if kind == "no volume" else dice.choice((0, 5e-324, 1e15, -0.0)) for _ in range(bars)]
    return f"extreme: {kind}", document


# Damage to a document -----------------------------------------------------------------------------------------------------

def spot(dice: random.Random, values: list) -> int:
    """The first, the last, or any."""
    return dice.choice((0, len(values) - 1, dice.randrange(len(values)))) if values else 0


def put(draft: Draft, values: tuple, numbers_only: bool = True) -> str:
    """Put one of these where a number is expected; the field it went to."""
    dice, document = draft.dice, draft.document
    if draft.service == "trade-predictor":
        name = dice.choice(PREDICTOR_FEATURES)
        document[name] = dice.choice(values)
        return name
    name = dice.choice([name for name in (*COLUMNS, *([] if numbers_only else ["time"])) if name in document])
    document[name] = [*document[name]]
    document[name][spot(dice, document[name])] = dice.choice(values)
    return name


def swap_type(draft: Draft) -> None:
    """A value of another type."""
    put(draft, WRONG, numbers_only=False)
    draft.now("wrong type", BAD)


def no_number(draft: Draft) -> None:
    """A number that JSON does not have, or that no float holds."""
    put(draft, NO_NUMBERS)
    draft.now("no number", BAD)


def odd_number(draft: Draft) -> None:
    """A number of unusual size or spelling."""
    put(draft, ODD_NUMBERS, numbers_only=False)
    draft.now("odd number", ANY)


def swap_field(draft: Draft) -> None:
    """A whole field of another type."""
    name = draft.dice.choice([name for name in FIELDS[draft.service] if draft.service == "trade-predictor" or name in draft.document])
    wrong = (1, -1.5, True, {}, {"0": 1}, [[1.0]], ["1"] * 200, [[]] * 200, literal("[" * 300)) if name not in ("symbol", "regime", "resolution") else (1, True, [], {}, ["BTCUSD"], 1e5)
    draft.document[name] = draft.dice.choice([value for value in wrong if draft.service == "hmm-detector" or name in ("symbol", "regime") or type(value) not in (int, float)])
    draft.now("wrong type of field", BAD)


def odd_name(draft: Draft) -> None:
    """A symbol, regime or resolution that is no name."""
    name = draft.dice.choice(("symbol", "regime") if draft.service == "trade-predictor" else ("symbol", "resolution"))
    others = ("DOGEUSD", "btcusd", "2h", "1H", "60m", "1h ") if draft.service == "hmm-detector" else ()
    draft.document[name] = draft.dice.choice((*NO_NAMES, *others))
    draft.now("odd name", BAD)


def unknown_field(draft: Draft) -> None:
    """A field that does not exist."""
    pairs = [*draft.document.items()]
    pairs.insert(spot(draft.dice, pairs), (draft.dice.choice(NO_FIELDS), draft.dice.choice((None, 1, CANARY, [], {"a": [1]}, literal("[" * 50 + "]" * 50)))))
    draft.document = dict(pairs)
    draft.now("unknown field", BAD)


def twice(draft: Draft) -> None:
    """A key given twice, perhaps spelled with escapes."""
    names = [*draft.document]
    if not names:
        return
    name, text = draft.dice.choice(names), write(draft.document)
    spelled = draft.dice.choice((json.dumps(name), '"' + "".join(f"\\u{ord(letter):04x}" for letter in name) + '"'))
    pair = f"{spelled}:{draft.dice.choice((write(draft.document[name]), 'null', '1', '[]'))}"
    draft.document = literal(f"{{{pair},{text[1:]}" if draft.dice.random() < 0.5 else f"{text[:-1]},{pair}}}")
    draft.now("key twice", BAD)


def take_field(draft: Draft) -> None:
    """A field left out."""
    if draft.document:
        name = draft.dice.choice([*draft.document])
        del draft.document[name]
        draft.now("field left out", BAD if name in ("symbol", *COLUMNS) and draft.service == "hmm-detector" else GOOD)


def wrong_length(draft: Draft) -> None:
    """Arrays of other lengths, empty, or too long."""
    dice, document = draft.dice, draft.document
    kind = dice.choice(("one short", "one long", "one empty", "all empty", "all short", "all too long", "nulls"))
    names = [name for name in (*COLUMNS, "time") if name in document]
    name = dice.choice(names)
    if kind == "one short":
        document[name] = document[name][:-dice.randrange(1, 150)]
    elif kind == "one long":
        document[name] = document[name] + document[name][-dice.randrange(1, 9):]
    elif kind == "one empty":
        document[name] = []
    elif kind == "nulls":
        document[name] = [None] * len(document[name])
    else:
        bars = {"all empty": 0, "all short": dice.choice((1, 2, 199)), "all too long": dice.choice((5_001, 9_000))}[kind]
        document |= {name: (document[name] * 50)[:bars] for name in names}
    draft.now(f"length: {kind}", BAD)


def bad_candle(draft: Draft) -> None:
    """A candle no market prints."""
    dice, document = draft.dice, draft.document
    row = spot(dice, document["close"])
    kind = dice.choice(("upside down", "zero", "negative", "leap", "negative volume", "too dear", "too cheap", "too much", "outside"))
    name, value = {"upside down": ("high", document["low"][row] / 2), "zero": (dice.choice(PRICES), 0), "negative": (dice.choice(PRICES), -document["close"][row]),
                   "leap": ("close", document["close"][row] * 9), "negative volume": ("volume", dice.choice((-1e-300, -5.0))), "too dear": (dice.choice(PRICES), 1.1e12),
                   "too cheap": (dice.choice(PRICES), dice.choice((1e-10, 5e-324))), "too much": ("volume", 1.1e15), "outside": ("low", document["high"][row] * 2)}[kind]
    document[name] = [*document[name]]
    document[name][row] = value
    draft.now(f"candle: {kind}", BAD)


def bad_time(draft: Draft) -> None:
    """Times in other units, with gaps, out of order, off the grid, or not yet."""
    dice, document = draft.dice, draft.document
    if "time" not in document:
        document["time"] = [1_700_000_000 // 3600 * 3600 + 3600 * row for row in range(len(document["close"]))]
    time, kind = document["time"], dice.choice(("unit", "one unit", "gap", "swapped", "off grid", "future", "twice", "reversed", "odd", "step", "negative", "lost bar"))
    row = spot(dice, time)
    if kind == "unit":
        factor = dice.choice((1_000, 10**6, 10**9))
        time = [stamp * factor for stamp in time]
    elif kind == "one unit":
        time = time[:row] + [time[row] * dice.choice((1_000, 10**6, 10**9))] + time[row + 1:]
    elif kind == "gap":
        cut = dice.randrange(1, len(time))
        time = time[:cut] + [stamp + 3600 * dice.randrange(1, 50) for stamp in time[cut:]]
    elif kind == "lost bar" and len(time) > 201:
        cut = dice.randrange(1, len(time) - 1)
        document |= {name: document[name][:cut] + document[name][cut + 1:] for name in COLUMNS}
        time = time[:cut] + time[cut + 1:]
    elif kind == "swapped":
        time = [time[1], time[0], *time[2:]]
    elif kind == "off grid":
        time = [stamp + dice.choice((1, 1_800, 3_599)) for stamp in time]
    elif kind == "future":
        time = [stamp + 3600 * 10**6 for stamp in time]
    elif kind == "twice":
        time = [time[0], *time[:-1]]
    elif kind == "reversed":
        time = time[::-1]
    elif kind == "step":
        time = [time[0] // 7200 * 7200 + dice.choice((60, 7_200)) * row for row in range(len(time))]
    elif kind == "negative":
        time = [stamp - 3600 * 10**6 for stamp in time]
    else:
        time = time[:row] + [dice.choice(NO_STAMPS)] + time[row + 1:]
    document["time"] = time
    draft.now(f"time: {kind}", BAD)


def out_of_bounds(draft: Draft) -> None:
    """An input beyond what it can be."""
    name = draft.dice.choice(PREDICTOR_FEATURES)
    low, high, _ = BOUNDS[name]
    draft.document[name] = draft.dice.choice((math.nextafter(high, math.inf), math.nextafter(low, -math.inf), high + 1, low - 1, 1e300, -1e300, high * 10 + 1))
    draft.now("out of bounds", BAD)


def contradiction(draft: Draft) -> None:
    """Inputs that are possible alone and impossible together, or a side that is none."""
    if draft.dice.random() < 0.5:
        draft.document["side"] = draft.dice.choice((0, 0.5, -0.999, 1e-300))
    else:
        share = draft.dice.choice((0.0, 1.0, 0.5, 0.1))
        draft.document |= dict.fromkeys(PREDICTOR_FEATURES[:len(REGIMES)], share)
    draft.now("contradiction", BAD)


COMMON: tuple[Callable[[Draft], None], ...] = (swap_type, no_number, odd_number, swap_field, odd_name, unknown_field, take_field)
DAMAGE = {"hmm-detector": (*COMMON, *COMMON, wrong_length, bad_candle, bad_time, wrong_length, bad_candle, bad_time), "trade-predictor": (*COMMON, out_of_bounds, contradiction)}


# Damage to the text -------------------------------------------------------------------------------------------------------

STYLES: tuple[dict[str, Any], ...] = ({"separators": (",", ":")}, {}, {}, {"separators": (",\n  ", ": ")}, {"separators": (" ,\t", "\r\n: ")})


def cut_short(draft: Draft) -> None:
    """Not all of it."""
    draft.text = draft.text[:draft.dice.randrange(len(draft.text))]
    draft.now("truncated", BAD)


def trail(draft: Draft) -> None:
    """More than one document."""
    draft.text += draft.dice.choice((b"x", b"{}", b"]", b"}", b"\0", b",", b"\n" + draft.text[:50_000], b"//", b"\xef\xbb\xbf", b"\x1a", b" null", b"\xc2\xa0"))
    draft.now("trailing garbage", BAD)


def recode(draft: Draft) -> None:
    """Another encoding."""
    text = draft.text.decode()
    draft.text = draft.dice.choice((codecs.BOM_UTF8 + draft.text, text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-16-be"), text.encode("utf-32"), gzip.compress(draft.text, 1, mtime=0),
                                    codecs.BOM_UTF16_LE + draft.text, text.encode("utf-7").replace(b"{", b"+AHs-", 1), text.encode("cp037", "replace")))
    draft.now("other encoding", BAD)


def bad_bytes(draft: Draft) -> None:
    """Bytes that UTF-8 or JSON do not have."""
    place = draft.text.find(b'"', draft.dice.randrange(len(draft.text))) + 1 or draft.dice.randrange(1, len(draft.text))
    draft.text = draft.text[:place] + draft.dice.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"\x80", b"\xf5\x80\x80\x80", b"\x01", b"\xfe\xff")) + draft.text[place:]
    draft.now("bad bytes", BAD)


def noise(draft: Draft) -> None:
    """Bytes flipped, put in, taken out, repeated."""
    dice, text = draft.dice, bytearray(draft.text)
    for _ in range(dice.choice((1, 1, 2, 5))):
        place, length = dice.randrange(len(text) + 1), dice.choice((1, 2, 9, 100))
        change = dice.choice(("flip", "insert", "delete", "repeat", "sign"))
        if change == "flip" and place < len(text):
            text[place] ^= 1 << dice.randrange(8)
        elif change == "insert":
            text[place:place] = dice.randbytes(length)
        elif change == "delete":
            del text[place:place + length]
        elif change == "repeat":
            text[place:place] = text[place:place + length]
        else:
            text[place:place + 1] = dice.choice(b'{}[],:"\\-+.eE0123456789 ntf').to_bytes(1, "big")
    draft.text = bytes(text)
    draft.now("noise", ANY)


def other_document(draft: Draft) -> None:
    """Anything but a question."""
    texts = (b"", b" ", b"null", b"true", b"[]", b"[{}]", b"1", b'""', b'"text"', b"-", b"{", b"}", b"{]", b'{"requests"', b'{"requests":', b"\0\0", b"a=1&b=2", b"<?xml version='1.0'?><a/>", b"{'symbol':'BTCUSD'}",
             b'{"symbol":"BTCUSD",}', b'{"symbol" "BTCUSD"}', b'{,}', b'{"a"}', b'{1:2}', b'{null:1}', b"/**/{}", b"{} {}", b"[" + draft.text + b"]", json.dumps(draft.text.decode()).encode(), draft.dice.randbytes(300),
             nest(draft.dice).encode(), b'{"symbol":' + nest(draft.dice).encode() + b"}", b'{"close":' + nest(draft.dice).encode(), b'{"x":' + nest(draft.dice).encode(), b'{"requests":' + nest(draft.dice).encode())
    draft.text = draft.dice.choice(texts)
    draft.now("other document", BAD)


def pad(draft: Draft) -> None:
    """White space, as much as fits or one byte more."""
    size, blank = draft.dice.choice((0, 0, 0, 5_000, 300_000, LIMIT, LIMIT + 1)), draft.dice.choice((b" ", b"\n", b"\t", b"\r\n"))
    blanks = (blank * max(size - len(draft.text), 9))[:max(size - len(draft.text), 9)]
    draft.text = blanks + draft.text if draft.dice.random() < 0.5 else draft.text + blanks
    draft.now("too much white space" if len(draft.text) > LIMIT else "white space", BAD if len(draft.text) > LIMIT else GOOD)


TEXT: tuple[Callable[[Draft], None], ...] = (cut_short, trail, recode, bad_bytes, noise, noise, other_document, other_document, pad)


# A body ---------------------------------------------------------------------------------------------------------------------

def start(service: str, dice: random.Random) -> Draft:
    """A good question, ordinary or extreme."""
    if service == "trade-predictor":
        return Draft(service, good_signal(dice), dice=dice)
    if dice.random() < 0.25:
        kind, document = extreme_window(dice)
        return Draft(service, document, kind, dice=dice)
    return Draft(service, good_window(dice), dice=dice)


def as_batch(draft: Draft) -> None:
    """The question among others, or a batch that is wrong in itself."""
    dice, heavy = draft.dice, draft.service == "hmm-detector"
    kind = dice.choices(("batch", "empty", "too many", "odd item", "other field", "no array", "both forms", "within", "twice"), (10, 1, 0.2 if heavy else 1, 2, 1, 1, 1, 1, 1))[0]
    count = dice.choices((1, 2, 3, 12 if heavy else 64), (5, 5, 5, 1))[0]
    others = [start(draft.service, dice).document for _ in range(min(count, 3) - 1)]
    items = ([draft.document, *others] * 64)[:count]
    if kind == "batch":
        dice.shuffle(items)
        draft.document = {"requests": items}
        draft.kind += " in a batch"
        return
    wrong = {"empty": {"requests": []}, "too many": {"requests": ([others[0]] if others else [{}]) * dice.choice((65, 200))}, "odd item": {"requests": [*items, dice.choice((None, 1, "x", [], True, [{}], CANARY))]},
             "other field": {"requests": items, dice.choice(NO_FIELDS): 1}, "no array": {"requests": dice.choice((None, {}, "x", 1, True, {"0": {}}))},
             "both forms": {**(draft.document if isinstance(draft.document, dict) else {}), "symbol": "BTCUSD", "requests": items}, "within": {"requests": [{"requests": items}]},
             "twice": literal(f'{{"requests":{write(items)},"requests":{write(items)}}}')}
    draft.document = wrong[kind]
    if kind == "too many" and heavy:
        draft.document = {"requests": [{}] * 70}
    draft.now(f"batch: {kind}", BAD)


def make_body(service: str, dice: random.Random) -> Draft:
    """A question, mostly a bad one."""
    draft = start(service, dice)
    if dice.random() < 0.7:
        dice.choice(DAMAGE[service])(draft)
    if dice.random() < 0.1:
        dice.choice((unknown_field, odd_name))(draft)
    if dice.random() < 0.06:
        twice(draft)
    if dice.random() < 0.12:
        as_batch(draft)
    if isinstance(draft.document, dict) and dice.random() < 0.1:
        pairs = [*draft.document.items()]
        dice.shuffle(pairs)
        draft.document = dict(pairs)
    draft.text = write(draft.document, **dice.choice(STYLES)).encode()
    if draft.text and dice.random() < 0.2:
        dice.choice(TEXT)(draft)
    if len(draft.text) > LIMIT:
        draft.may = BAD
    return draft


# HTTP -----------------------------------------------------------------------------------------------------------------------

Headers = list[tuple[str, str]]


def request(method: str, target: str, headers: Headers, body: bytes = b"", version: str = "HTTP/1.1", end: str = "\r\n") -> bytes:
    """A request as bytes."""
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return end.join(lines).encode("latin-1", "replace") + body


def usual(body: bytes, kind: str = "application/json") -> Headers:
    """The headers of a good request."""
    return [("Host", "local"), ("X-API-Key", KEY), ("Content-Type", kind), ("Content-Length", str(len(body)))]


def address(service: str, dice: random.Random) -> str:
    """One of the two addresses of the question."""
    return dice.choice(("/", PATHS[service], PATHS[service] + "?explain=0", "/?explain=0"))


def plainly(service: str, dice: random.Random) -> Shot:
    """The body as it should be sent."""
    draft = make_body(service, dice)
    return Shot(draft.kind, request("POST", address(service, dice), usual(draft.text), draft.text), draft.may, draft.text)


MEDIA = ("text/plain", "", "application/json; charset=latin-1", "application/json; charset=utf-16", "application/jsonp", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json, text/html",
         "application/json;", "application/problem+json", "*/*", "x" * 5_000, "application/json; charset=utf-8; charset=latin-1", f"text/{CANARY}", "application/octet-stream", "application/json\x0b")
MEDIA_FINE = ("APPLICATION/JSON", "application/json;charset=UTF-8", 'application/json; charset="utf-8"', "application/json ; charset=utf-8", " application/json ")


def media(service: str, dice: random.Random) -> Shot:
    """Other content types."""
    draft, fine = make_body(service, dice), dice.random() < 0.3
    kind = dice.choice(MEDIA_FINE if fine else MEDIA)
    may = draft.may if fine else frozenset({415, 400} if kind.endswith("\x0b") else {415})
    return Shot("content type", request("POST", address(service, dice), usual(draft.text, kind), draft.text), may, draft.text)


def chunks(dice: random.Random, body: bytes) -> list[bytes]:
    """The body in pieces."""
    cuts = sorted(dice.randrange(len(body) + 1) for _ in range(dice.choice((0, 1, 3, 20))))
    return [piece for piece in (body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)])) if piece]


def chunked(service: str, dice: random.Random) -> Shot:
    """Chunked bodies, whole and broken."""
    draft = make_body(service, dice)
    pieces = chunks(dice, draft.text)
    kind = dice.choice(("whole", "whole", "whole", "extension", "trailer", "too large", "bad size", "negative size", "giant size", "no end", "no line end", "bad trailer", "bare newline", "long size", "bad extension", "cut in size"))
    lines = [f"{len(piece):{dice.choice('xX')}}".encode() + (b";a=1" if kind == "extension" else b"") + b"\r\n" + piece + b"\r\n" for piece in pieces]
    may, last, ending = draft.may, False, b"0\r\n\r\n"
    if kind == "trailer":
        ending = b"0\r\nX-Checksum: " + CANARY.encode() + b"\r\n\r\n"
    elif kind == "too large":
        lines, may, last = [b"40000\r\n" + b" " * 0x40000 + b"\r\n"] * 5, frozenset({413}), True
    elif kind not in ("whole", "extension"):
        may, last = frozenset({400, 408, 413}) | (draft.may if kind == "long size" else set()), True
        ending = {"bad size": b"zz\r\nabc\r\n0\r\n\r\n", "negative size": b"-5\r\nabcde\r\n0\r\n\r\n", "giant size": b"F" * 16 + b"\r\nabc", "no end": b"", "no line end": b"3\r\nabcdef\r\n0\r\n\r\n", "bare newline": b"3\nabc\n0\n\n",
                  "bad trailer": b"0\r\nbroken trailer\r\n\r\n", "long size": b"0" * 9_000 + b"\r\n\r\n", "bad extension": b'3;a="\r\nabc\r\n0\r\n\r\n', "cut in size": b"1"}[kind]
    headers = [*usual(b"")[:3], ("Transfer-Encoding", dice.choice(("chunked", "Chunked")))]
    return Shot(f"chunked: {kind}", request("POST", address(service, dice), headers, b"".join(lines) + ending), may, draft.text, last=last)


def long_body(service: str, dice: random.Random) -> Shot:
    """More than the limit, truly or by its own word."""
    honest = dice.random() < 0.7
    body = dice.choice((b" ", b"[", b'{"close":[', b"1,"))
    body = (body * (LIMIT + 9))[:LIMIT + dice.choice((1, 100, 50_000, 300_000))] if honest else body
    size = len(body) if honest else dice.choice((LIMIT + 1, 10**9, 10**15))
    headers = [*usual(body)[:3], ("Content-Length", str(size)), *([("Expect", "100-continue")] if dice.random() < 0.2 else [])]
    return Shot("body over the limit", request("POST", address(service, dice), headers, body), frozenset({413}), last=not honest)


LENGTHS = ("-1", "+5", "1e3", "0x10", "5 5", "", "abc", "9" * 30, "1" * 5_000, "5,5", "\u00b2", "5;q=1", "00005x")


def broken_length(service: str, dice: random.Random) -> Shot:
    """Lengths that lie, contradict each other, or are none."""
    draft = make_body(service, dice)
    kind = dice.choice(("odd", "odd", "short", "long", "two", "and chunked", "none", "odd coding", "two codings"))
    headers, size = usual(draft.text)[:3], len(draft.text)
    may, silent = frozenset({400, 408, 411, 413, 415, 417, 422, 501, 505}), False
    added: Headers = {"odd": [("Content-Length", dice.choice(LENGTHS))], "short": [("Content-Length", str(size // 2))], "long": [("Content-Length", str(size + dice.choice((1, 50, 9_000))))],
                      "two": [("Content-Length", str(size)), ("Content-Length", str(size + 5))], "and chunked": [("Content-Length", str(size)), ("Transfer-Encoding", "chunked")], "none": [],
                      "odd coding": [("Transfer-Encoding", dice.choice(("gzip", "identity", "xchunked", "chunked\x0b", "deflate, chunked", "", CANARY)))], "two codings": [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")]}[kind]
    if kind in ("short", "none", "two codings", "odd coding"):   # what is left is read as a request that is none; where no length is given, the body is empty, and an empty object may follow
        may |= {200, 401, 404, 405, 414, 431}
    return Shot(f"length: {kind}", request("POST", address(service, dice), headers + added, draft.text), may - {501, 505}, draft.text if kind != "short" else None, last=True, silent=silent)


QUERIES = ("explain=0", "explain=1", "explain", "explain=%00", "%zz", "explain=%ff%fe", "&&&&", "=", "a" * 1_500, "&".join(["a=1"] * 300), f"key={CANARY.replace('!', '%21')}", "explain=0&explain=1", "explain[]=0", "?", "explain=%F0%9F%98%80",
           "explain=-0", "../../etc/passwd", "explain=0;x")


def queries(service: str, dice: random.Random) -> Shot:
    """Odd query strings, which change nothing, and addresses that are too long."""
    draft, long = make_body(service, dice), dice.random() < 0.2
    if long:
        return Shot("address too long", request("POST", "/?" + "a" * dice.choice((2_100, 9_000, 200_000)), usual(draft.text), draft.text), frozenset({414}), None, last=True)
    if dice.random() < 0.1:
        return Shot("query of raw bytes", request("POST", "/?explain=\xff\xfe", usual(draft.text), draft.text), frozenset({400}), None, last=True)
    query = dice.choice(QUERIES)
    refused = service == "trade-predictor" and re.match(r"explain(=(?![01](&|$))|$)", query)
    return Shot("query", request("POST", f"{dice.choice(('/', PATHS[service]))}?{query}", usual(draft.text), draft.text), BAD if refused else draft.may, draft.text)


FINE_HEADERS: Headers = [
    ("X-Request-Id", "a" * 64), ("X-Request-Id", "a" * 65), ("X-Request-Id", ""), ("X-Request-Id", CANARY), ("X-Request-Id", "../../x"), ("X-Request-Id", "\xe9\xff"), ("X-Request-Id", "x" * 8_000), ("X-Request-Id", "a b\tc"),
    ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-00"), ("traceparent", CANARY), ("traceparent", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("traceparent", "0" * 8_000),
    ("traceparent", "00-" + "A" * 32 + "-" + "b" * 16 + "-01-x"), ("X-Cloud-Trace-Context", "a" * 32 + "/99999999999999999999;o=1"), ("X-Cloud-Trace-Context", f"{CANARY}/1;o=2"), ("X-Cloud-Trace-Context", "f" * 32 + "/-1"),
    ("Accept", "text/html;q=x"), ("Accept", "image/png"), ("Accept-Encoding", "gzip;q=9, *;q=0"), ("Accept-Charset", "\xff"), ("Cookie", f"session={CANARY}"), ("Cookie", "a=" + "b" * 4_000), ("Range", "bytes=0-1"), ("If-None-Match", "*"),
    ("X-HTTP-Method-Override", "DELETE"), ("X-Forwarded-For", "1.1.1.1, " + CANARY), ("X-Forwarded-Host", "evil"), ("X-Forwarded-Prefix", "/x"), ("X-Original-URL", "/metrics"), ("Forwarded", "for=;;"), ("User-Agent", "() { :;}; echo " + CANARY),
    ("Upgrade", "websocket"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk"), ("TE", "trailers"), ("Origin", "null"), ("Referer", "\xff" * 300), ("X-Api-Version", "${jndi:ldap://x}"), ("Expect", "100-continue"), ("Date", "x"), ("DNT", "\t"),
    ("Authorization", f"Basic {CANARY}"), ("Proxy-Authorization", f"Bearer {CANARY}"), ("Proxy", "http://evil"), ("Connection", "keep-alive, x-api-key"), ("Keep-Alive", "timeout=-1"), ("Content-Language", "\x80"), ("Content-MD5", "x"), ("Content-Location", "/etc")]
BAD_HEADERS = ("Bad Header: x", ": x", "X\0: y", "X: a\0b", "X: a\rb", "no colon", "X : y", " Folded: x", "X(1): y", "X-\xff: y", "X: \x7f", "Host: other", "Expect: nonsense", "Content-Type: text/plain", "X:\n folded")


def header(service: str, dice: random.Random) -> Shot:
    """Odd headers that change nothing."""
    draft = make_body(service, dice)
    added = dice.sample(FINE_HEADERS, dice.choice((1, 1, 2, 5, 20)))
    return Shot("headers", request("POST", address(service, dice), usual(draft.text) + added, draft.text), draft.may, draft.text)


def bad_header(service: str, dice: random.Random) -> Shot:
    """Heads that are no HTTP, too long, or too many."""
    draft = make_body(service, dice)
    kind = dice.choice(("bad", "bad", "bad", "many", "long", "no host", "underscore"))
    target, headers = address(service, dice), usual(draft.text)
    if kind == "bad":
        raw = request("POST", target, headers, draft.text).replace(b"\r\n\r\n", b"\r\n" + dice.choice(BAD_HEADERS).encode("latin-1") + b"\r\n\r\n", 1)
        return Shot("bad header", raw, frozenset({400, 417}), None, last=True)
    if kind in ("many", "long"):
        added = [("X-A", "1")] * dice.choice((60, 1_000)) if kind == "many" else [("X-A", "a" * dice.choice((8_300, 60_000, 600_000)))]
        return Shot(f"headers too {kind}", request("POST", target, headers + added, draft.text), frozenset({431}), None, last=True)
    if kind == "no host":
        return Shot("no host", request("POST", target, headers[1:], draft.text), draft.may | {400}, draft.text)
    return Shot("header with underscore", request("POST", target, headers + [("X_Request_Id", CANARY)], draft.text), draft.may | {400}, draft.text)


def access(service: str, dice: random.Random) -> Shot:
    """Keys that are none."""
    draft = make_body(service, dice)
    headers = [pair for pair in usual(draft.text) if pair[0] != "X-API-Key"]
    wrong: list[Headers] = [[], [("X-API-Key", "")], [("X-API-Key", KEY[:-1])], [("X-API-Key", KEY + "x")], [("X-API-Key", CANARY)], [("X-API-Key", "k" * 8_000)], [("Authorization", f"Basic {KEY}")], [("Authorization", "Bearer")],
                            [("Authorization", f"Bearer {CANARY}")], [("Authorization", "Bearer " + "\xff" * 40)], [("Cookie", f"key={KEY}")], [("X-API-Key", KEY.upper())], [("Authorization", f"bearer\t{KEY[::-1]}")], [("X-API-Key", KEY + ",")]]
    if dice.random() < 0.2:
        return Shot("key as a bearer", request("POST", address(service, dice), headers + [("Authorization", f"Bearer {KEY}")], draft.text), draft.may, draft.text)
    return Shot("no such key", request("POST", f"/?key={KEY}" if dice.random() < 0.2 else address(service, dice), headers + dice.choice(wrong), draft.text), frozenset({401}), draft.text)


METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "PROPFIND", "FOO", "get", "GE T", "POST\x00", "A" * 300, "P\xd6ST", "")
TARGETS = ("/", "//", "///", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%00", "/detect_regime/", "/predict_trade//", "/HEALTH/LIVE", "http://evil/metrics", "*", "/health/ready", "/health/live", "/health/startup", "/metrics", "/openapi.json",
           "/%ff%fe", "/%F0%9F%98%80", "/a" * 900, "/static/app.js", "/.env", "/.git/config", "/console", "/openapi.json/", "/health", "/?", "/;x", "/#x", "/\\", "evil:80", "/%", "/favicon.ico", "/metrics?name[]=x", "/ /x", "/\xff", "", "@", "/detect_regime%20")


def elsewhere(service: str, dice: random.Random) -> Shot:
    """Other methods and other addresses."""
    method, target = dice.choice((*METHODS, "GET", "GET", "GET", "POST", "POST")), dice.choice(TARGETS)
    body = b"{}" if method in ("POST", "PUT", "PATCH") else b""
    may = frozenset({200, 400, 404, 405, 414, 422})
    return Shot(f"{method[:8] or 'no method'} elsewhere", request(method, target, usual(body) if body else usual(body)[:2], body), may, body or None, head=method == "HEAD", last=method not in ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"))


RUBBISH = (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x5a" * 200, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 50 + b"\r\n\r\n", b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / http/1.1\r\n\r\n",
           b"GET / HTTP/1.1", b"POST / HTTP/1.1\r\nHost: local\r\nContent-Le", b"{}\r\n\r\n", b"SSH-2.0-x\r\n", b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5_000 + b"\r\n", b"A" * 300_000, b"POST / HTTP/1.1\r\rHost: x\r\r\r\r", b"",
           b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\nGET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000, b"\xff\xfe\r\n\r\n", b"*1\r\n$4\r\nPING\r\n")


def rubbish(service: str, dice: random.Random) -> Shot:
    """Bytes of other protocols, and heads that end too early."""
    if dice.random() < 0.3:
        draft = make_body(service, dice)
        version = dice.choice(("HTTP/1.0", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.9", "HTTP/1.1 x", "ICY"))
        may = draft.may if version == "HTTP/1.0" else draft.may | {400, 505}
        return Shot(f"version {version}", request("POST", address(service, dice), usual(draft.text), draft.text, version), may, draft.text, last=True)
    return Shot("no HTTP", dice.choice((*RUBBISH, dice.randbytes(dice.choice((5, 200))))), frozenset({400, 401, 404, 405, 414, 431}), last=True, silent=True)


def several(service: str, dice: random.Random) -> Shot:
    """Two requests sent at once."""
    drafts = [make_body(service, dice) for _ in range(2)]
    raw = b"".join(request("POST", address(service, dice), usual(draft.text), draft.text) for draft in drafts)
    return Shot("two at once", raw, drafts[0].may | drafts[1].may, None, answers=2)


MAKERS: tuple[tuple[Callable[[str, random.Random], Shot], float], ...] = (
    (plainly, 70), (media, 3), (chunked, 4), (long_body, 0.4), (broken_length, 2.5), (queries, 3), (header, 5), (bad_header, 2), (access, 3), (elsewhere, 5), (rubbish, 1.5), (several, 1))


def make_shot(service: str, seed: int, number: int) -> Shot:
    """The request of this number."""
    dice = random.Random(f"{service} {seed} {number}")
    maker = dice.choices([maker for maker, _ in MAKERS], [weight for _, weight in MAKERS])[0]
    return maker(service, dice)
