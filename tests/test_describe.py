"""The OpenAPI document and the page: valid, in step with the parser, self-contained, and safe against what a card may hold."""
from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from delta_go.domain import REGIMES
from delta_go.learning.features import FEATURES
from delta_go.learning.predictor import BOUNDS
from delta_go.serving.contract import (CODES, MAX_BARS, MAX_BATCH, FieldError, Problem, RegimeAnswer, RegimeRequest, TradeAnswer, TradeRequest, candles_of, encode,
                                       parse_regimes, parse_trades, problem_body)
from delta_go.serving.describe import ServiceInfo, openapi, page

WINDOW = 20
wave = [100.0 + bar % 3 for bar in range(WINDOW)]
CANDLES = {"symbol": "BTCUSD", "open": wave, "high": [price + 1 for price in wave], "low": [price - 1 for price in wave], "close": wave, "volume": [5.0] * WINDOW}
SIGNAL = {"symbol": "BTCUSD", "regime": "bull", "rsi": 61.5, "side": 1, "funding": None}


def detector(**changes: Any) -> ServiceInfo:
    """The regime service as it describes itself."""
    facts: dict[str, Any] = dict(title="Regime detector", name="hmm-detector", path="/detect_regime", description="Which regime.", request=RegimeRequest, answer=RegimeAnswer,
                                 sample=CANDLES, symbols=("BTCUSD", "ETHUSD"), window=WINDOW, resolution="1h", card={"verdict": "no edge"})
    return ServiceInfo(**facts | changes)


def predictor(**changes: Any) -> ServiceInfo:
    """The trade service as it describes itself."""
    facts: dict[str, Any] = dict(title="Trade predictor", name="trade-predictor", path="/predict_trade", description="Whether to.", request=TradeRequest, answer=TradeAnswer,
                                 sample=SIGNAL, symbols=(), window=WINDOW, resolution="1h", card={})
    return ServiceInfo(**facts | changes)


SERVICES = {"detector": detector(), "predictor": predictor()}


def validator(service: ServiceInfo, schema: dict[str, Any]) -> Draft202012Validator:
    """A validator of one schema of the document, with its references."""
    return Draft202012Validator({**schema, "components": openapi(service)["components"]})


def operation(service: ServiceInfo) -> dict[str, Any]:
    """How the document says to ask."""
    return openapi(service)["paths"][service.path]["post"]


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("loaded", [True, False])
def test_the_document_is_valid_openapi(name: str, loaded: bool) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator
    service = SERVICES[name] if loaded else {"detector": detector, "predictor": predictor}[name](symbols=(), card={"models": "none loaded"})
    document = json.loads(encode(openapi(service)))
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    names = [method["operationId"] for methods in document["paths"].values() for method in methods.values()]
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize("name", SERVICES)
def test_schemathesis_can_generate_requests(name: str) -> None:
    import schemathesis
    service = SERVICES[name]
    schema = schemathesis.openapi.from_dict(json.loads(encode(openapi(service))))
    seen = []

    @given(case=schema[service.path]["POST"].as_strategy())
    @settings(max_examples=5, database=None, suppress_health_check=list(HealthCheck))
    def generate(case: Any) -> None:
        seen.append(case.body)
        assert validator(service, operation(service)["requestBody"]["content"]["application/json"]["schema"]).is_valid(case.body)

    generate()
    assert seen


@pytest.mark.parametrize("name", SERVICES)
def test_both_addresses_take_the_same_and_every_status_is_told(name: str) -> None:
    service = SERVICES[name]
    document = openapi(service)
    root, own = document["paths"]["/"]["post"], document["paths"][service.path]["post"]
    assert {**root, "operationId": ""} == {**own, "operationId": ""}
    assert {*own["responses"]} == {"200", "default", *map(str, CODES.values())}
    assert [parameter["name"] for parameter in own.get("parameters", [])] == (["explain"] if name == "predictor" else [])
    assert all(not document["paths"][path]["get"]["security"] for path in ("/health/live", "/health/ready", "/health/startup"))


