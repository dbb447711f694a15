"""A container engine from Debian's packages: images are built and run without a daemon, each run with nothing it does not need."""
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
STORE = Path(os.environ.get("DELTA_CONTAINER_STORE", ROOT / "build/containers"))
TOOLS = ("buildah", "podman", "runc")
BASE = "docker.io/library/python:3.11-slim"
TIGHT = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=512m", "--pids-limit=128")


@cache
def engine_fault() -> str:
    """Why there can be no engine here, empty if there is one; installs it where that is allowed."""
    if os.geteuid() != 0:
        return "images are built as root: sudo make ci, or sudo .venv/bin/pytest tests/test_containers.py"
    missing = [tool for tool in (*TOOLS, "mmdebstrap") if not shutil.which(tool)]
    if missing and shutil.which("apt-get"):
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", *words], capture_output=True, text=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if still := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"no {', '.join(still)} here, and no apt-get that has them" + (f": {done.stderr.strip()[-200:]}" if missing and shutil.which("apt-get") else "")
    return ""


def run(*words: str, seconds: float = 900.0, merged: bool = False, **more) -> str:
    """The output of a command, with what it said on the error stream if merged; its error in full where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env={**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}, **more)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return (done.stdout + done.stderr * merged).strip()


def buildah(*words: str, **more) -> str:
    return run("buildah", "--root", str(STORE / "storage"), "--runroot", str(STORE / "run"), *words, **more)


def podman(*words: str, **more) -> str:
    return run("podman", "--root", str(STORE / "storage"), "--runroot", str(STORE / "run"), "--runtime", str(shutil.which("runc")), "--cgroup-manager=cgroupfs", *words, **more)


def has_image(name: str) -> bool:
    return f"{name}" in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()


@cache
def prepare_base() -> str:
    """Which base there is: the real python:3.11-slim where it can be had, else Debian 12 with its own Python 3.11 under that name."""
    STORE.mkdir(parents=True, exist_ok=True)
    if has_image(BASE):
        return "as before"
    try:
        buildah("pull", "--retry=0", BASE, seconds=300)
        return "pulled"
    except (AssertionError, subprocess.TimeoutExpired):
        pass
    archive = STORE / "base.tar"
    hooks = ['rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED', 'ln -s /usr/bin/python3 "$1"/usr/local/bin/python', 'ln -s /usr/bin/pip3 "$1"/usr/local/bin/pip',
             'cp /usr/local/share/ca-certificates/*.crt "$1"/usr/local/share/ca-certificates/ 2>/dev/null; chroot "$1" update-ca-certificates >/dev/null 2>&1 || true']
    run("mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,python3,python3-pip,python3-venv",
        *(f"--customize-hook={hook}" for hook in hooks), "bookworm", str(archive))
    container = buildah("from", "scratch")
    buildah("add", "-q", container, str(archive), "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", "--cmd", "python3", container)
    buildah("commit", "-q", container, BASE)
    buildah("rm", container)
    archive.unlink()
    return "a stand-in from Debian's packages"


@cache
def build(name: str, tree: Path = ROOT) -> str:
    """The image of a component, from the committed Dockerfile."""
    prepare_base()
    buildah("bud", "--format", "docker", "--pull=never", "--build-arg", "GIT_SHA=0123456789abcdef0123456789abcdef01234567", "-f", f"deploy/{name}/Dockerfile", "-t", f"localhost/{name}", ".", cwd=tree)
    return f"localhost/{name}"


@dataclass(frozen=True)
class Running:
    """A container that runs."""
    name: str
    pid: int      # its first process, on this machine
    port: int

    def inside(self, script: str) -> str:
        """The output of a shell command in it; failures of the command are its words."""
        return podman("exec", self.name, "sh", "-c", f"({script}) 2>&1 || true")

    def status(self) -> dict[str, str]:
        """What the kernel says of the first process."""
        return dict(line.split(":\t", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":\t" in line)

    def memory(self) -> float:
        """Megabytes resident, all its processes together, shared pages counted by share."""
        pids = [int(pid) for pid in podman("top", self.name, "hpid").split()[1:]]
        found = [line.split()[1] for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
        return sum(map(int, found)) / 1000

    def ask(self, path: str, body: bytes | None = None, key: str = "") -> tuple[int, bytes]:
        """Status and body of one request; (0, ...) where nobody listens yet."""
        headers = {"Content-Type": "application/json", **({"X-API-Key": key} if key else {})}
        try:
            with urlopen(Request(f"http://127.0.0.1:{self.port}{path}", body, headers), timeout=5) as reply:
                return reply.status, reply.read()
        except HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def wait(self, path: str, seconds: float = 60.0) -> float:
        """Seconds until a path answers 200."""
        begun = time.monotonic()
        while (answer := self.ask(path))[0] != 200:
            assert time.monotonic() - begun < seconds and Path(f"/proc/{self.pid}").exists(), f"{path}: {answer}\n{self.logs()}"
            time.sleep(0.02)
        return time.monotonic() - begun

    def logs(self) -> str:
        return podman("logs", self.name, merged=True)

    def end(self) -> tuple[float, int]:
        """SIGTERM to the first process: seconds until it is gone, and its exit code."""
        begun = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() - begun < 60, "it did not end within a minute of SIGTERM"
            time.sleep(0.005)
        took = time.monotonic() - begun
        return took, int(podman("wait", self.name))


@contextmanager
def running(image: str, port: int, environ: dict[str, str], *more: str, command: tuple[str, ...] = ()) -> Iterator[Running]:
    """A container of an image with nothing it does not need, removed at the end."""
    name = f"delta-go-try-{os.getpid()}-{port}"
    limits = () if os.environ.get("DELTA_CONTAINER_LIMITS") else ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
    words = [*TIGHT, *limits, *more, *(f"--env={key}={value}" for key, value in environ.items())]
    podman("run", "-d", "--name", name, "--no-healthcheck", "--net=host", *words, image, *command)
    try:
        yield Running(name, int(podman("inspect", "--format", "{{.State.Pid}}", name)), port)
    finally:
        podman("rm", "-f", "--time", "5", name)
