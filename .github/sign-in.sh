#!/usr/bin/env bash
# Become the deployer by Workload Identity Federation: GitHub vouches for this job of this repository, and there is no key. On a desk: gcloud auth login.
# The account is impersonated and not named in the credential, since `gcloud compute ssh` knows an impersonated account, and no federated one, by its name.
set -euo pipefail
umask 077
file="${RUNNER_TEMP:-build}/federated.json"
provider="projects/$DELTA_GCP_PROJECT_NUMBER/locations/global/workloadIdentityPools/github/providers/delta-go"
gcloud iam workload-identity-pools create-cred-config "$provider" --output-file="$file" \
  --credential-source-url="$ACTIONS_ID_TOKEN_REQUEST_URL&audience=https%3A%2F%2Fiam.googleapis.com%2F$provider" \
  --credential-source-headers="Authorization=Bearer THIS_JOB" \
  --credential-source-type=json --credential-source-field-name=value
text=$(<"$file") # the shell's own means from here: the words of a command can be read by every process
printf '%s\n' "${text//THIS_JOB/"$ACTIONS_ID_TOKEN_REQUEST_TOKEN"}" >"$file"
gcloud auth login --quiet --brief --cred-file="$file"
gcloud config set auth/impersonate_service_account "$DELTA_GCP_CALLER"
