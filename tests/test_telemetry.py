"""Log lines without secrets, whatever is logged, and numbers that stay few."""
import base64
import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
import warnings
from timeit import timeit
from urllib.parse import quote

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.serving import telemetry
from delta_go.serving.contract import CODES, Problem, problem_body
from delta_go.serving.telemetry import (
    HEAD,
    PATTERNS,
    ROUTES,
    STARS,
    JsonFormatter,
    Metrics,
    QuietHandler,
    Redactor,
    Trace,
    configure_logging,
    log_fields,
    redact,
    register_secret,
    request_id_of,
    trace_of,
)

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRETS = ("Zq7-bot-key/0123456789+abcdefghij", 'Yp"quoted\\and backslashed\' 0123456789', "Xw5:delta:secret=0123456789&abcdefghij", "Vé8-umlaut-secret-0123456789-abcd", "short-8x")


def counted(size: int) -> bytes:
    return bytes(range(size))


DRAWN = Trace(counted(16).hex(), "")


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    "A redactor of this test's own that knows the planted secrets."
    monkeypatch.setattr(telemetry, "REDACTOR", Redactor())
    for secret in SECRETS:
        register_secret(secret)


def leaks(text: str) -> list[str]:
    "Secrets that stand in a text in any usual spelling, or whose head does."
    found = []
    for secret in SECRETS:
        spelled = [secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1], base64.b64encode(secret.encode()).decode()]
        spelled += [form[:HEAD] for form in spelled if len(form) >= 2 * HEAD]
        found += [form for form in spelled if form in text]
    return found


def record_of(message: object, *args: object, level: int = logging.INFO, failure: BaseException | None = None, **extra: object) -> logging.LogRecord:
    raised = (type(failure), failure, failure.__traceback__) if failure else None
    record = logging.LogRecord("delta_go", level, "x.py", 1, message, args, raised)
    vars(record).update(extra)
    return record


def line_of(record: logging.LogRecord, project: str = "") -> dict:
    line = JsonFormatter(project).format(record)
    assert line.isascii() and len(line.splitlines()) == 1
    return msgspec.json.decode(line)


# ---- traces and names

@pytest.mark.parametrize(("headers", "trace"), [
    ({"traceparent": f"00-{ID}-{SPAN}-01"}, Trace(ID, SPAN)), ({"Traceparent": f"00-{ID}-{SPAN}-00"}, Trace(ID, SPAN)),
    ({"traceparent": f"01-{ID}-{SPAN}-01-what.comes-later"}, Trace(ID, SPAN)), ({"traceparent": f"cc-{ID}-{SPAN}-01"}, Trace(ID, SPAN)),
    ({"traceparent": f"00-{ID}-{SPAN}-01-more"}, DRAWN), ({"traceparent": f"ff-{ID}-{SPAN}-01"}, DRAWN), ({"traceparent": f"00-{'0' * 32}-{SPAN}-01"}, DRAWN),
    ({"traceparent": f"00-{ID}-{'0' * 16}-01"}, DRAWN), ({"traceparent": f"00-{ID.upper()}-{SPAN}-01"}, DRAWN), ({"traceparent": f"00-{ID}-{SPAN}-1"}, DRAWN),
    ({"traceparent": f"00-{ID}-{SPAN}-01\n"}, DRAWN), ({"traceparent": f" 00-{ID}-{SPAN}-01"}, DRAWN), ({"traceparent": f"00-{ID}-{SPAN}-01,00-{ID}-{SPAN}-01"}, DRAWN),
    ({"X-Cloud-Trace-Context": f"{ID}/74;o=1"}, Trace(ID, f"{74:016x}")), ({"x-cloud-trace-context": f"{ID}/{2**64 - 1}"}, Trace(ID, "f" * 16)),
    ({"X-Cloud-Trace-Context": ID.upper()}, Trace(ID, "")), ({"X-Cloud-Trace-Context": f"{ID}/0;o=1"}, Trace(ID, "")), ({"X-Cloud-Trace-Context": f"{ID}/{2**64}"}, Trace(ID, "")),
    ({"X-Cloud-Trace-Context": f"{'0' * 32}/1"}, DRAWN), ({"X-Cloud-Trace-Context": f"{ID}/٧"}, DRAWN), ({"X-Cloud-Trace-Context": f"{ID}/1;o=1;x"}, DRAWN),
    ({"traceparent": "nonsense", "X-Cloud-Trace-Context": f"{ID}/1"}, Trace(ID, f"{1:016x}")), ({}, DRAWN), ({"traceparent": ""}, DRAWN),
    ({"traceparent": f"00-{ID}-{SPAN}-01", "X-Cloud-Trace-Context": f"{'1' * 32}/1"}, Trace(ID, SPAN)),
])
def test_traces(headers, trace):
    assert trace_of(headers, counted) == trace


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_any_header_gives_ids_that_can_do_no_harm(parent, cloud, name):
    headers = {"traceparent": parent, "X-Cloud-Trace-Context": cloud, "X-Request-Id": name}
    trace, request_id = trace_of(headers), request_id_of(headers)
    assert re.fullmatch(r"[0-9a-f]{32}", trace.trace_id) and re.fullmatch(r"([0-9a-f]{16})?", trace.span_id)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id) and (request_id == name or len(request_id) == 32)