@pytest.mark.parametrize("name", SERVICES)
def test_the_examples_work(name: str) -> None:
    service, parse = SERVICES[name], {"detector": parse_regimes, "predictor": parse_trades}[name]
    content = operation(service)["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        validator(service, content["schema"]).validate(example["value"])
        for request in parse(json.dumps(example["value"]).encode())[0]:  # type: ignore[operator]
            if name == "detector":
                candles_of(request, 3600, WINDOW, 2e9)


def test_limits_of_the_models_are_in_the_schema() -> None:
    fields = openapi(detector())["components"]["schemas"]["RegimeRequest"]["properties"]
    assert fields["symbol"]["enum"] == ["BTCUSD", "ETHUSD"] and fields["resolution"]["enum"] == ["1h"]
    assert all((fields[name]["minItems"], fields[name]["maxItems"]) == (WINDOW, MAX_BARS) for name in ("open", "high", "low", "close", "volume", "time"))
    assert "enum" not in openapi(detector(symbols=()))["components"]["schemas"]["RegimeRequest"]["properties"]["symbol"]
    schemas = openapi(predictor())["components"]["schemas"]
    assert schemas["TradeRequestBatch"]["properties"]["requests"]["maxItems"] == MAX_BATCH
    for name, (low, high, meaning) in BOUNDS.items():
        number = schemas["TradeRequest"]["properties"][name]["anyOf"][0]
        assert (number["minimum"], number["maximum"], number["description"]) == (low, high, meaning)


numbers = st.floats(-2e6, 2e6) | st.integers(-30, 30) | st.none() | st.booleans() | st.just("1")


@given(request=st.dictionaries(st.sampled_from([*BOUNDS, "regime", "symbol", "leverage"]), numbers | st.sampled_from([*REGIMES, "BTCUSD", "a b", ""]), max_size=5), many=st.booleans())
@settings(max_examples=300)
def test_document_and_parser_judge_alike(request: dict[str, Any], many: bool) -> None:
    body: dict[str, Any] = {"requests": [request]} if many else request
    try:
        accepted = bool(parse_trades(json.dumps(body).encode()))
    except Problem:
        accepted = False
    shares = [request.get(f"probability_{regime}") for regime in REGIMES]  # that they sum to 1 is beyond a schema
    if None not in shares:
        return
    assert TRADE_SCHEMA.is_valid(body) == accepted


TRADE_SCHEMA = validator(SERVICES["predictor"], operation(SERVICES["predictor"])["requestBody"]["content"]["application/json"]["schema"])


def test_answers_and_problems_meet_their_schema() -> None:
    provenance = dict.fromkeys(("model_version", "model_name", "model_sha256", "feature_schema", "service_version", "git_sha", "request_id"), "x")
    fields = dict(symbol="BTCUSD", regime="bull", confidence=.4, state_probabilities=dict(zip(REGIMES, (.4, .3, .1, .1, .1))), features=dict.fromkeys(FEATURES), as_of=None,
                  spacing_checked=False, warnings=[], data_end=1, **provenance)
    schema = validator(SERVICES["detector"], operation(SERVICES["detector"])["responses"]["200"]["content"]["application/json"]["schema"])
    answer = json.loads(encode(RegimeAnswer(**fields)))
    assert schema.is_valid(answer) and schema.is_valid({"answers": [answer]})
    for change in ({"confidence": 1.1}, {"state_probabilities": {"bull": 1}}, {"features": {}}, {"regime": "crab"}, {"confidence": None}):
        assert not schema.is_valid(answer | change)
    problem = json.loads(problem_body(Problem(422, "candles", "words", [FieldError("/open/1", "words")]), "/", "r", "t"))
    validator(SERVICES["detector"], {"$ref": "#/components/schemas/ProblemDocument"}).validate(problem)


class Page(HTMLParser):
    """What a browser would find in a page."""
    VOID = ("meta", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(html: str, nonce: str) -> Page:
    """A page that loads nothing and runs only its own script."""
    found = Page(html)
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") or name in ("style", "src", "srcset", "action") for name in attributes)
        assert attributes.get("href", "/").startswith(("/", "data:,")) and not attributes.get("href", "/").startswith("//")  # type: ignore[union-attr]
        assert tag not in ("script", "style") or attributes.get("nonce") == nonce
    assert [tag for tag, _ in found.tags].count("script") == 1 and "@import" not in html and "url(" not in html
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_the_page_is_whole_and_its_form_holds_the_sample(name: str) -> None:
    service = SERVICES[name]
    found = check_page(page(service, "n0nce"), "n0nce")
    assert [attributes["href"] for tag, attributes in found.tags if tag == "a"] == ["/openapi.json", "/metrics", "/health/ready"]
    assert next(attributes for tag, attributes in found.tags if tag == "form")["data-path"] == service.path
    box = found.text[found.text.index("Request") + len("Request"):found.text.index("Send")]
    assert json.loads(box) == service.sample
    assert "nonce" not in page(service)


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\'`</textarea></style>{}${}😀'
cards = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.just(HOSTILE) | st.text(st.characters(codec="utf-8"), max_size=5),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([HOSTILE, "start", "end", "sha256", "occupancy", "verdict", "metrics"]), inner, max_size=3), max_leaves=12)


@given(card=st.dictionaries(st.sampled_from([HOSTILE, "verdict", "model.pkl", "data", "start"]), cards, max_size=4))
@settings(max_examples=150)
def test_no_card_can_break_the_page(card: dict[str, Any]) -> None:
    check_page(page(detector(card=card), "n0nce"), "n0nce")


def test_no_fact_can_break_the_page() -> None:
    hostile = detector(title=HOSTILE, name=HOSTILE, path="/" + HOSTILE, description=HOSTILE, symbols=(HOSTILE,), resolution=HOSTILE, sample={HOSTILE: HOSTILE})
    found = check_page(page(hostile, "n0nce"), "n0nce")
    assert HOSTILE in found.text


def test_the_card_tells_spans_and_regimes() -> None:
    span = {"bars": 46_591, "start": 1_567_962_000, "end": 1_735_689_600, "sha256": "ab" * 32}
    html = page(detector(card={"verdict": "no edge", "hmm.pkl": {"data": span, "metrics": {"occupancy": [.1, .2, .3, .3, .1]}}, "trade.pkl": {"data": {"BTCUSD": span}}}))
    text = Page(html).text
    assert "2019-09-08 17:00 to 2025-01-01 00:00" in text and "46,591" in text and "abababababab…" in text and "no edge" in text
    assert all(f"<dt>{name.replace('_', ' ')}</dt>" in html for name in REGIMES) and "<td>BTCUSD</td>" in html
