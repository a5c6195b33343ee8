#!/usr/bin/env bash
# Start a real Slurm on this machine for tests/test_slurm.py: munge, slurmctld and two slurmd, on loopback only, without
# systemd, cgroups or accounting. Needs root on Debian or Ubuntu; missing packages are installed. Running twice is fine.
#   SLURM_ROOT  where its state lies (default ${TMPDIR:-/tmp}/cohortvi-test-slurm), the same for stop.sh
set -euo pipefail
root=${SLURM_ROOT:-${TMPDIR:-/tmp}/cohortvi-test-slurm}
host=$(hostname -s)
export PATH="$PATH:/usr/sbin:/sbin"
unset SLURM_CONF

die() { echo "start.sh: $*" >&2; exit 1; }
running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
[ "$(id -u)" = 0 ] || die "needs root"

if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
  command -v apt-get >/dev/null || die "no Slurm here, and no apt-get to install it with"
  { apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >/tmp/cohortvi-test-slurm-apt.log 2>&1 || die "apt-get failed, see /tmp/cohortvi-test-slurm-apt.log"
fi
for name in slurm.conf gres.conf; do
  link=/etc/slurm/$name
  [ ! -e "$link" ] || [ "$(readlink "$link")" = "$root/$name" ] || die "$link belongs to another Slurm; left alone"
done

umask 022
mkdir -p "$root"/{munge,state,log,run,spool-n1,spool-n2} /etc/slurm
[ -s "$root/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$root/munge/key")

# Nodes pretend to be larger than the machine (config_overrides), so that what the rules ask for fits.
cat >"$root/slurm.conf" <<CONF
ClusterName=cohortvi
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SrunPortRange=61000-61999
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool-%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobRequeue=1
KillWait=20
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_min_interval=50000,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=26818 CPUs=4 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=26828 CPUs=4 RealMemory=16000 Gres=gpu:test:1 State=UNKNOWN
PartitionName=cpu Nodes=n1 Default=YES MaxTime=2-00:00:00 State=UP
PartitionName=gpu Nodes=n2 MaxTime=2-00:00:00 State=UP
PartitionName=all Nodes=n1,n2 MaxTime=2-00:00:00 State=UP
CONF
echo "NodeName=n2 Name=gpu Type=test File=/dev/null" >"$root/gres.conf"
# Jobs start with every SLURM_ variable stripped, so the configuration has to lie where Slurm looks by itself.
for name in slurm.conf gres.conf; do ln -sfn "$root/$name" "/etc/slurm/$name"; done

if ! running "$root/run/munged.pid"; then
  rm -f "$root"/munge/socket*
  munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/run/munged.pid" \
    --log-file="$root/log/munged.log" --seed-file="$root/munge/seed" 2>"$root/log/munged.err" ||
    die "munged does not start: $(cat "$root/log/munged.err")"
fi
running "$root/run/slurmctld.pid" || slurmctld
for node in n1 n2; do running "$root/run/slurmd-$node.pid" || slurmd -N "$node"; done

for _ in $(seq 150); do
  [ "$(sinfo -h -N -o '%N %t' 2>/dev/null | grep -cE ' (idle|mix|alloc)$')" -ge 2 ] && sinfo && exit 0
  sleep 0.2
done
tail -n 20 "$root"/log/*.log >&2
die "the nodes do not come up"
