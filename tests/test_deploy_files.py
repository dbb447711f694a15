"""What is in deploy/ keeps the rules of `delta-go verify`, and what no rule about files can say: a closed schema, imports, secrets that are fetched, alarms that fire."""
import base64
import copy
import importlib.metadata
import json
import logging
import math
import operator
import os
import re
import runpy
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import msgspec
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families

from delta_go.arrangement import command_of, instructions, pins
from delta_go.live.bot import DRAIN
from delta_go.live.status import Account, Holding, ServiceView, Sight, Status, metrics_text
from delta_go.ops.verify import RULES, facts_of
from delta_go.serving.access import OPEN_PATHS, read_settings
from delta_go.serving.predict_trade import create_app
from delta_go.serving.server import GRACE
from delta_go.serving.telemetry import JsonFormatter

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SERVICES = ("hmm-detector", "trade-predictor")
PARTS = (*SERVICES, "bot")
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(DEPLOY.glob("*.*.yaml"))}
VALIDATOR = jsonschema.Draft202012Validator(json.loads((DEPLOY / "schema/service.json").read_text()))
ALERTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "alerts").glob("*.yaml"))}
LOG_METRICS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "alerts/log-metrics").glob("*.yaml"))}
FACTS = facts_of(ROOT)
OWNERS = importlib.metadata.packages_distributions()


# Rules


@pytest.mark.parametrize("group, name", [(group, name) for group, named in RULES.items() for name in named])
def test_rule_is_kept(group, name):
    """Each rule that `delta-go verify` has about files."""
    assert not [*RULES[group][name](FACTS)]


# Manifests


@pytest.mark.parametrize("file", MANIFESTS)
def test_service_has_time_to_end(file):
    """The platform waits longer for an answer than a service needs for its last ones, and asks where anybody may."""
    spec = MANIFESTS[file]["spec"]["template"]["spec"]
    assert GRACE < spec["timeoutSeconds"] <= 10
    assert {spec["containers"][0][f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness")} <= OPEN_PATHS


def set_at(manifest: dict, path: str, value) -> None:
    *way, last = [int(part) if part.isdigit() else part for part in path.split(" ")]
    for part in way:
        manifest = manifest[part]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


BOX, NOTES = "spec template spec containers 0", "spec template metadata annotations"
SPOILT = [
    (f"{BOX} startupProbe", None), (f"{BOX} livenessProbe", None), (f"{BOX} livenessProbe httpGet path", "/healthz"), (f"{BOX} livenessProbe timeoutSecond", 2),
    (f"{BOX} resources", None), (f"{BOX} resources limits memory", "128Mi"), (f"{BOX} ports 0 containerPort", 5000), (f"{BOX} command", ["flask", "--debug"]),
    (f"{BOX} image", "us-central1-docker.pkg.dev/PROJECT_ID/delta-go/hmm-detector:latest"), (f"{BOX} image", "docker.io/someone/hmm-detector:GIT_SHA"),
    (f"{BOX} env 0", {"name": "SERVICE_API_KEYS", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "latest"}}}),
    (f"{BOX} env 0", {"name": "SERVICE_API_KEYS", "value": "me:written-where-everybody-reads-it-000"}), (f"{BOX} env 0", {"name": "PORT", "value": "8080"}),
    (f"{BOX} env 0", {"name": "FLASK_DEBUG", "value": 1}),
    (f"{NOTES} autoscaling.knative.dev~minScale", None), (f"{NOTES} autoscaling.knative.dev~minScale", "0"), (f"{NOTES} autoscaling.knative.dev~maxScale", "1000"),
    (f"{NOTES} run.googleapis.com~startup-cpu-boost", "false"), (f"{NOTES} run.googleapis.com~cpu-throttling", None), (f"{NOTES} autoscaling.knative.dev~minscale", "1"),
    ("metadata annotations run.googleapis.com~invoker-iam-disabled", "true"), ("metadata annotations run.googleapis.com~ingress", "everyone"),
    ("metadata name", "hmm_detector"), ("metadata labels cloud.googleapis.com~location", "europe-west1"),
    ("spec template spec serviceAccountName", None), ("spec template spec serviceAccountName", "1234-compute@developer.gserviceaccount.com"),
    ("spec template spec containerConcurrency", None), ("spec template spec timeoutSecond", 10), ("spec template spec timeoutSeconds", 3600), ("spec templates", {}),
]


