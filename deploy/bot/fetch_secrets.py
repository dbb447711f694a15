"""Read the bot's secrets from Secret Manager, by number, into a file that systemd gives to the bot.

    fetch_secrets.py secrets.conf secrets.env

Runs before each start, with nothing but Python. Whatever fails, nothing is written and the exit code is 1: systemd tries again.
"""
import base64
import json
import os
import re
import sys
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

METADATA = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
SECRETS = os.environ.get("SECRET_MANAGER_URL", "https://secretmanager.googleapis.com")
TOKEN = "computeMetadata/v1/instance/service-accounts/default/token"
LINE = re.compile(r"([A-Z][A-Z_]*)=(projects/[a-z0-9-]+/secrets/[A-Za-z0-9_-]+/versions/[1-9][0-9]*)")


def wanted(text: str) -> dict[str, str]:
    """Resource by variable; ValueError for a line that is neither empty, a comment, nor a numbered version."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if not match:
            raise ValueError(f"line {number}: expected NAME=projects/P/secrets/S/versions/NUMBER; `latest` is not a number")
        if match[1] in found:
            raise ValueError(f"line {number}: {match[1]} stands here twice")
        found[match[1]] = match[2]
    return found


def fetch(url: str, headers: dict[str, str]) -> dict:
    """A JSON object, within ten seconds; no proxy sees it."""
    with build_opener(ProxyHandler({})).open(Request(url, headers=headers), timeout=10) as reply:
        return json.load(reply)


def quoted(name: str, value: str) -> str:
    """A line of a systemd environment file; ValueError for what such a line cannot hold."""
    if not value or not value.isprintable():
        raise ValueError(f"{name}: expected a secret of one line of visible characters; was it stored with a newline at its end?")
    return f'{name}="' + re.sub(r'([\\"`$])', r"\\\1", value) + '"\n'


def main(source: str, target: str) -> None:
    """Read, then write once, for the owner's eyes only."""
    resources, lines = wanted(Path(source).read_text("utf-8")), ""
    if resources:
        token = fetch(f"http://{METADATA}/{TOKEN}", {"Metadata-Flavor": "Google"})["access_token"]
    for name, resource in resources.items():
        reply = fetch(f"{SECRETS}/v1/{resource}:access", {"Authorization": f"Bearer {token}"})
        lines += quoted(name, base64.b64decode(reply["payload"]["data"]).decode("utf-8"))
    Path(target).unlink(missing_ok=True)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w", encoding="utf-8") as file:
        file.write(lines)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except Exception as error:  # no traceback: its lines could hold what must not be seen
        sys.exit(f"fetch_secrets: {type(error).__name__}: {error}")
