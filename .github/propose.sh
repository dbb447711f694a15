#!/usr/bin/env bash
# Propose what `make retrain` and gate.sh left in this folder, as one pull request that is always the same one:
# an approved set travels with its card and its reports. A refused one that was looked at leaves its lines in the ledgers, so that the look stays counted.
set -euo pipefail
verdict=$(tail -n 1 build/verdict.txt)
title=$(sed 's/^failed: //; s/; its card: .*//' <<<"$verdict")
if ! git diff --quiet -- models; then
  cp -r build/retrain/reports .
  git add models reports
elif [ -n "$(git status --porcelain -- reports/promotion/looks.jsonl)" ] && ! cmp --silent reports/promotion/looks.jsonl build/proposed/looks.jsonl; then
  cp build/retrain/reports/walk_forward/trials.jsonl* reports/walk_forward
  git add reports/promotion/looks.jsonl* reports/walk_forward/trials.jsonl*
else
  echo "nothing to propose: $title"
  exit 0
fi
{
  printf 'A retrain of %s. What the gate found, line by line; as a page: reports/promotion.\n\n```\n' "$(date -u +%F)"
  cat build/verdict.txt
  printf '```\n\nMerged, it goes to staging, is asked there, and waits for a person before production.\n'
} >build/proposal.md
git switch --quiet --force-create retrain
git -c user.name='github-actions[bot]' -c user.email='41898282+github-actions[bot]@users.noreply.github.com' commit --quiet --message "Retrain: $title"
gh auth setup-git
git push --quiet --force origin retrain
number=$(gh pr list --head retrain --state open --json number --jq '.[0].number // empty')
if [ -n "$number" ]; then
  gh api --silent --method PATCH "repos/{owner}/{repo}/pulls/$number" --raw-field title="Retrain: $title" --field body=@build/proposal.md
else
  gh pr create --base main --head retrain --title "Retrain: $title" --body-file build/proposal.md
fi
echo "pushed=yes" >>"${GITHUB_OUTPUT:-/dev/null}"