def test_drawn_names_differ():
    assert len({request_id_of({}) for _ in range(100)} | {trace_of({}).trace_id for _ in range(100)}) == 200


# ---- redaction

UNKNOWN = "U7nknown-Key.9f86d081884c7d659a2f"
SHAPES = ["Authorization: Bearer {}", "authorization: {}", "AUTHORIZATION:Basic {}", "X-API-Key: {}", "api-key={}", "api_key={}&x=1", "apikey: {}", "signature: {}",
          "?a=1&signature={}", "?api_key%3D{}", "{{'X-API-Key': '{}'}}", '{{"api_key": "{}"}}', '{{"api_key":"{}"}}', "[('Authorization', 'Bearer {}')]", "[(b'x-api-key', b'{}')]",
          "{{'HTTP_X_API_KEY': '{}'}}", "HTTP_AUTHORIZATION={}", 'said "{{\\"api_key\\": \\"{}\\"}}"', "client_secret={}", "DELTA_API_SECRET={}", "access_token={}", "password='{}'",
          "Cookie: session={}", "Set-Cookie: sid={}; Path=/", "got bearer {} back", "Bearer    {}", "https://bot:{}@example.com/x", "X-Serverless-Authorization: bearer {}",
          "EnvironHeaders([('Host', 'x'), ('X-Api-Key', '{}')])", "-H 'X-API-Key: {}'", 'curl -H "Authorization: Bearer {}" x', "Digest x\r\nAuthorization: Digest username=bot, response={}"]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_follows_a_telling_name_is_struck_out(shape):
    text = Redactor().redact(shape.format(UNKNOWN))
    assert UNKNOWN not in text and STARS in text and UNKNOWN[:HEAD] not in text


def test_identity_tokens_are_known_by_their_form():
    token = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (b'{"alg":"RS256"}', b'{"email":"bot@example.com"}', b"signature"))
    assert Redactor().redact(f"sent {token}, got 401") == f"sent {STARS}, got 401"


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("write", [str, repr, json.dumps, lambda s: json.dumps(repr(s)), lambda s: quote(s, safe=""), lambda s: base64.b64encode(s.encode()).decode(),
                                   lambda s: base64.urlsafe_b64encode(s.encode()).decode().rstrip("="), lambda s: f"<{s}>{s}", lambda s: [s], lambda s: {"x": (s, {s})}])
def test_a_registered_secret_stands_nowhere(secret, write):
    text = redact(f"before {write(secret)} after")
    assert leaks(text) == [] and text.startswith("before ") and text.endswith(" after")


@pytest.mark.parametrize("secret", [secret for secret in SECRETS if len(secret) >= 2 * HEAD])
def test_a_secret_cut_short_is_still_known(secret):
    for end in range(HEAD, len(secret)):
        assert leaks(redact(f"x={secret[:end]}")) == []


def test_a_secret_of_several_lines_goes_line_by_line():
    register_secret("first-line-0123456789\n   second-line-0123456789\n")
    assert redact("> first-line-0123456789\n> second-line-0123456789") == f"> {STARS}\n> {STARS}"


@pytest.mark.parametrize("short", ["", "abc", "       7      "])
def test_a_word_cannot_be_a_secret(short):
    with pytest.raises(InputError, match="at least 8 characters"):
        register_secret(short)


