#!/bin/sh
# Put a release of the bot into service on its machine, or go back by itself. As root:
#   install.sh RELEASE    a folder with delta_go-*.whl, requirements.txt, models/, fetch_secrets.py and delta-go-bot.service
#   install.sh --back     the release that ran before
# The running bot drains, the new one starts, reads its journal and asks the exchange; if it is not ready in two minutes, the old one returns.
set -eu
base=${DELTA_BASE:-/opt/delta-go}
etc=${DELTA_ETC:-/etc}
ready=${DELTA_READY:-http://127.0.0.1:8095/health/ready}
tries=${DELTA_TRIES:-60}

point() { ln -sfn "$1" "$base/$2.new" && mv -T "$base/$2.new" "$base/$2"; }

healthy() {
  n=0
  while [ "$n" -lt "$tries" ]; do
    if curl -fsS -m 2 -o /dev/null "$ready" 2>/dev/null; then return 0; fi
    n=$((n + 1)); sleep 2
  done
  return 1
}

start() { # of the release that current points to; its own unit file comes with it
  install -m 0644 "$base/current/delta-go-bot.service" "$etc/systemd/system/delta-go-bot.service" &&
    systemctl daemon-reload && systemctl enable --quiet delta-go-bot && systemctl restart delta-go-bot && healthy
}

back() {
  [ -e "$base/previous" ] || { echo "no release before this one; see: journalctl -u delta-go-bot" >&2; return 1; }
  old=$(readlink -f "$base/previous"); new=$(readlink -f "$base/current")
  point "$old" current && point "$new" previous
  start && echo "back at $(basename "$old")"
}

unpack() { # an environment and models of its own, made aside, named only when whole
  id -u delta-go >/dev/null 2>&1 || useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin delta-go
  rm -rf "$2" "$2.part" && mkdir -p "$base/releases" && cp -R "$1" "$2.part"
  python3.11 -m venv "$2.part/venv"
  "$2.part/venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-deps -r "$2.part/requirements.txt" "$2.part"/delta_go-*.whl
  sed -i "1s|$2.part/|$2/|" "$2.part/venv/bin/delta-go"
  chmod -R go+rX "$2.part" && mv -T "$2.part" "$2"
}

if [ "${1:-}" = --back ]; then back; exit; fi
from=$(readlink -f "${1:?name the folder of the release}")
release="$base/releases/$(basename "$from")"
[ "$(readlink -f "$base/current" 2>/dev/null || true)" != "$release" ] || { echo "$(basename "$from") runs already"; exit 0; }
unpack "$from" "$release"
mkdir -p "$etc/delta-go" "$etc/systemd/system"
for file in bot.env secrets.conf; do # the machine's own words are kept
  [ -e "$etc/delta-go/$file" ] || [ ! -e "$from/$file" ] || install -m 0640 -g delta-go "$from/$file" "$etc/delta-go/$file"
done
[ ! -e "$base/current" ] || point "$(readlink -f "$base/current")" previous
point "$release" current
if start; then echo "$(basename "$release") is ready"; exit 0; fi
echo "$(basename "$release") did not become ready" >&2
back >&2 || true
exit 1
