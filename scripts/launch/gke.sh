#!/usr/bin/env bash
# A run on a GKE cluster with JobSet and Kueue: fills in gke_tpu.yaml and applies it. See docs/clusters.md.
#
#   gke.sh show     print the manifest
#   gke.sh apply    start the run, or resume the one of this name
#   gke.sh logs     follow the first host
#   gke.sh delete   stop it; the run directory stays
#
# Settings, from the environment:
#   NAME         of the run                                    (required)
#   IMAGE        container with mora-jax[tpu,gcs]              (required)
#   BUCKET       Cloud Storage bucket of the run directories   (required)
#   TRAIN        arguments of `mora-jax train`                 (required)
#   QUEUE        Kueue's local queue                           (default)
#   ACCOUNT      Kubernetes service account with the bucket    (default)
#   ACCELERATOR  label of the nodes                            (tpu-v6e-slice)
#   TOPOLOGY     of a slice                                    (4x4)
#   HOSTS CHIPS  hosts of a slice, chips of a host             (4 4)
#   SLICES       how many slices work together                 (1)
#   RESTARTS     how often a run that was cut off starts again (100)
#
# TRAIN is split into words at blanks, and at nothing else.
# shellcheck disable=SC2153 # settings come from the environment
set -euo pipefail

usage() { sed -n '2,/^# shellcheck/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

manifest() {
    local name text
    for name in NAME IMAGE BUCKET TRAIN; do
        [ -n "${!name:-}" ] || { echo "error: set $name (see $0 without arguments)" >&2; exit 2; }
    done
    text="$(<"$(dirname "$0")/gke_tpu.yaml")"
    for name in NAME IMAGE BUCKET QUEUE ACCOUNT ACCELERATOR TOPOLOGY HOSTS CHIPS SLICES RESTARTS; do
        text="${text//"\${$name}"/"${!name}"}"
    done
    # In YAML's single quotes, where a quote is written twice.
    text="${text//"\${TRAIN}"/"'${TRAIN//\'/\'\'}'"}"
    printf '%s\n' "$text"
}

QUEUE="${QUEUE:-default}" ACCOUNT="${ACCOUNT:-default}" ACCELERATOR="${ACCELERATOR:-tpu-v6e-slice}"
TOPOLOGY="${TOPOLOGY:-4x4}" HOSTS="${HOSTS:-4}" CHIPS="${CHIPS:-4}" SLICES="${SLICES:-1}" RESTARTS="${RESTARTS:-100}"
case "${1:-}" in
    show) manifest ;;
    apply) manifest | kubectl apply -f - ;;
    logs)
        first="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
        kubectl logs --follow --selector="$first"
        ;;
    delete) kubectl delete jobset "$NAME" ;;
    *) usage ;;
esac