INNOCENT = ["POST /detect_regime 200", "model 1h-7c4a, sha256 " + "9f86d081884c7d659a2feaa0c55ad015" * 2, "regime bull, probability 0.61", "SERVICE_API_KEYS: expected caller:key pairs separated by commas",
            "SERVICE_AUTH: expected api_key or iam on Cloud Run, got none", "hmm-detector listens on http://127.0.0.1:8080, auth api_key", "https://accounts.google.com is not asked",
            "Traceback (most recent call last):", "bearer bonds", "The token has expired: ask for a fresh one.", "time 12:30:05, ratio 3:1", "SERVICE_API_KEY: no such setting; did you mean SERVICE_API_KEYS?"]


@pytest.mark.parametrize("text", INNOCENT)
def test_ordinary_words_stay(text):
    assert redact(text) == text


NAMES = ("authorization", "api-key", "Api_Key", "api key", "SECRET", "signature", "passwd", "cookie", "Token", "bearer", "Bearer", "eyJhbGci", "https://", "x", "bull")
JOINTS = (": ", "=", "': '", '":"', "', '", " ", "%3D", ".", "/", ":", "@", "\n", "\\")
PIECES = st.lists(st.sampled_from((*NAMES, *JOINTS, *SECRETS, UNKNOWN, "9", "é")), max_size=12).map("".join)


def fully_redacted(text: str) -> str:
    text = telemetry.REDACTOR.pattern.sub(STARS, text)
    for pattern, kept in PATTERNS:
        text = re.sub(pattern, kept, text, flags=re.IGNORECASE)
    return text


@given(PIECES)
def test_the_quick_look_is_never_wrongly_no(text):
    full = fully_redacted(text)
    assert redact(text) == full and (full == text or telemetry.REDACTOR.suspects(text))
    if full != text:
        written = msgspec.json.encode(text).decode()
        assert not written.isascii() or telemetry.REDACTOR.suspects(written)


@given(PIECES)
def test_no_neighbourhood_saves_a_secret(text):
    assert leaks(redact(text)) == []


@pytest.mark.parametrize("text", ["eyJ" * 30_000, "eyJaaaaaa." * 10_000, "-eyJ" * 20_000, "authorization" * 6_000, "token " * 12_000, "api_key" * 10_000, "token-" * 12_000,
                                  "://" * 25_000, "://a:" * 15_000, "bearer " * 10_000, "secret" + " " * 70_000, "token" + "\\" * 70_000, "cookie:" * 10_000, SECRETS[0][:HEAD] * 6_000])
def test_no_text_takes_long(text):
    start = time.process_time()
    redact(text)
    assert time.process_time() - start < 1


# ---- plain values and lines

class Odd:
    def __str__(self):
        raise RuntimeError(SECRETS[0])

    __repr__ = __str__


class OddMapping(dict):
    def items(self):
        raise RuntimeError(SECRETS[0])


class OddText(str):
    def __str__(self):
        raise RuntimeError(SECRETS[0])


loop: dict = {}
loop["again"] = loop
ODDITIES = [None, True, 2**53, -(10**500), float("nan"), float("inf"), np.float64(0.5), np.float32("nan"), np.int64(7), np.arange(3), b"\xff\x00", bytearray(b"x"), Odd(), OddMapping(a=1),
            OddText("x"), loop, {1: 2, None: 3, Odd(): 4}, [[[[[[[1]]]]]]], {1, 2}, frozenset("a"), object(), Odd, print, "\ud800", "\u2028\x85\n\r\x1b[31m", "x" * 100_000,
            range(9), iter(()), ValueError(SECRETS[1]), {"api_key": UNKNOWN}, ("X-API-Key", UNKNOWN), [("Authorization", UNKNOWN)], 1j, ..., memoryview(b"x")]


@pytest.mark.parametrize("value", ODDITIES, ids=range(len(ODDITIES)))
def test_nothing_odd_stops_a_line(value):
    for record in (record_of("told", field=value), record_of("%s and %r", value, value), record_of(value), record_of(value, value), record_of("%d", value),
                   record_of("x", trace_id=value, span_id=value, request_id=value, severity=value, message_=value)):
        line = line_of(record)
        assert leaks(json.dumps(line)) == [] and UNKNOWN not in str(line) and line["severity"] == "INFO"
    with log_fields(value=value):
        assert line_of(record_of("told"))["message"] == "told"


ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20) | st.sampled_from(SECRETS),
                   lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers() | st.sampled_from(SECRETS), inner, max_size=4), max_leaves=8)


