"""A cloud on the disk that answers as gcloud does, records every call, and fails where a script says so.

In process: `Cloud(folder).call(words)`. First on PATH: `install(folder)` writes a command `gcloud` that does the same.
The script (script.json) maps the number of a call, from 1, or "N+" for all from it on, to one of KINDS.
"""
from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

KINDS = ("fail before", "fail after", "bad json", "empty", "hang before", "hang after", "kill before", "kill after")
DIGEST = "sha256:" + "ab" * 32
OLD_BOT = "us-central1-docker.pkg.dev/delta-go-staging/delta-go/bot@sha256:" + "11" * 32


class Failed(Exception):
    """The call ends with 1; its text is the complaint."""


class Cloud:
    """Services with revisions, traffic, tags and policies, and the bot's machine."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "cloud.json"

    def create(self, services: dict[str, dict[str, int]], addresses: dict[str, str] | None = None, candidates: dict[str, str] | None = None) -> Cloud:
        """Begin with these shares by service; addresses of services, and of the revisions that are going to be deployed."""
        named = addresses or {}
        state = {"calls": 0, "made": 0, "addresses": named, "candidates": candidates or {}, "errors": [], "bot": {"image": OLD_BOT, "running": True, "sick": []}, "services": {}}
        for name, shares in services.items():
            revisions = {revision: named.get(f"{name}/stable", "") for revision in shares}
            state["services"][name] = {"traffic": shares, "tags": {}, "revisions": revisions, "policy": ["serviceAccount:bot@delta-go-staging.iam.gserviceaccount.com"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(state)
        return self

    def read(self) -> dict:
        """The state."""
        return json.loads(self.path.read_text())

    def write(self, state: dict) -> None:
        """Replace the state as a whole: a proxy reads it at any time."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(state))
        os.replace(new, self.path)

    def calls(self) -> list[list[str]]:
        """Words of all calls so far."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def kind(self, number: int) -> str:
        """What the script says about a call."""
        script = self.folder / "script.json"
        for key, kind in (json.loads(script.read_text()) if script.exists() else {}).items():
            if (key.endswith("+") and number >= int(key[:-1])) or key == str(number):
                return kind
        return ""

    def call(self, words: Sequence[str]) -> str:
        """Answer one call; in process a hang is a `TimeoutError` and a kill a `SystemExit`."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(self.folder / "calls.jsonl", "a") as log:
                log.write(json.dumps(list(words)) + "\n")
            state = self.read()
            state["calls"] += 1
            kind = self.kind(state["calls"])
            if kind.endswith("before"):
                self.write(state)
                self.suffer(kind)
            answer = answer_of(state, list(words))
            self.write(state)
        if kind.endswith("after"):
            self.suffer(kind)
        return {"bad json": answer[:len(answer) // 2] + "<html>", "empty": ""}.get(kind, answer)

    def suffer(self, kind: str) -> None:
        """What a script does to the caller."""
        if kind.startswith("fail"):
            raise Failed("ERROR: (gcloud) the service is currently unavailable")
        raise TimeoutError("hangs") if kind.startswith("hang") else SystemExit(137)


def option(words: list[str], name: str, default: str | None = None) -> str:
    """The value of --name=value."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    if not found and default is None:
        raise Failed(f"ERROR: argument --{name}: Must be specified.")
    return found[-1] if found else default or ""


def pairs(text: str) -> dict[str, str]:
    """a=1,b=2 as a dict."""
    return dict(pair.split("=") for pair in text.split(",")) if text else {}


def describe(state: dict, name: str) -> dict:
    """A service as `services list` shows it."""
    service, main = state["services"][name], state["addresses"].get(name, f"https://{name}.example")
    traffic = [{"revisionName": revision, "percent": share} for revision, share in service["traffic"].items()]
    for tag, revision in service["tags"].items():
        traffic.append({"revisionName": revision, "tag": tag, "url": service["revisions"][revision] or f"https://{tag}---{name}.example"})
    return {"metadata": {"name": name, "labels": {"app": "delta-go", **service.get("labels", {})}}, "spec": {"template": {"spec": {"containers": [{"image": service.get("image", "")}]}}}, "status": {"url": main, "traffic": traffic}}


def deploy(state: dict, name: str, words: list[str]) -> str:
    """A new revision, tagged."""
    state["made"] += 1
    revision = f"{name}-new{state['made']}"
    first = name not in state["services"]
    if first and "--no-traffic" in words:
        raise Failed("ERROR: (gcloud.run.deploy) --no-traffic not supported when creating a new service.")
    service = state["services"].setdefault(name, {"traffic": {}, "tags": {}, "revisions": {}, "policy": []})
    service["revisions"][revision] = state["candidates"].get(name, "")
    if first or "--no-traffic" not in words:
        service["traffic"] = {revision: 100}
    service["tags"][option(words, "tag")] = revision
    service["image"] = option(words, "image")
    service["policy"] += ["allUsers"] * ("--no-allow-unauthenticated" not in words)
    return json.dumps(describe(state, name))


def update_traffic(state: dict, name: str, words: list[str]) -> str:
    """Shares and tags, both at once or neither."""
    if name not in state["services"]:
        raise Failed(f"ERROR: Service [{name}] could not be found.")
    service = state["services"][name]
    shares = {revision: int(share) for revision, share in pairs(option(words, "to-revisions")).items()}
    tags = {} if "--clear-tags" in words else pairs(option(words, "set-tags"))
    if sum(shares.values()) != 100 or {*shares, *tags.values()} - set(service["revisions"]):
        raise Failed(f"ERROR: traffic: no such split of {name}: {shares} {tags}")
    service["traffic"], service["tags"] = shares, tags
    return json.dumps(describe(state, name))


def machine(state: dict, words: list[str]) -> str:
    """The bot's machine, which knows what deploy/bot/commands.json tells it."""
    assert "--tunnel-through-iap" in words
    told, bot = option(words, "command"), state["bot"]
    if "sed -n" in told:
        return bot["image"] + "\n"
    if "docker pull" in told:
        return ""
    if "systemctl stop" in told:
        bot["running"] = False
    elif "systemctl start" in told:
        bot["image"], bot["running"] = told.split()[2], True
    elif "/health/ready" in told and (not bot["running"] or bot["image"] in bot["sick"]):
        raise Failed("curl: (22) The requested URL returned error: 503")
    return ""


def answer_of(state: dict, words: list[str]) -> str:
    """What gcloud prints, and what it does."""
    match words:
        case ["run", "services", "list", *_]:
            return json.dumps([describe(state, name) for name in state["services"]])
        case ["run", "services", "get-iam-policy", name, *_]:
            return json.dumps({"bindings": [{"role": "roles/run.invoker", "members": state["services"][name]["policy"]}]})
        case ["run", "services", "update-traffic", name, *_]:
            return update_traffic(state, name, words)
        case ["run", "services", "delete", name, *_]:
            del state["services"][name]
            return ""
        case ["run", "deploy", name, *_]:
            return deploy(state, name, words)
        case ["builds", "submit", *_]:
            return json.dumps({"status": "SUCCESS"})
        case ["artifacts", "docker", "images", "describe", image, *_]:
            return json.dumps({"image_summary": {"digest": DIGEST, "fully_qualified_digest": image}})
        case ["logging", "read", *_]:
            return json.dumps(state["errors"])
        case ["compute", "ssh", "bot", *_]:
            return machine(state, words)
        case ["auth", "print-identity-token", *_]:
            return "e30.e30.e30\n"
    raise Failed(f"ERROR: (gcloud) Invalid choice: {words[:3]}")


def install(folder: Path) -> Path:
    """A command gcloud over the cloud in this folder; the folder to put first on PATH."""
    place = folder / "bin"
    place.mkdir(parents=True, exist_ok=True)
    command = place / "gcloud"
    command.write_text(f"#!{sys.executable} -ISE\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom fake_gcloud import main\nmain({str(folder)!r})\n")
    command.chmod(0o755)
    return place


def main(folder: str) -> None:
    """One call from the command line; a script's kill hits the process that called."""
    try:
        sys.stdout.write(Cloud(Path(folder)).call(sys.argv[1:]))
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except TimeoutError:
        time.sleep(600)
    except SystemExit:
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit(1)