@pytest.mark.parametrize("path, value", SPOILT)
def test_schema_refuses(path, value):
    """A missing probe, a misspelt key, a secret that moves, an open door: each is caught."""
    manifest = copy.deepcopy(MANIFESTS["hmm-detector.production.yaml"])
    set_at(manifest, path.replace("~", "/"), value)
    assert list(VALIDATOR.iter_errors(manifest))


# Images


@pytest.mark.parametrize("name", PARTS)
def test_dockerfile(name):
    """The program, the port it says, the signal it hears, and nothing that does not belong into an image."""
    steps = instructions(text := (DEPLOY / name / "Dockerfile").read_text())
    assert command_of(text)[2].endswith("delta-go bot" if name == "bot" else f"delta-go-serve {name}")
    assert ("EXPOSE", "8095" if name == "bot" else "8080") in steps and ("STOPSIGNAL", "SIGTERM") in steps
    assert not re.search(r"curl|wget|apt-get|ADD |--privileged|KEY=|SECRET=", text, re.I)


def test_nothing_needed_is_left_to_chance():
    """All that a pin needs is pinned too."""
    for path, roots in (("serving-requirements.txt", {"numpy", "flask", "msgspec", "gunicorn", "prometheus-client"}), ("bot/requirements.txt", {"numpy", "httpx", "websockets", "typer", "pydantic-settings", "apprise", "aiohttp"})):
        found = pins((DEPLOY / path).read_text())
        assert roots <= set(found)
        for name in found:
            needs = [Requirement(words) for words in importlib.metadata.requires(name) or []]
            missing = {need.name for need in needs if (need.marker is None or need.marker.evaluate({"extra": ""})) and canonicalize_name(need.name) not in found}
            assert not missing, f"{path}: {name} needs {missing}"


def imported(*modules: str) -> set[str]:
    """The distributions whose files are loaded when modules are."""
    script = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*{m.__file__ for m in sys.modules.values() if 'site-packages' in (getattr(m, '__file__', '') or '')}, sep='\\n')"
    files = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, check=True).stdout.splitlines()
    return {re.split(r"[/.]", file.split("site-packages/")[1])[0] for file in files}


@pytest.mark.parametrize("path, modules", [
    ("serving-requirements.txt", ["delta_go.serving.server", "delta_go.serving.detect_regime", "delta_go.serving.predict_trade"]),
    ("bot/requirements.txt", ["delta_go.cli", "delta_go.live.launch", "delta_go.live.paper", "delta_go.live.dashboard", "delta_go.live.notify", "apprise"])])
def test_requirements_hold_what_is_imported(path, modules):
    """Nothing is loaded that the image lacks; what a workbench adds to a library by being there is no need."""
    found, loaded = pins((DEPLOY / path).read_text()), {canonicalize_name(owner) for name in imported(*modules) for owner in OWNERS.get(name, [])} - {"delta-go", "setuptools"}
    optional = {"aiodns", "pycares", "cffi", "cryptography", "pillow"} | ({"typing-extensions"} - set(found))
    assert loaded - optional <= set(found)


def test_functions():
    """Both are pinned alike, and the entry points are the services' own."""
    for name, target in zip(SERVICES, ("detect_regime", "predict_trade")):
        before = dict(os.environ)
        try:
            assert callable(runpy.run_path(str(DEPLOY / f"functions/{name}/main.py"))[target])
        finally:
            os.environ.clear()
            os.environ.update(before)
    assert (DEPLOY / "functions/hmm-detector/requirements.txt").read_text() == (DEPLOY / "functions/trade-predictor/requirements.txt").read_text()


# Secrets


class Cloud(BaseHTTPRequestHandler):
    """A metadata server and a Secret Manager."""
    secrets = {"projects/p/secrets/key/versions/3": 'a"b\\c$d`e', "projects/p/secrets/torn/versions/1": "two\nlines"}

    def do_GET(self):
        name = self.path.removeprefix("/v1/").removesuffix(":access")
        if self.path.startswith("/computeMetadata/") and self.headers["Metadata-Flavor"] == "Google":
            body = {"access_token": "token-1"}
        elif self.headers["Authorization"] == "Bearer token-1" and name in self.secrets:
            body = {"payload": {"data": base64.b64encode(self.secrets[name].encode()).decode()}}
        else:
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *words):
        pass