@given(ANY, ANY, PIECES, st.integers(-5, 60))
def test_every_record_is_one_strict_json_line_without_secrets(field, argument, message, level):
    line = line_of(record_of(message + "%s", argument, level=level, field=field))
    assert leaks(json.dumps(line, ensure_ascii=False)) == [] and line["severity"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "DEFAULT")


@given(st.text(), st.dictionaries(st.sampled_from(["latency", "status", "service", "trace_id", "span_id", "code", "api_key"]),
                                  st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(SECRETS)))
def test_the_quick_way_writes_what_the_careful_way_writes(message, told):
    record, formatter = record_of(message, **told), JsonFormatter("p")
    try:
        quick = formatter.quick(record)
    except Exception:
        quick = ""
    assert not quick or json.loads(quick) == json.loads(formatter.careful(record))


def test_an_ordinary_record_goes_the_quick_way():
    assert JsonFormatter("p").quick(record_of("answered %s", "bull", latency=0.0021, status=200, caller="bot", code=None))


def test_a_line_says_what_a_log_reader_looks_for():
    record = record_of("answered %s", "bull", trace_id=ID, span_id=SPAN, request_id="bot-17", latency=0.0021, model_version="1h-7c4a", service="hmm-detector")
    record.created = NOW = 1_700_000_000.25
    assert line_of(record, "delta-go") == {
        "severity": "INFO", "message": "answered bull", "time": "2023-11-14T22:13:20.250000Z", "logger": "delta_go", "request_id": "bot-17", "latency": 0.0021, "model_version": "1h-7c4a",
        "service": "hmm-detector", "logging.googleapis.com/trace": f"projects/delta-go/traces/{ID}", "logging.googleapis.com/spanId": SPAN}
    assert record.created == NOW and line_of(record)["logging.googleapis.com/trace"] == ID


def test_no_message_forges_a_second_line():
    forged = 'x\n{"severity":"INFO","message":"all is well"}\r\u2028\x85\x0b'
    record = record_of(forged, field=forged, failure=ValueError(forged))
    record.name = forged
    assert line_of(record)["severity"] == "INFO"


def test_told_fields_cannot_replace_ours():
    assert line_of(record_of("true", severity="DEBUG", time="never", logger="x"))["severity"] == "INFO"


def nested(depth: int = 3) -> BaseException:
    "Exceptions with secrets in messages, causes, contexts, notes and a group."
    try:
        try:
            try:
                raise KeyError(SECRETS[0])
            except KeyError as first:
                raise ValueError(f"GET https://x?api_key={UNKNOWN}&s={quote(SECRETS[2], safe='')}") from first
        except ValueError:
            raise RuntimeError({"Authorization": f"Bearer {SECRETS[3]}"})  # noqa: B904
    except RuntimeError as last:
        last.add_note(f"note {SECRETS[1]}")
        try:
            raise ExceptionGroup(SECRETS[0], [last, OSError(2, SECRETS[2])])
        except ExceptionGroup as group:
            return group


def test_exceptions_are_told_without_secrets():
    line = line_of(record_of("failed %s", SECRETS[0], failure=nested(), level=logging.ERROR))
    assert leaks(json.dumps(line, ensure_ascii=False)) == [] and UNKNOWN not in str(line)
    assert all(word in line["exception"] for word in ("KeyError", "ValueError", "RuntimeError", "ExceptionGroup", "OSError", "note ", "test_telemetry.py"))


def test_a_long_exception_keeps_its_end_and_no_half_secret():
    for length in (*range(65_400, 65_700, 23), 200_000):
        text = line_of(record_of("x", failure=ValueError(SECRETS[0] * 3 + "\n" + "y" * length + f"\n{SECRETS[0]} the end")))["exception"]
        assert text.endswith(f"{STARS} the end\n") and len(text) <= 16_384 and "abcdefghij" not in text


def test_secrets_that_shrink_leave_no_half_of_one_at_the_front():
    for offset in range(len(SECRETS[0])):
        text = line_of(record_of("x", failure=ValueError("\n" + "y" * offset + SECRETS[0] * 2_500)))["exception"]
        assert 0 < len(text) < 16_384 and "abcdefghij" not in text
        text = line_of(record_of("x", failure=ValueError("\n" + "y" * offset + SECRETS[0] * 1_700 + "\n" + SECRETS[0] * 700)))["exception"]
        assert 0 < len(text) < 16_384 and "abcdefghij" not in text


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("write", [repr, json.dumps, lambda s: repr([s]), lambda s: json.dumps({"x": s})])
def test_a_line_holds_no_spelling_of_a_secret(secret, write):
    line = line_of(record_of("got %s", write(secret), field=write(secret)))
    assert leaks(line["message"]) == leaks(line["field"]) == []


