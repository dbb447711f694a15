"""What a service is told and who may ask it, cell by cell."""
import base64
import json
import logging
import subprocess
import sys
import traceback

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.serving import access
from delta_go.serving.access import (
    VARIABLES,
    Caller,
    Secret,
    ServiceSettings,
    authenticate,
    caller_of_key,
    check_exposure,
    read_keys,
    read_settings,
)
from delta_go.serving.contract import Problem, problem_body

NOW = 1_700_000_000
AUDIENCE = "https://hmm-detector.example"
MARCH, APRIL, BOARD, ALIEN = (f"{name}-key-Qx7:0123456789-abcdefghij" for name in ("march", "april", "board", "alien"))
API_KEYS = f"bot:{MARCH},dashboard:{BOARD}, bot:{APRIL}"
HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "127.0.0.2", "10.0.0.7", "LOCALHOST")


def token(signature: str = "SIGNATURE_REMOVED_BY_GOOGLE", drop: str = "", **change) -> str:
    claims = {"iss": "https://accounts.google.com", "aud": AUDIENCE, "exp": NOW + 600, "email": "bot@example.com", "email_verified": True} | change
    coded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
             for part in ({"alg": "RS256"}, {name: value for name, value in claims.items() if name != drop})]
    return ".".join([*coded, signature])


def environment(mode: str, host: str = "127.0.0.1", cloud: bool = False, **more: str) -> dict[str, str]:
    return {"SERVICE_AUTH": mode, "HOST": host, "SERVICE_API_KEYS": API_KEYS, "SERVICE_IAM_AUDIENCE": AUDIENCE, "SERVICE_IAM_CALLERS": "Bot@example.com",
            **({"K_SERVICE": "hmm-detector"} if cloud else {}), **more}


# ---- may it start? One row a host, one column a mode, first off Cloud Run, then on it. `+` starts, `-` refuses.

START = """
host       | none api_key iam | none api_key iam
127.0.0.1  |  +      +     -  |  -      +     +
::1        |  +      +     -  |  -      +     +
localhost  |  +      +     -  |  -      +     +
0.0.0.0    |  -      +     -  |  -      +     +
::         |  -      +     -  |  -      +     +
127.0.0.2  |  -      +     -  |  -      +     +
10.0.0.7   |  -      +     -  |  -      +     +
LOCALHOST  |  -      +     -  |  -      +     +
"""
START_CELLS = [(host.strip(), mode, cloud, mark)
               for host, *sides in (line.split("|") for line in START.strip().splitlines()[1:])
               for cloud, side in zip((False, True), sides)
               for mode, mark in zip(("none", "api_key", "iam"), side.split())]


@pytest.mark.parametrize(("host", "mode", "cloud", "mark"), START_CELLS)
def test_start(host, mode, cloud, mark):
    settings = read_settings(environment(mode, host, cloud))
    if mark == "+":
        check_exposure(settings)
    else:
        with pytest.raises(InputError, match="SERVICE_AUTH: expected"):
            check_exposure(settings)


@pytest.mark.parametrize(("environ", "words"), [
    (environment("api_key", SERVICE_API_KEYS=""), "expected SERVICE_API_KEYS with api_key"),
    (environment("iam", cloud=True, SERVICE_IAM_AUDIENCE=""), "expected SERVICE_IAM_AUDIENCE with iam"),
])
def test_a_mode_needs_what_it_compares_with(environ, words):
    with pytest.raises(InputError, match=words):
        check_exposure(read_settings(environ))


def test_settings_made_in_code_with_an_unknown_mode_do_not_start():
    with pytest.raises(InputError, match="expected none, api_key or iam"):
        check_exposure(ServiceSettings(auth="nobody"))


# ---- who may ask? A row is a mode and what was sent; a column is a path. Names are callers, numbers are refusals.

PATHS = ("/health/live", "/health/ready", "/health/startup", "/health/live/", "//health/live", "/HEALTH/LIVE", "/health",
         "/", "/openapi.json", "/metrics", "/detect_regime", "/predict_trade", "/nowhere")
