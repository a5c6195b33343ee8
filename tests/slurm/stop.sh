#!/usr/bin/env bash
# Stop what start.sh started. With --purge its state is removed, too.
set -uo pipefail
root=${SLURM_ROOT:-${TMPDIR:-/tmp}/cohortvi-test-slurm}
unset SLURM_CONF
scancel --user=root 2>/dev/null
for name in slurmd-n1 slurmd-n2 slurmctld munged; do
  pid=$(cat "$root/run/$name.pid" 2>/dev/null) || continue
  kill "$pid" 2>/dev/null
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null
  rm -f "$root/run/$name.pid"
done
for name in slurm.conf gres.conf; do
  [ "$(readlink "/etc/slurm/$name" 2>/dev/null)" = "$root/$name" ] && rm -f "/etc/slurm/$name"
done
[ "${1:-}" = --purge ] && rm -rf "$root"
exit 0