def test_a_stack_is_told_without_its_secrets():
    record = record_of("here")
    record.stack_info = f"Stack:\n  {SECRETS[0]}"
    assert line_of(record)["exception"] == f"Stack:\n  {STARS}"


@pytest.mark.parametrize("raised", [True, 1, "x", (None, None, None), (1, 2, 3), (ValueError, ValueError("x"), "trace"), (ValueError,)])
def test_a_wrong_exc_info_stops_no_line(raised):
    record = record_of("told")
    record.exc_info = raised
    assert line_of(record)["message"] == "told"


def test_fields_belong_to_their_thread_and_block():
    seen, ready = {}, threading.Barrier(2)

    def tell(name):
        with log_fields(request_id=name):
            ready.wait(5)
            seen[name] = line_of(record_of("told"))["request_id"]
            with log_fields(caller="bot"):
                seen[name] += "+" + line_of(record_of("told"))["caller"]
    threads = [threading.Thread(target=tell, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "a+bot", "b": "b+bot"} and "request_id" not in line_of(record_of("told"))


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(SECRETS[0])


def test_a_stream_that_is_gone_is_silence(capsys):
    handler = QuietHandler(Gone())
    handler.setFormatter(JsonFormatter())
    handler.handle(record_of("lost %s", SECRETS[0]))
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def unchanged():
    "Logging and the hooks as they were, after the test."
    root = logging.getLogger()
    kept = root.handlers[:], root.level, sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning
    yield
    logging.captureWarnings(False)
    root.handlers, level, sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning = kept
    root.setLevel(level)


def test_configured_twice_is_configured_once(unchanged):
    first, second = io.StringIO(), io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(first))
    configure_logging("WARNING", stream=first)
    configure_logging("WARNING", "delta-go", second)
    logging.getLogger("a.b").warning("told")
    logging.getLogger("a.b").info("not told")
    assert first.getvalue() == "" and [json.loads(line)["message"] for line in second.getvalue().splitlines()] == ["told"]


PROCESS = """
import logging, sys, threading, warnings
from delta_go.serving.telemetry import configure_logging, register_secret, log_fields
secrets = sys.argv[1:]
for secret in secrets:
    register_secret(secret)
configure_logging("DEBUG", "delta-go")
log = logging.getLogger("somewhere")
for secret in secrets:
    log.info(secret); log.info("%s %r %(x)s", secret); log.debug("%s", {secret: [secret]}, extra={"deep": {"a": (secret, secret.encode())}})
    try:
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise RuntimeError(secret.encode()) from error
    except RuntimeError:
        log.exception("failed", extra={"api_key": "abc"}); log.error("x", stack_info=True)
    warnings.warn(secret)
    thread = threading.Thread(target=lambda: {}[secret]); thread.start(); thread.join()
    class Late:
        def __del__(self): raise OSError(secret)
    Late()
raise SystemError(*secrets)
"""