@pytest.mark.parametrize("conf, words", [
    ("# none\n", ""), ("A=projects/p/secrets/key/versions/3\n", 'A="a\\"b\\\\c\\$d\\`e"\n'), ("A=projects/p/secrets/key/versions/latest\n", None), ("A=plain\n", None),
    ("A=projects/p/secrets/gone/versions/1\n", None), ("A=projects/p/secrets/torn/versions/1\n", None), ("A=projects/p/secrets/key/versions/3\n" * 2, None)])
def test_secrets_are_fetched_by_number(tmp_path, conf, words):
    """All of them, readable by their owner alone; or nothing, said without showing any."""
    server = HTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"127.0.0.1:{server.server_port}"
    (tmp_path / "secrets.conf").write_text(conf)
    target = tmp_path / "secrets.env"
    done = subprocess.run([sys.executable, DEPLOY / "bot/fetch_secrets.py", tmp_path / "secrets.conf", target], capture_output=True, text=True,
                          env={"GCE_METADATA_HOST": here, "SECRET_MANAGER_URL": f"http://{here}"})
    server.shutdown()
    server.server_close()
    if words is None:
        assert done.returncode == 1 and not target.exists() and len(done.stderr.splitlines()) == 1 and "two" not in done.stderr
    else:
        assert done.returncode == 0 and target.read_text() == words and stat.S_IMODE(target.stat().st_mode) == 0o400, done.stderr


# The bot's machine


def unit() -> dict[str, list[str]]:
    lines = re.sub(r"\\\n\s*", "", (DEPLOY / "bot/delta-go-bot.service").read_text()).splitlines()
    found: dict[str, list[str]] = {}
    for key, _, value in (line.partition("=") for line in lines if "=" in line and not line.startswith("#")):
        found.setdefault(key, []).append(value)
    return found


