#!/usr/bin/env bash
# Start-up script of each host of a TPU slice: installs the package, mounts the bucket, starts the run or resumes it.
# Runs as root at every boot; tpu_vm.sh hands it over with the settings as the machine's metadata.
set -euo pipefail

metadata() {
    curl --silent --fail --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

RUN="$(metadata mora-run)"
BUCKET="$(metadata mora-bucket)"
PACKAGE="$(metadata mora-package)"
TRAIN="$(metadata mora-train)"
HOME="${HOME:-/root}"
export HOME
ENVIRONMENT=/opt/mora-jax
RUNS=/mnt/mora-runs

# Python 3.12 by uv: the machine's own is 3.10.
if [ ! -x "$ENVIRONMENT/bin/mora-jax" ]; then
    python3 -m pip install --quiet uv
    python3 -m uv venv --quiet --python 3.12 "$ENVIRONMENT"
    python3 -m uv pip install --quiet --python "$ENVIRONMENT/bin/python" "$PACKAGE"
fi

# One folder that all hosts share.
if ! command -v gcsfuse >/dev/null; then
    curl --silent --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg -o /usr/share/keyrings/cloud.google.asc
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
        "gcsfuse-$(lsb_release -cs) main" >/etc/apt/sources.list.d/gcsfuse.list
    apt-get update --quiet
    apt-get install --quiet --yes gcsfuse
fi
mkdir -p "$RUNS"
if ! mountpoint --quiet "$RUNS"; then
    # Checkpoints appear by the rename of a folder. A time to live of 0 shows every host what another has written.
    gcsfuse --implicit-dirs --rename-dir-limit=10000 --metadata-cache-ttl-secs=0 \
        --metadata-cache-negative-ttl-secs=0 "${BUCKET%%/*}" "$RUNS"
fi
OUT="$RUNS/${BUCKET#"${BUCKET%%/*}"}/$RUN"

# A host that comes back later than the others finds the run begun: all of them resume then. So each attempt looks anew.
for attempt in $(seq 1 100); do
    if [ -e "$OUT/summary.json" ]; then
        echo "$RUN is finished"
        exit 0
    fi
    code=0
    if [ -e "$OUT/config.json" ]; then
        echo "attempt $attempt: resuming $RUN"
        "$ENVIRONMENT/bin/mora-jax" train --resume "$OUT" || code=$?
    else
        echo "attempt $attempt: starting $RUN"
        # shellcheck disable=SC2086 # TRAIN is a list of words
        "$ENVIRONMENT/bin/mora-jax" train $TRAIN --config.out="$OUT" || code=$?
    fi
    case "$code" in
        0) exit 0 ;;
        2) exit 2 ;;         # the input is wrong: trying again mends nothing
        143) exit 143 ;;     # SIGTERM: the machine is going; the state is saved
    esac
    echo "attempt $attempt ended with code $code; trying again"
    sleep 20
done
exit 1