def test_a_whole_process_says_nothing_it_should_not():
    done = subprocess.run([sys.executable, "-c", PROCESS, *SECRETS], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert leaks(done.stdout) == leaks(done.stderr) == [] == leaks(json.dumps(lines, ensure_ascii=False))
    assert done.returncode == 1 and done.stderr == "" and len(lines) == 8 * len(SECRETS) + 1
    uncaught = [line["message"] for line in lines if line["severity"] == "CRITICAL"]
    assert uncaught.count("uncaught KeyError") == uncaught.count("uncaught OSError") == len(SECRETS) and uncaught[-1] == "uncaught SystemError"


def test_nothing_heavy_comes_along():
    code = "import sys, delta_go.serving.telemetry; print([name for name in ('prometheus_client', 'flask', 'pandas', 'http.server', 'ssl') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- numbers

def series(metrics: Metrics) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    text, media_type = metrics.render()
    assert media_type.startswith("text/plain; version=0.0.4")
    return {f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value for family in text_string_to_metric_families(text.decode()) for sample in family.samples
            if sample.name.startswith("delta_go")}


def test_numbers_are_those_that_happened():
    clock = [1_700_000_000.0]
    metrics = Metrics("hmm-detector", lambda: clock[0])
    assert series(metrics)["delta_go_ready{}"] == 0 and not [name for name in series(metrics) if "model" in name]
    for seconds in (0.0004, 0.0005, 0.003, 99.0):
        metrics.observe("/detect_regime", "POST", 200, seconds)
    metrics.observe("/detect_regime", "POST", 422, 0.001)
    metrics.refuse("short_window")
    metrics.answer("bull", 0.83)
    metrics.answer("bull")
    metrics.in_flight.inc()
    metrics.ready.set(True)
    metrics.use_model("old", 1_600_000_000)
    metrics.use_model("1h-7c4a", 1_699_990_000)
    clock[0] += 50
    found = series(metrics)
    route, bull = '"route": "/detect_regime"', '"service": "hmm-detector"'
    assert {name: found[name] for name in found if "bucket" not in name} == {
        f'delta_go_requests_total{{"code": "200", "method": "POST", {route}}}': 4, f'delta_go_requests_total{{"code": "422", "method": "POST", {route}}}': 1,
        f'delta_go_request_seconds_count{{{route}}}': 5, f'delta_go_request_seconds_sum{{{route}}}': pytest.approx(99.0049), "delta_go_in_flight{}": 1, "delta_go_ready{}": 1,
        'delta_go_refused_total{"code": "short_window"}': 1, f'delta_go_answers_total{{"outcome": "bull", {bull}}}': 2, f'delta_go_probability_count{{{bull}}}': 1,
        f'delta_go_probability_sum{{{bull}}}': 0.83, 'delta_go_model_age_seconds{"version": "1h-7c4a"}': 10_050, 'delta_go_model_info{"version": "1h-7c4a"}': 1}
    buckets = {name.partition('"le": "')[2].partition('"')[0]: value for name, value in found.items() if name.startswith("delta_go_request_seconds_bucket")}
    assert (buckets["0.0005"], buckets["0.001"], buckets["0.005"], buckets["10.0"], buckets["+Inf"]) == (2, 3, 4, 4, 5)


@given(st.lists(st.tuples(st.text(max_size=20) | st.sampled_from(sorted(ROUTES)) | st.sampled_from(SECRETS), st.text(max_size=8), st.integers(-10, 1_000), st.floats(),
                          st.text(max_size=12) | st.sampled_from(SECRETS)), max_size=20))
def test_strangers_make_no_series(happened):
    metrics = Metrics("trade-predictor")
    for path, method, code, number, word in happened:
        metrics.observe(path, method, code, number)
        metrics.refuse(word)
        metrics.answer(word, number)
    text = metrics.render()[0].decode()
    labels = set(re.findall(r'(?:route|method|outcome)="([^"]*)"', text)) | set(re.findall(r'refused_total\{code="([^"]*)"', text))
    assert leaks(text) == [] and "NaN" not in text and labels <= ROUTES | telemetry.METHODS | telemetry.OUTCOMES | CODES.keys() | {"other"}
    assert len(metrics.cells) <= len(happened)


def test_threads_lose_no_count():
    metrics = Metrics("hmm-detector")

    def work():
        for _ in range(500):
            metrics.observe("/", "GET", 200, 0.001)
            metrics.answer("bear", 0.5)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = series(metrics)
    assert found['delta_go_requests_total{"code": "200", "method": "GET", "route": "/"}'] == found['delta_go_answers_total{"outcome": "bear", "service": "hmm-detector"}'] == 2_000


def test_two_services_in_one_process_count_apart():
    one, two = Metrics("hmm-detector"), Metrics("trade-predictor")
    one.refuse("busy")
    assert 'delta_go_refused_total{"code": "busy"}' in series(one) and 'delta_go_refused_total{"code": "busy"}' not in series(two)


@pytest.mark.skipif(sys.platform != "linux", reason="the process's own numbers come from /proc")
def test_the_process_tells_its_memory():
    assert re.search(r"^process_resident_memory_bytes \d", Metrics("x").render()[0].decode(), re.MULTILINE)


def test_counting_costs_less_than_ten_microseconds():
    metrics = Metrics("hmm-detector")
    assert min(timeit(lambda: metrics.observe("/detect_regime", "POST", 200, 0.0017), number=1_000) / 1_000 for _ in range(20)) < 10e-6


def test_a_problem_made_of_a_logged_failure_shows_nothing():
    line = json.dumps(line_of(record_of("failed", failure=nested())))
    body = problem_body(Problem(500, "internal", "the service failed to answer"), "/detect_regime", "bot-17", ID).decode()
    assert leaks(line + body) == []
