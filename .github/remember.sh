#!/usr/bin/env bash
# What an earlier retrain looked at stays counted, although nobody merged its proposal: the lines of its ledgers join those of this tree.
set -euo pipefail
gh auth setup-git
code=0
git ls-remote --exit-code origin refs/heads/retrain >/dev/null || code=$?
if [ "$code" = 2 ]; then
  echo "no proposal yet"
  exit 0
fi
git fetch --quiet --depth 1 origin refs/heads/retrain
mkdir -p build/proposed
for ledger in reports/promotion/looks.jsonl reports/walk_forward/trials.jsonl; do
  if git cat-file -e "FETCH_HEAD:$ledger"; then
    for file in "$ledger" "$ledger.head"; do git show "FETCH_HEAD:$file" >"build/proposed/${file##*/}"; done
    .venv/bin/python -c 'import sys; from delta_go.evidence.trials import read_trials, record_trials; print(sys.argv[1], record_trials(sys.argv[1], read_trials(sys.argv[2])), "lines more")' "$ledger" "build/proposed/${ledger##*/}"
  fi
done
