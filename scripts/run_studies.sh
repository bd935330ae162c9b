#!/usr/bin/env bash
# run_studies.sh DIR [OPTION…]: all quick presets in order, in DIR, at the lowest priority and on one thread; the same
# command goes on where it was stopped. Further options go to `mora-jax study`; SEEDS=N and STUDIES="memorize …" set what
# is run, PYTHON which interpreter has mora-jax.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
out=$1; shift
mkdir -p "$out"
export OMP_NUM_THREADS=1 XLA_FLAGS="${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false}"
for study in ${STUDIES:-rates memorize forget instruct}; do
  nice -n 19 "${PYTHON:-python}" -m mora_jax study "$study" --preset quick --seeds "${SEEDS:-10}" \
    --out "$out/$study" "$@" || echo "$study stopped with exit code $?" >&2
done
