#!/usr/bin/env bash
# Start-up script of each host of a TPU slice: installs the package, fetches files, starts the run or resumes it.
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
FILES="$(metadata mora-files || true)"
HOME="${HOME:-/root}"
export HOME
ENVIRONMENT=/opt/mora-jax
OUT="gs://$BUCKET/$RUN"

# Python 3.12 by uv: the machine's own is 3.10.
if [ ! -x "$ENVIRONMENT/bin/mora-jax" ]; then
    python3 -m pip install --quiet uv
    python3 -m uv venv --quiet --python 3.12 "$ENVIRONMENT"
    python3 -m uv pip install --quiet --python "$ENVIRONMENT/bin/python" "$PACKAGE"
fi

# Configuration and data, if they were put into a bucket.
mkdir -p /opt/mora-files
cd /opt/mora-files
if [ -n "$FILES" ]; then
    gcloud storage cp --recursive "${FILES%/}/*" .
fi

there() { gcloud storage ls "$OUT/$1" >/dev/null 2>&1; }

# A host that comes back later than the others finds the run begun: all of them resume then. So each attempt looks again.
for attempt in $(seq 1 100); do
    if there summary.json; then
        echo "$RUN is finished"
        exit 0
    fi
    code=0
    if there config.json; then
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