OPEN = PATHS[:3]
SENT = {
    "nothing": {},
    "key": {"X-API-Key": MARCH}, "key in lower-case header": {"x-api-key": MARCH}, "newer key": {"X-API-Key": APRIL}, "another's key": {"X-API-Key": BOARD},
    "key as bearer": {"Authorization": f"Bearer {MARCH}"}, "key as BEARER": {"Authorization": f"BEARER  {MARCH}"}, "key with blanks around": {"X-API-Key": f" {MARCH} "},
    "key as basic": {"Authorization": f"Basic {MARCH}"}, "key without scheme": {"Authorization": MARCH}, "bare scheme": {"Authorization": "Bearer"},
    "unknown key": {"X-API-Key": ALIEN}, "half a key": {"X-API-Key": MARCH[:-1]}, "key and more": {"X-API-Key": MARCH + "x"}, "key in capitals": {"X-API-Key": MARCH.upper()},
    "key twice": {"X-API-Key": f"{MARCH},{MARCH}"}, "name and key": {"X-API-Key": f"bot:{MARCH}"}, "only a name": {"X-API-Key": "bot"},
    "key, alien bearer": {"X-API-Key": MARCH, "Authorization": f"Bearer {ALIEN}"}, "alien key, bearer key": {"X-API-Key": ALIEN, "Authorization": f"Bearer {MARCH}"},
    "token": {"Authorization": f"Bearer {token()}"}, "token in the platform's header": {"X-Serverless-Authorization": f"bearer {token()}"},
    "token in capitals": {"Authorization": f"Bearer {token(email='BOT@EXAMPLE.COM')}"},
    "another service's token": {"Authorization": f"Bearer {token(aud='https://trade-predictor.example')}"},
    "another issuer's token": {"Authorization": f"Bearer {token(iss='https://accounts.example')}"},
    "token out since 59 s": {"Authorization": f"Bearer {token(exp=NOW - 59)}"}, "token out since 60 s": {"Authorization": f"Bearer {token(exp=NOW - 60)}"},
    "token without end": {"Authorization": f"Bearer {token(drop='exp')}"}, "token with mail unverified": {"Authorization": f"Bearer {token(email_verified=False)}"},
    "token with verified as text": {"Authorization": f"Bearer {token(email_verified='true')}"}, "token without mail": {"Authorization": f"Bearer {token(drop='email')}"},
    "stranger's token": {"Authorization": f"Bearer {token(email='eve@example.com')}"}, "token of two parts": {"Authorization": f"Bearer {token().rpartition('.')[0]}"},
    "list of audiences": {"Authorization": f"Bearer {token(aud=[AUDIENCE])}"}, "token too long": {"Authorization": f"Bearer {token(pad='x' * 9000)}"},
    "stranger verified, bot forged": {"X-Serverless-Authorization": f"Bearer {token(email='eve@example.com')}", "Authorization": f"Bearer {token()}"},
    "bot verified, stranger beside": {"X-Serverless-Authorization": f"Bearer {token()}", "Authorization": f"Bearer {token(email='eve@example.com')}"},
}
# what was sent                    none    api_key    iam
ASKED = """
nothing                          | local | 401       | 401
key                              | local | bot       | 401
key in lower-case header         | local | bot       | 401
newer key                        | local | bot       | 401
another's key                    | local | dashboard | 401
key as bearer                    | local | bot       | 401
key as BEARER                    | local | bot       | 401
key with blanks around           | local | bot       | 401
key as basic                     | local | 401       | 401
key without scheme               | local | 401       | 401
bare scheme                      | local | 401       | 401
unknown key                      | local | 401       | 401
half a key                       | local | 401       | 401
key and more                     | local | 401       | 401
key in capitals                  | local | 401       | 401
key twice                        | local | 401       | 401
name and key                     | local | 401       | 401
only a name                      | local | 401       | 401
key, alien bearer                | local | bot       | 401
alien key, bearer key            | local | 401       | 401
token                            | local | 401       | bot@example.com
token in the platform's header   | local | 401       | bot@example.com
token in capitals                | local | 401       | bot@example.com
another service's token          | local | 401       | 401
another issuer's token           | local | 401       | 401
token out since 59 s             | local | 401       | bot@example.com
token out since 60 s             | local | 401       | 401
token without end                | local | 401       | 401
token with mail unverified       | local | 401       | 401
token with verified as text      | local | 401       | 401
token without mail               | local | 401       | 401
stranger's token                 | local | 401       | 403
token of two parts               | local | 401       | 401
list of audiences                | local | 401       | 401
token too long                   | local | 401       | 401
stranger verified, bot forged    | local | 401       | 403
bot verified, stranger beside    | local | 401       | bot@example.com
"""
ROWS = [[part.strip() for part in line.split("|")] for line in ASKED.strip().splitlines()]
PLACES = {"none": [("127.0.0.1", False), ("::1", False), ("localhost", False)],
          "api_key": [(host, cloud) for host in HOSTS for cloud in (False, True)], "iam": [(host, True) for host in HOSTS]}