def test_unit():
    """It always starts again, drains before it ends, and gives its container nothing it does not need."""
    said = unit()
    assert said["Restart"] == ["always"] and said["RestartPreventExitStatus"] == ["2"] and said["StartLimitIntervalSec"] == ["0"] and said["KillSignal"] == ["SIGTERM"] and said["StateDirectory"] == ["delta-go"]
    patience = int(re.search(r"stop -t (\d+)", said["ExecStop"][0])[1])
    assert DRAIN + 6 < patience < int(said["TimeoutStopSec"][0])
    [start] = said["ExecStart"]
    assert f"--stop-timeout {patience}" in start
    files = said["EnvironmentFile"]
    assert "/etc/delta-go/image.env" in files and "-/run/delta-go/secrets.env" in files
    assert all(said[name] == ["yes"] for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelModules", "RestrictSUIDSGID")) and said["ProtectSystem"] == ["strict"]
    conf = (DEPLOY / "bot/secrets.conf").read_text()
    assert set(re.findall(r"--env ([A-Z_]+)", start)) == set(re.findall(r"^# ([A-Z_]+)=projects/PROJECT_ID/secrets/[a-z-]+/versions/\d+$", conf, re.M))


def test_bots_settings_are_settings():
    """bot.env and the image name variables that the bot reads."""
    from delta_go.config import VARIABLES
    named = re.findall(r"^#?([A-Z_]+)=", (DEPLOY / "bot/bot.env").read_text(), re.M)
    assert set(named) <= set(VARIABLES.values()) and "DELTA_STATUS_PORT" in named
    [target] = yaml.safe_load((DEPLOY / "bot/ops-agent.yaml").read_text())["metrics"]["receivers"]["bot"]["config"]["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "127.0.0.1:8095"


# Alarms


HELD = Holding("BTCUSD", "buy", 3, 60_000.0, 1_700_000_000, 60_100.0, 0.3, 59_000.0, 62_000.0, 59_000.0, 62_000.0)
WELL = Status("live", "RUNNING", 1_700_000_000, 1_700_000_000.0, 1_699_000_000.0, 7, 1, "0.1.0", {}, "trade", ["BTCUSD"], "1h", 1_699_999_200, 1_700_002_800,
              account=Account(10_000.0, 10_000.0, 10_000.0, "", 0.05, 0.1), holdings=[HELD], services=[ServiceView("hmm-detector", "https://x", "closed", "")], streams={"public": "live", "private": "live"}, quota=0.1)
Numbers = dict[str, list[tuple[dict[str, str], float]]]


def numbers(status: Status | None, age: float = 1.0, kill: str | None = None, journal: str = "") -> Numbers:
    """The page of a bot as a scraper reads it."""
    text, found = metrics_text(Sight(status, "", age, kill), journal)[0].decode(), {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


TERM = re.compile(r'(absent\()?([a-z_]+)(?:\{([a-z_]+)="([^"]*)"\})?\)?(?: (>|==|<) ([0-9.]+))?')
COMPARE = {">": operator.gt, "<": operator.lt, "==": operator.eq}


def fires(query: str, page: Numbers) -> bool:
    """The few words of PromQL that our alarms use."""
    for part in query.split(" and on() "):
        absent, name, label, value, sign, bound = TERM.fullmatch(part).groups()
        values = [number for labels, number in page.get(name, []) if not label or labels.get(label) == value]
        if not (not values if absent else any(COMPARE[sign](number, float(bound)) for number in values if not math.isnan(number))):
            return False
    return True


def changed(**more) -> Numbers:
    return numbers(msgspec.structs.replace(WELL, **more))


TROUBLE = {
    "bot-silent": lambda: numbers(WELL, age=90), "bot-gone": lambda: {}, "bot-naked-position": lambda: changed(holdings=[msgspec.structs.replace(HELD, stop=None)]),
    "bot-doubtful-order": lambda: changed(doubtful=["dg-1"]), "bot-halted": lambda: changed(state="HALTED", halted="kill switch"), "bot-halt-not-obeyed": lambda: numbers(WELL, kill="somebody"),
    "bot-degraded": lambda: changed(state="DEGRADED"), "bot-daily-loss": lambda: changed(account=Account(9_550.0, 10_000.0, 10_000.0, "", 0.05, 0.1)),
    "bot-drawdown": lambda: changed(account=Account(9_100.0, 9_100.0, 10_000.0, "", 0.05, 0.1)), "bot-quota": lambda: changed(quota=0.9),
    "bot-breaker-open": lambda: changed(services=[ServiceView("hmm-detector", "https://x", "open", "no answer")]), "bot-stream-down": lambda: changed(streams={"public": "live", "private": "waiting"}),
    "bot-journal": lambda: numbers(WELL, journal="row 7 does not follow"),
}
QUERIES = {name: alert["conditions"][0]["conditionPrometheusQueryLanguage"]["query"] for name, alert in ALERTS.items() if "conditionPrometheusQueryLanguage" in alert["conditions"][0]}


@pytest.mark.parametrize("name", TROUBLE)
def test_alarm_fires_on_its_trouble_alone(name):
    """It is quiet while all is well, and rings for what it is about."""
    assert not fires(QUERIES[name], numbers(WELL)) and fires(QUERIES[name], TROUBLE[name]())


def test_every_alarm_has_a_trouble_and_a_metric():
    """No alarm names a number that nobody writes."""
    assert set(QUERIES) == set(TROUBLE)
    filters = {name: alert["conditions"][0]["conditionThreshold"]["filter"] for name, alert in ALERTS.items() if name not in QUERIES}
    named = {re.search(r'metric\.type="logging\.googleapis\.com/user/([a-z-]+)"', words)[1] for words in filters.values()}
    assert named == set(LOG_METRICS) == {metric["name"] for metric in LOG_METRICS.values()}


@pytest.mark.parametrize("name", ALERTS)
def test_alarm_says_what_to_do(name):
    alert = ALERTS[name]
    assert set(alert) == {"displayName", "severity", "combiner", "enabled", "conditions", "alertStrategy", "documentation"} and alert["enabled"] is True
    assert alert["severity"] in ("CRITICAL", "ERROR", "WARNING") and len(alert["documentation"]["content"]) > 80
    condition = alert["conditions"][0].get("conditionPrometheusQueryLanguage") or alert["conditions"][0]["conditionThreshold"]
    assert int(condition["duration"].removesuffix("s")) % 60 == 0
    if aggregation := condition.get("aggregations"):
        metric = LOG_METRICS[re.search(r"user/([a-z-]+)", condition["filter"])[1]]
        labels = {label["key"] for label in metric["metricDescriptor"].get("labels", [])}
        assert labels == set(metric.get("labelExtractors", {})) and {field.removeprefix("metric.label.") for field in aggregation[0].get("groupByFields", [])} <= labels
        assert (aggregation[0]["perSeriesAligner"] == "ALIGN_DELTA") == (metric["metricDescriptor"]["valueType"] == "INT64")


HOLDS = {"=": lambda value, text: str(value) == text, "=~": lambda value, text: re.search(text, str(value)) is not None,
         ">=": lambda value, text: float(value) >= float(text), "<=": lambda value, text: float(value) <= float(text)}


def matches(words: str, entry: dict) -> bool:
    """The few words of Cloud Logging's language that our metrics use."""
    for part in words.split(" AND "):
        field, sign, text = re.fullmatch(r'([A-Za-z_.]+)(>=|<=|=~|=)"?(.*?)"?', part.strip()).groups()
        value: object = entry
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return False
        if not HOLDS[sign](value, text):
            return False
    return True


@pytest.fixture(scope="module")
def log_lines():
    """What a service really writes: an answer, a stranger, a refusal of models, answers without them."""
    lines: list[dict] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append({"resource": {"type": "cloud_run_revision", "labels": {"service_name": "trade-predictor"}}, "jsonPayload": json.loads(self.format(record))})

    handler, logger = Keep(), logging.getLogger("delta_go.serving")
    handler.setFormatter(JsonFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for models in ("models/trade_predictor.pkl", "deploy/none.pkl"):
            key = "a-key-for-this-test-0123456789abcdef"
            client = create_app(read_settings({"TRADE_PREDICTOR_MODEL": str(ROOT / models), "SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"me:{key}"})).test_client()
            client.post("/", json={"rsi": 50}, headers={"X-API-Key": key})
            client.post("/", json={"rsi": 50})
            client.get("/health/live")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines


@pytest.mark.parametrize("name, count", [("delta-go-service-errors", 1), ("delta-go-service-seconds", 4), ("delta-go-service-strangers", 2), ("delta-go-models-refused", 1), ("delta-go-bot-restarts", 0)])
def test_log_metric_counts_what_it_says(name, count, log_lines):
    """The filter picks the right lines of a real service, and each label is in them."""
    metric = LOG_METRICS[name]
    found = [line for line in log_lines if matches(metric["filter"], line)]
    assert len(found) == count
    for line in found:
        for extractor in [*metric.get("labelExtractors", {}).values(), *([metric["valueExtractor"]] if "valueExtractor" in metric else [])]:
            value: object = line
            for key in extractor.removeprefix("EXTRACT(").removesuffix(")").split("."):
                value = value[key]
            assert value is not None


def test_restarts_of_the_bot_are_counted():
    """As systemd writes them."""
    words = LOG_METRICS["delta-go-bot-restarts"]["filter"]
    entry = {"resource": {"type": "gce_instance"}, "jsonPayload": {"UNIT": "delta-go-bot.service", "MESSAGE": "delta-go-bot.service: Scheduled restart job, restart counter is at 2."}}
    assert matches(words, entry) and not matches(words, {**entry, "jsonPayload": {"UNIT": "ssh.service", "MESSAGE": "Scheduled restart job"}})


# Commands


def test_network_note_opens_one_door():
    """ssh through Identity-Aware Proxy, and nothing else from outside."""
    text = (DEPLOY / "network.md").read_text()
    commands = [line.split(" #")[0] for line in text.splitlines() if line.startswith("gcloud ")]
    rules = [line for line in commands if "firewall-rules create" in line]
    assert len(rules) == 1 and "--allow tcp:22 " in rules[0] and "--source-ranges 35.235.240.0/20" in rules[0]
    assert "0.0.0.0/0" not in text and any("--address bot" in line and "--machine-type e2-micro" in line for line in commands)
