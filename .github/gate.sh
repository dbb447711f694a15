#!/usr/bin/env bash
# Judge the candidate of `make retrain` against the champion. A refusal is a verdict and no failure: its card says why, and the exit code is 0.
set -euo pipefail
code=0
.venv/bin/delta-go promote --candidate build/retrain --data build/candles --allow-gaps >build/verdict.txt 2>&1 || code=$?
tee -a "${GITHUB_STEP_SUMMARY:-/dev/null}" <build/verdict.txt
if [ "$code" = 1 ] && tail -n 1 build/verdict.txt | grep -Eq '^failed: [0-9a-f]{12} is refused: '; then
  code=0
fi
exit "$code"