def ask(settings: ServiceSettings, path: str, headers: dict[str, str]) -> str:
    try:
        return authenticate(settings, path, headers, NOW).name
    except Problem as problem:
        assert problem.code == {401: "unauthenticated", 403: "forbidden"}[problem.status]
        assert ("WWW-Authenticate" in problem.headers) == (problem.status == 401)
        assert (problem.headers.get("WWW-Authenticate", "").count("invalid_token") == 1) <= bool(headers)
        shown = problem_body(problem, path, "id", "trace").decode() + str(problem.headers) + repr(problem)
        sent = [word for value in headers.values() for word in value.split() if len(word) >= 30]
        assert not any(word in shown for word in (*sent, MARCH, APRIL, BOARD, ALIEN))
        return str(problem.status)


def test_the_table_has_a_row_for_everything_sent():
    assert [row[0] for row in ROWS] == list(SENT)


@pytest.mark.parametrize("mode", ["none", "api_key", "iam"])
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_ask(row, mode):
    expected = dict(zip(("none", "api_key", "iam"), row[1:]))[mode]
    for host, cloud in PLACES[mode]:
        settings = read_settings(environment(mode, host, cloud))
        check_exposure(settings)
        for path in PATHS:
            wanted = "anyone" if path in OPEN and mode != "none" else expected
            assert ask(settings, path, SENT[row[0]]) == wanted, (host, cloud, path)


def test_callers_say_how_they_are_known():
    assert authenticate(read_settings({}), "/", {}, NOW) == Caller("local", "none")
    assert authenticate(read_settings(environment("api_key")), "/", {"X-API-Key": MARCH}, NOW) == Caller("bot", "api_key")
    assert authenticate(read_settings(environment("iam", cloud=True)), "/", SENT["token"], NOW) == Caller("bot@example.com", "iam")
    assert authenticate(read_settings(environment("iam", cloud=True)), "/health/ready", {}, NOW) == Caller("anyone", "open")


@pytest.mark.parametrize(("mode", "sent", "challenge"), [
    ("api_key", "nothing", 'Bearer realm="delta_go"'), ("api_key", "unknown key", 'Bearer realm="delta_go", error="invalid_token"'),
    ("iam", "nothing", 'Bearer realm="delta_go"'), ("iam", "another service's token", 'Bearer realm="delta_go", error="invalid_token"'),
])
def test_a_challenge_says_whether_a_credential_was_there(mode, sent, challenge):
    with pytest.raises(Problem) as caught:
        authenticate(read_settings(environment(mode, cloud=True)), "/", SENT[sent], NOW)
    assert caught.value.headers == {"WWW-Authenticate": challenge}


def test_without_a_list_everyone_the_platform_lets_through_may_ask():
    settings = read_settings(environment("iam", cloud=True, SERVICE_IAM_CALLERS=""))
    assert ask(settings, "/", SENT["stranger's token"]) == "eve@example.com"
    assert ask(settings, "/", SENT["another service's token"]) == ask(settings, "/", SENT["token with mail unverified"]) == "401"


def test_nothing_to_compare_with_lets_nobody_in():
    assert ask(ServiceSettings(auth="api_key"), "/", {"X-API-Key": MARCH}) == "401"
    assert ask(ServiceSettings(auth="iam"), "/", {"Authorization": f"Bearer {token(aud='')}"}) == "401"


# ---- keys

@pytest.mark.parametrize("presented", [MARCH, BOARD, APRIL, ALIEN, MARCH[:-1], ""])
def test_every_key_is_compared_whatever_was_found(monkeypatch, presented):
    seen = []
    monkeypatch.setattr(access, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or a == b)
    caller_of_key(read_keys(API_KEYS), presented)
    assert seen == [(32, 32)] * 3


