#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for tests. It lives in one directory and does not touch any other Slurm.
#
#   eval "$(cluster.sh start DIR)"    # make DIR, start the daemons; prints what to export: SLURM_CONF
#   cluster.sh node DIR NAME          # start the slurmd of a node again after it was killed
#   cluster.sh stop DIR               # cancel all jobs and end every process that DIR's Slurm has started; DIR stays
#
# It needs slurmctld, slurmd and munged (Debian: apt-get install --no-install-recommends slurm-wlm munge), but neither
# their services nor /etc/slurm. Jobs run as the user who starts it.
#
# Nodes: 127.0.0.1 and 127.0.0.2. These names resolve everywhere, so MASTER_ADDR works. Each has 16 CPUs and 64 GPUs in
# Slurm's books, whatever the machine has.
# Partitions: low (default; preempted jobs are requeued after 20 s of grace), nograce (requeued at once), cancel (cancelled
# at once), high (preempts the other three).
#
# Numbers of jobs begin anywhere, so that two such Slurms, whose jobs meet on one host, rarely choose the same ports.
#
# Variables of `start`, with what Slurm's default would be:
#   PREEMPTION       partition_prio; `none` is Slurm's default: no partition preempts another
#   SLURMD_TIMEOUT   15: seconds until a silent node is down (300)
#   KILL_WAIT        5: seconds from SIGTERM to SIGKILL (30)
#   GRACE            20: seconds of the partition low (0)
#   CRED_EXPIRE      10: seconds until a requeued job may start (120)
#   LIMIT_MEMORY     no; `yes` has a cgroup (v1, which only root may make) kill what uses more than --mem (no)
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
nodes=(127.0.0.1 127.0.0.2)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
die() { echo "error: cluster.sh: $*" >&2; exit 1; }

# is_alive PID NAME: whether that process runs and has that name, so that it is not another one of the same number.
is_alive() { [[ "$(ps -o stat=,comm= -p "$1" 2>/dev/null)" =~ ^[^Z].*\ $2$ ]]; }

# end PIDFILE NAME: send SIGTERM, after 5 s SIGKILL, and wait until the process is gone.
end() {
    local pid try
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && is_alive "$pid" "$2" || return 0
    for try in {1..100}; do
        case $try in 1) kill "$pid" ;; 50) kill -KILL "$pid" ;; esac 2>/dev/null || true
        is_alive "$pid" "$2" || return 0
        sleep 0.1
    done
    die "process $pid ($2) does not end"
}

# wait_for SECONDS COMMAND…: repeat the command silently until it succeeds.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

