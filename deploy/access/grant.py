"""Print the commands that make the accounts of a project and give each what roles.json says, and nothing else.

    python3 deploy/access/grant.py PROJECT NUMBER IMAGES | sh -e

NUMBER is the project's, IMAGES the project that builds and holds the images: staging itself, also for production.
What is there already is left as it is, so it may be done again.
"""
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

PLACE = "--location=us-central1"


def made(thing: str, name: str, look: list[str], *options: str) -> str:
    """A thing that is made unless a look finds it."""
    return f"gcloud {thing} describe {shlex.join(look)} >/dev/null 2>&1 || gcloud {thing} create {shlex.join([name, *options])} --quiet"


def bound(thing: str, name: str, role: str, member: str, *options: str) -> str:
    """A role on a thing."""
    return f"gcloud {thing} add-iam-policy-binding {shlex.join([name, f'--role={role}', f'--member=serviceAccount:{member}', *options])} --quiet --format=none"


def granted(rights: dict, member: str, project: str, images: str) -> Iterator[str]:
    """What one account gets."""
    here, there = f"--project={project}", f"--project={images}"
    for role in rights.get("project", []) + rights.get("services", []):  # the services come later than who calls them
        yield bound("projects", project, role, member, "--condition=None")
    for role in rights.get("images", []):
        yield bound("artifacts repositories", "delta-go", role, member, PLACE, there)
    for role in rights.get("sources", []):
        yield bound("storage buckets", f"gs://{images}_cloudbuild", role, member, there)
    for role, names in rights.get("secrets", {}).items():
        for name in names:
            yield made("secrets", name, [name, here], here, "--replication-policy=automatic")
            yield bound("secrets", name, role, member, here)
    for role, names in rights.get("accounts", {}).items():
        for name in names:
            yield bound("iam service-accounts", f"{name}@{project}.iam.gserviceaccount.com", role, member, here)


def commands(roles: dict[str, dict], project: str, number: str, images: str) -> Iterator[str]:
    """All of them, in an order in which they work."""
    here, mail = f"--project={project}", f"{{}}@{project}.iam.gserviceaccount.com"
    builds, staging = roles["deployer"]["builds"], project == images
    accounts = {**roles, **(builds["as"] if staging else {})}
    if staging:
        bucket = f"gs://{project}_cloudbuild"
        yield made("artifacts repositories", "delta-go", ["delta-go", PLACE, here], PLACE, here, "--repository-format=docker")
        yield made("storage buckets", bucket, [bucket], PLACE, here, "--uniform-bucket-level-access", "--public-access-prevention")
    for name in accounts:
        yield made("iam service-accounts", name, [mail.format(name), here], here)
    for name, rights in accounts.items():
        yield from granted(rights, mail.format(name), project, images)
    if staging:
        yield from granted({**builds, "accounts": {"roles/iam.serviceAccountUser": list(builds["as"])}}, mail.format("deployer"), project, images)
    else:  # who starts the services' images pulls them from another project
        yield f"gcloud beta services identity create --service=run.googleapis.com {here} --quiet"
        yield from granted({"images": ["roles/artifactregistry.reader"]}, f"service-{number}@serverless-robot-prod.iam.gserviceaccount.com", project, images)


if __name__ == "__main__":
    if not re.fullmatch(r"[a-z][a-z0-9-]{4,28}[a-z0-9] [0-9]+ [a-z][a-z0-9-]{4,28}[a-z0-9]", " ".join(sys.argv[1:])):
        sys.exit("grant: expected PROJECT NUMBER IMAGES, such as my-production 123456789012 my-staging")
    print(*commands(json.loads(Path(__file__).with_name("roles.json").read_text("utf-8")), *sys.argv[1:]), sep="\n")