@given(st.text(max_size=80))
def test_no_other_text_is_a_key(presented):
    assert caller_of_key(read_keys(API_KEYS), presented) == ({MARCH: "bot", APRIL: "bot", BOARD: "dashboard"}.get(presented, ""))


@pytest.mark.parametrize(("text", "words"), [
    ("", "entry 1 of 1"), (MARCH.partition(":")[0], "entry 1 of 1"), (f"bot:{MARCH[:31]}", "entry 1 of 1"), (f"bot:{MARCH},", "entry 2 of 2"),
    (f"bot:{MARCH},{BOARD}:dash", "entry 2 of 2"), (f":{MARCH}", "entry 1 of 1"), (f"bo t:{MARCH}", "entry 1 of 1"), (f"bot:{MARCH[:20]} {MARCH[20:]}", "entry 1 of 1"),
    (f"bot:{'é' * 40}", "entry 1 of 1"), (f"bot:{'k' * 257}", "entry 1 of 1"), (f"bot:{MARCH},dashboard:{MARCH}", "same key twice"),
    (f"bot:{MARCH},bot:{APRIL},bot:{BOARD}", "third key for the caller of entry 3"),
])
def test_bad_keys_are_named_by_number(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_keys(text)
    assert not any(part in str(caught.value) for part in (MARCH[:20], APRIL[:20], BOARD[:20]))


# ---- settings

def test_defaults_are_the_documented_ones():
    told = msgspec.structs.asdict(read_settings({}))
    assert {name: told[name] for name in ("port", "host", "auth", "threads", "queue", "body_seconds", "log_level", "api_keys", "k_service")} == {
        "port": 8080, "host": "127.0.0.1", "auth": "none", "threads": 2, "queue": 64, "body_seconds": 5.0, "log_level": "INFO", "api_keys": (), "k_service": ""}
    assert (told["hmm_model_dir"].as_posix(), told["trade_predictor_model"].as_posix()) == ("models", "models/trade_predictor.pkl")


def test_names_follow_the_environment():
    assert {name: field.name for name, field in VARIABLES.items()} == {name: name.removeprefix("SERVICE_").lower() for name in VARIABLES}


WRONG = {"PORT": ("0", "65536", "-1", "8080.5", "http", "0x50", " 8080 ", "٨٠٨٠", "1" * 30), "HOST": ("0.0.0.0 ", "a b", "a/b", "127.0.0.1\n", "h" * 254),
         "SERVICE_AUTH": ("None", "apikey", "none "), "SERVICE_API_KEYS": ("bot", "bot:short"), "SERVICE_IAM_AUDIENCE": ("http://x.example", "https://", "x", "https://a b"),
         "SERVICE_IAM_CALLERS": ("bot", "bot@example.com,", "a@b@c"), "SERVICE_THREADS": ("0", "65", "two"), "SERVICE_QUEUE": ("0", "10001"),
         "SERVICE_BODY_SECONDS": ("0", "nan", "inf", "61", "-1"), "K_SERVICE": ("a b", "a\nb"), "GIT_SHA": ("HEAD", "123", "g" * 40),
         "GOOGLE_CLOUD_PROJECT": ("a/b",), "LOG_LEVEL": ("info", "TRACE")}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_wrong_value_is_one_line_that_names_its_variable(name, text):
    with pytest.raises(InputError) as caught:
        read_settings({name: text})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected ") and ", got " in message and message.endswith("; correct it in the environment") and len(message.splitlines()) == 1


def test_only_paths_are_free_of_wrong_values():
    assert VARIABLES.keys() - WRONG.keys() == {"HMM_MODEL_DIR", "TRADE_PREDICTOR_MODEL"}


def test_all_faults_come_at_once():
    with pytest.raises(InputError) as caught:
        read_settings({name: texts[0] for name, texts in WRONG.items()} | {"SERVICE_THREAD": "4"})
    assert sorted(line.partition(":")[0] for line in str(caught.value).splitlines()) == sorted([*WRONG, "SERVICE_THREAD"])


@pytest.mark.parametrize(("name", "meant"), [("SERVICE_API_KEY", "SERVICE_API_KEYS"), ("SERVICE_AUHT", "SERVICE_AUTH"), ("SERVICES_AUTH", "SERVICE_AUTH"),
                                             ("service_auth", "SERVICE_AUTH"), ("HMM_MODELS_DIR", "HMM_MODEL_DIR"), ("TRADE_PREDICTOR_MODELS", "TRADE_PREDICTOR_MODEL")])
def test_a_misspelt_name_is_refused_with_the_right_one(name, meant):
    with pytest.raises(InputError, match=f"{name}: no such setting; did you mean {meant}?"):
        read_settings({name: "x"})


@pytest.mark.parametrize("name", ["SERVICE_HOST", "SERVICE_NAME", "KUBERNETES_SERVICE_HOST", "SERVICE_PORT_HTTP", "PATH", "HOME", "PORTS"])
def test_names_of_others_pass(name):
    assert read_settings({name: "x"}).port == 8080


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        read_settings({}).auth = "none"


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


@given(st.dictionaries(st.sampled_from(sorted(VARIABLES)), TEXTS))
def test_any_environment_gives_settings_or_an_input_error_that_shows_no_long_value(environ):
    try:
        read_settings(environ)
    except InputError as error:
        ours = " ".join(field.type.__metadata__[0].description for field in VARIABLES.values())
        assert not any(text in str(error) for text in environ.values() if len(text) > 20 and text not in ours)


@given(st.sampled_from(["api_key", "iam"]), st.dictionaries(st.sampled_from(["X-API-Key", "Authorization", "X-Serverless-Authorization"]),
       st.one_of(st.text(max_size=60), st.text(max_size=60).map("Bearer ".__add__), st.binary(max_size=60).map(
           lambda claims: f"Bearer e30.{base64.urlsafe_b64encode(claims).decode()}.x"))))
def test_any_header_is_a_refusal_and_nothing_worse(mode, headers):
    assert ask(read_settings(environment(mode, cloud=True)), "/metrics", headers) == "401"


@given(st.fixed_dictionaries({}, optional={name: st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9), st.lists(st.text(max_size=3)))
                                           for name in ("iss", "aud", "exp", "email", "email_verified")}).filter(bool))