# find_port: add to `ports` one that nobody listens on, below those that Linux gives to outgoing connections.
ports=()
find_port() {
    local port
    while port=$((12000 + RANDOM % 8000)); do
        [[ " ${ports[*]-} " == *" $port "* ]] || (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    ports+=("$port")
}

start_node() { # DIR NAME
    local try
    end "$1/slurmd-$2.pid" slurmd
    for try in {1..10}; do # what a killed slurmd has left behind may hold its port for a moment
        slurmd -f "$1/slurm.conf" -N "$2" >>"$1/slurmd-$2.log" 2>&1 </dev/null || return 1
        sleep "$((try > 1)).3"
        if is_alive "$(cat "$1/slurmd-$2.pid" 2>/dev/null || echo 0)" slurmd; then return 0; fi
    done
    return 1
}

write_configuration() { # DIR
    local dir=$1 host gpu tasks=none memory='' preemption=${PREEMPTION:-partition_prio} mode=REQUEUE requeue=REQUEUE cancel=CANCEL
    host=$(hostname -s)
    [ "$preemption" != none ] || mode=OFF requeue=OFF cancel=OFF
    if [ "${LIMIT_MEMORY:-no}" = yes ]; then
        tasks=cgroup memory=_Memory
        printf '%s\n' CgroupPlugin=cgroup/v1 Constrain{RAM,Swap}Space=yes AllowedSwapSpace=0 >"$dir/cgroup.conf"
    fi
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=${CRED_EXPIRE:-10}
CredType=cred/munge
SlurmctldPort=${ports[0]}
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool/%n
StateSaveLocation=$dir/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/$tasks
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
FirstJobId=$((RANDOM % 11000 + 1))
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core$memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=${KILL_WAIT:-5}
SlurmdTimeout=${SLURMD_TIMEOUT:-15}
SlurmctldTimeout=10
MessageTimeout=5
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/$preemption
PreemptMode=$mode
NodeName=${nodes[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CoresPerSocket=16 RealMemory=65536 Gres=gpu:64
NodeName=${nodes[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CoresPerSocket=16 RealMemory=65536 Gres=gpu:64
PartitionName=DEFAULT Nodes=${nodes[0]},${nodes[1]} State=UP DefaultTime=10
PartitionName=low Default=YES PriorityTier=1 PreemptMode=$requeue GraceTime=${GRACE:-20}
PartitionName=nograce PriorityTier=1 PreemptMode=$requeue GraceTime=0
PartitionName=cancel PriorityTier=1 PreemptMode=$cancel GraceTime=0
PartitionName=high PriorityTier=10 PreemptMode=OFF
CONF
    for gpu in {0..63}; do : >"$dir/gpu$gpu"; done # Slurm counts files, whatever they are
    echo "Name=gpu File=$dir/gpu[0-63]" >"$dir/gres.conf"
}

is_ready() { [ "$(sinfo --noheader --Node --partition=low --format=%T | sort | uniq -c | tr -d ' ')" = "${#nodes[@]}idle" ]; }
has_no_jobs() { [ -z "$(squeue --noheader)" ]; }

start() { # DIR
    local dir=$1 node
    command -v slurmctld slurmd munged scontrol >/dev/null || die "needs slurmctld, slurmd and munged (slurm-wlm, munge)"
    [ ! -e "$dir/slurm.conf" ] || stop "$dir"
    mkdir -p "$dir" && dir=$(cd "$dir" && pwd -P) && mkdir -p "$dir"/{state,spool}
    [ ${#dir} -lt 70 ] || die "$dir: too long a name for sockets; choose a shorter one"
    rm -rf "$dir"/{state,spool}/* "$dir"/*.{log,pid}
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" --num-threads=2 </dev/null >"$dir/munged.out" 2>&1 ||
        die "munged: $(cat "$dir/munged.out")"
    find_port && find_port && find_port
    write_configuration "$dir"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -f "$SLURM_CONF" </dev/null >>"$dir/slurmctld.log" 2>&1 || die "slurmctld: see $dir/slurmctld.log"
    for node in "${nodes[@]}"; do
        start_node "$dir" "$node" || die "slurmd: see $dir/slurmd-$node.log"
    done
    wait_for 30 is_ready || die "the nodes do not become idle: $(sinfo --noheader 2>&1 | tr '\n' ' ')see $dir/*.log"
    echo "export SLURM_CONF=$SLURM_CONF"
}

# all_steps DIR: the process ids of its slurmstepd, which outlive their slurmd.
all_steps() {
    local process
    for process in /proc/[0-9]*; do
        [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] &&
            [[ $(readlink "$process/cwd" 2>/dev/null)/ == "$1"/* ]] && echo "${process#/proc/}"
    done
    return 0
}

stop() { # DIR
    local dir node step task
    dir=$(cd "$1" && pwd -P)
    export SLURM_CONF=$dir/slurm.conf
    if is_alive "$(cat "$dir/slurmctld.pid" 2>/dev/null || echo 0)" slurmctld; then
        timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        wait_for 2 has_no_jobs || true
    fi
    for step in $(all_steps "$dir"); do # of jobs that ignore SIGTERM or could not be cancelled
        for task in $(ps -o pid= --ppid "$step"); do
            kill -KILL -- "-$task" 2>/dev/null || kill -KILL "$task" 2>/dev/null || true
        done
        kill -KILL "$step" 2>/dev/null || true
    done
    for node in "${nodes[@]}"; do end "$dir/slurmd-$node.pid" slurmd; done
    end "$dir/slurmctld.pid" slurmctld
    end "$dir/munged.pid" munged
    rm -f "$dir"/*.pid
    [ -e "$dir/cgroup.conf" ] || return 0
    # Another such Slurm gives the same names; what it needs is not empty.
    find /sys/fs/cgroup/*/slurm_127.0.0.* -depth -type d -exec rmdir {} + 2>/dev/null || true
}

case ${1-} in
start | stop) [ $# = 2 ] || usage; "$1" "$2" ;;
node) [ $# = 3 ] || usage; export SLURM_CONF=$2/slurm.conf; start_node "$(cd "$2" && pwd -P)" "$3" ;;
*) usage ;;
esac
