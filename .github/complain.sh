#!/usr/bin/env bash
# Say that the retrain failed: in the one open issue labelled so, or in a new one.
set -euo pipefail
body="The retrain of $(date -u +%F) failed: $GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID; what it left is there, as the artifact retrain. The models in force stay as they are."
gh label create retrain --force --description "The weekly retrain" --color D93F0B
number=$(gh issue list --label retrain --state open --json number --jq '.[0].number // empty')
if [ -n "$number" ]; then
  gh issue comment "$number" --body "$body"
else
  gh issue create --title "The retrain fails" --label retrain --body "$body"
fi