def test_claims_of_any_type_are_read_or_refused(change):
    answer = ask(read_settings(environment("iam", cloud=True)), "/", {"Authorization": f"Bearer {token(**change)}"})
    assert answer in ("401", "403") or (answer == "bot@example.com" and change.keys() <= {"exp", "email_verified"})


# ---- secrets

def test_settings_show_no_key():
    settings = read_settings(environment("api_key"))
    shown = f"{settings} {settings!r} {msgspec.structs.asdict(settings)}"
    assert not any(key in shown for key in (MARCH, APRIL, BOARD)) and shown.count("Secret(***)") == 9
    with pytest.raises(TypeError):
        msgspec.json.encode(settings)
    with pytest.raises(TypeError):
        json.dumps(settings.api_keys[0].key)
    assert [entry.key.reveal() for entry in settings.api_keys] == [MARCH, BOARD, APRIL]


@pytest.mark.parametrize("name", sorted(set(VARIABLES) - {"HMM_MODEL_DIR", "TRADE_PREDICTOR_MODEL"}))
def test_a_key_in_the_wrong_variable_is_not_shown(name):
    planted = f"/{MARCH}/"
    try:
        read_settings({name: planted})
    except InputError as error:
        story = "".join(traceback.format_exception(error)) + repr(error)
        assert MARCH not in story and error.__context__ is None and error.__cause__ is None
    else:
        pytest.fail("expected a refusal")


def test_this_room_writes_no_log(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for mode in ("api_key", "iam"):
        for headers in SENT.values():
            ask(read_settings(environment(mode, cloud=True)), "/metrics", headers)
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_secret_has_no_attributes_to_list():
    with pytest.raises(TypeError):
        vars(Secret(MARCH))
    assert MARCH not in f"{Secret(MARCH)} {[Secret(MARCH)]} {Secret(MARCH)!s:>60}"


def test_nothing_heavy_comes_along():
    code = "import sys, delta_go.serving.access; print([name for name in ('pydantic', 'pydantic_settings', 'flask', 'pandas', 'prometheus_client') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
