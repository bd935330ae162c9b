#!/usr/bin/env bash
# Cloud TPU VMs through queued resources: create, watch over, look into, delete. See docs/tpu_vms.md.
#
#   tpu_vm.sh create    ask for slices; each host runs tpu_startup.sh at every boot, which starts or resumes the run
#   tpu_vm.sh watch     look every minute; ask again when spot machines were taken; delete all when the run is finished
#   tpu_vm.sh status    the state of the request, and the end of each host's log
#   tpu_vm.sh run CMD   run a command on all hosts
#   tpu_vm.sh delete    give the slices back
#
# Settings, from the environment:
#   NAME     of the request and of the run                  (required)
#   ZONE     such as us-east5-b                             (required)
#   BUCKET   gs://… that holds the run directories          (required by create and watch)
#   TRAIN    arguments of `mora-jax train` but config.out   (required by create and watch)
#   TYPE     accelerator type                               (v6e-8)
#   RUNTIME  software of the machine                        (by TYPE)
#   SLICES   how many slices work together                  (1)
#   SPOT     1 for spot machines                            (1)
#   FILES    gs://… with configuration and data, which each host copies to where it runs   (none)
#   PACKAGE  what pip installs: a name, an address, a wheel (mora-jax[tpu,gcs] from the repository)
#
# TRAIN is split into words at blanks, and at nothing else.
# shellcheck disable=SC2153 # settings come from the environment
set -euo pipefail

usage() { sed -n '2,/^# shellcheck/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
fail() { echo "error: $*" >&2; exit 2; }
need() { for name in "$@"; do [ -n "${!name:-}" ] || fail "set $name (see $0 without arguments)"; done; }

runtime() {
    case "${TYPE}" in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "set RUNTIME: the software version of TYPE=$TYPE is not known here" ;;
    esac
}

create() {
    need NAME ZONE BUCKET TRAIN
    local nodes=(--node-id="$NAME") spot=() software metadata
    metadata="mora-run=$NAME|mora-bucket=${BUCKET#gs://}|mora-files=$FILES|mora-train=$TRAIN|mora-package=$PACKAGE"
    software="${RUNTIME:-$(runtime)}"
    if [ "$SLICES" -gt 1 ]; then
        nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    if [ "$SPOT" = 1 ]; then
        spot=(--spot)
    fi
    # Values of --metadata may hold commas: ^|^ makes | the separator.
    gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$software" "${nodes[@]}" "${spot[@]}" \
        --scopes=https://www.googleapis.com/auth/cloud-platform \
        --metadata="^|^$metadata" \
        --metadata-from-file=startup-script="$(dirname "$0")/tpu_startup.sh"
}

state() {
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null ||
        echo ABSENT
}

delete() {
    need NAME ZONE
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

finished() { gcloud storage ls "$BUCKET/$NAME/summary.json" >/dev/null 2>&1; }

watch() {
    need NAME ZONE BUCKET TRAIN
    local now last=
    until finished; do
        now="$(state)"
        if [ "$now" != "$last" ]; then
            echo "$(date -u +%H:%M:%S) $NAME: $now"
            last="$now"
        fi
        case "$now" in
            ABSENT) create ;;
            # Spot machines that were taken, and requests that expired, never come back by themselves.
            SUSPENDED | FAILED) delete ;;
        esac
        sleep "${INTERVAL:-60}"
    done
    echo "$NAME is finished: $BUCKET/$NAME"
    delete
}

run() {
    need NAME ZONE
    [ $# -gt 0 ] || fail "run needs a command"
    gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --node=all --worker=all --command="$*"
}

status() {
    need NAME ZONE
    echo "$NAME: $(state)"
    run 'hostname; sudo journalctl --unit=google-startup-scripts --lines=20 --no-pager'
}

TYPE="${TYPE:-v6e-8}" SLICES="${SLICES:-1}" SPOT="${SPOT:-1}"
PACKAGE="${PACKAGE:-mora-jax[tpu,gcs] @ git+https://github.com/OWNER/mora-jax}"
BUCKET="${BUCKET:-}" BUCKET="${BUCKET%/}" FILES="${FILES:-}"
action="${1:-}"
case "$action" in
    create | watch | status | run | delete)
        shift
        "$action" "$@"
        ;;
    *) usage ;;
esac
