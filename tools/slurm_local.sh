#!/usr/bin/env bash
# A real Slurm on this machine, without systemd, cgroups or a database: two "nodes" that share one host.
#   slurm_local.sh install   Debian's packages (root, apt-get); does nothing where they are there
#   slurm_local.sh start     munged, slurmctld and a slurmd for each node; does nothing where they run
#   slurm_local.sh stop      cancel all jobs, end the daemons, remove what `start` made; logs stay in $SLURM_LOCAL_HOME/log
#   slurm_local.sh env       what a shell needs to use it: eval "$(tools/slurm_local.sh env)"
# Beside it, in slurm_local/: a stand-in for sacct, which needs a database, and one for pyxis' container flags.
# SLURM_LOCAL_HOME is where the state is (default build/slurm), SLURM_LOCAL_PORT the first of its three ports (16817).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=$(realpath --canonicalize-missing "${SLURM_LOCAL_HOME:-$here/../build/slurm}")
port=${SLURM_LOCAL_PORT:-16817}
nodes=(node0 node1)
# Slurm's own packages, and what compiles the stand-in for pyxis.
packages=(slurmctld slurmd slurm-client munge libslurm-dev gcc libc6-dev)
programs=(munged slurmctld slurmd srun sbatch scontrol scancel squeue sinfo gcc)
mark="# slurm_local.sh in $home"
export SLURM_CONF=$home/slurm.conf PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "slurm-local: $1" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "$1 needs root, and this is user $(id -un); run it as root (in a container, for example)."
}

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
    [ -e /usr/include/slurm/spank.h ] || echo slurm/spank.h
}

install() {
    [ -n "$(missing)" ] || return 0
    need_root "the installation of Slurm's packages"
    command -v apt-get >/dev/null || fail "apt-get was not found; the local Slurm is made of Debian's or Ubuntu's packages."
    local log
    log=$(mktemp)
    # shellcheck disable=SC2064 # The name as it is now: the function has ended by then.
    trap "rm -f '$log'" EXIT
    # In runlevel 1 the packages' own services are not started.
    if ! {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}"
    } >"$log" 2>&1; then
        fail "apt-get could not install ${packages[*]}: $(grep -E '^E:' "$log" | head -n 1 || tail -n 1 "$log")"
    fi
    local left
    left=$(missing)
    [ -z "$left" ] || fail "${left//$'\n'/, } missing although the packages ${packages[*]} are installed; reinstall them."
}

alive() {
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

port_in_use() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

write_configuration() {
    local host index
    host=$(hostname -s)
    : >"$home/gres.conf"
    cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire seconds (120 by default) before it may start again.
AuthInfo=socket=$home/munge.socket,cred_expire=5
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
PlugStackConfig=$home/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# Heterogeneous jobs are started by the backfill pass alone: run it every second instead of every 30.
SchedulerParameters=bf_interval=1,sched_interval=2
KillWait=5
# slurmctld forgets ended jobs after this, and the stand-in for sacct asks slurmctld.
MinJobAge=86400
ReturnToService=2
# The nodes may claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
END
    mkdir -p "$home/gpus"
    # Plain files stand for devices: jobs can ask for 8 GPUs of a node and get none.
    for index in 0 1 2 3 4 5 6 7; do : >"$home/gpus/gpu$index"; done
    for index in "${!nodes[@]}"; do
        echo "NodeName=${nodes[$index]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + index)) CPUs=16" \
            "RealMemory=32000 Gres=gpu:8 State=UNKNOWN" >>"$SLURM_CONF"
        echo "NodeName=${nodes[$index]} Name=gpu File=$home/gpus/gpu[0-7]" >>"$home/gres.conf"
        mkdir -p "$home/spool/${nodes[$index]}"
    done
    echo "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
    echo "required $home/container_flags.so $home/mount_points" >"$home/plugstack.conf"
}

# In place, since a container's /etc/hosts is a mount that cannot be replaced.
set_hosts() {
    local kept
    kept=$(grep -vF "$mark" /etc/hosts || true)
    { printf '%s\n' "$kept" "$@"; } 2>/dev/null >/etc/hosts || fail "/etc/hosts cannot be written; node names need a line there."
}

start() {
    local node lines=() index
    [ -z "$(missing)" ] || fail "$(missing | paste -sd ' ') missing; run 'tools/slurm_local.sh install' first."
    need_root "a local Slurm"
    [ ${#home} -le 80 ] || fail "the path $home is too long for a socket's; set SLURM_LOCAL_HOME to one of at most 80 characters."
    if ! alive "$home/slurmctld.pid"; then
        for index in 0 1 2; do
            ! port_in_use $((port + index)) || fail "port $((port + index)) is in use; set SLURM_LOCAL_PORT to the first of three free ones."
        done
    fi
    mkdir -p "$home/state" "$home/log"
    write_configuration
    for node in "${nodes[@]}"; do
        # A node's name is its address for those who ask Slurm where a server runs.
        lines+=("127.0.0.1 $node $mark")
    done
    set_hosts "${lines[@]}"
    gcc -O1 -Wall -shared -fPIC -o "$home/container_flags.so" "$here/slurm_local/container_flags.c"

    if ! alive "$home/munged.pid"; then
        [ -s "$home/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$home/munge.key")
        munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munged.pid" \
            --log-file="$home/log/munged.log" --seed-file="$home/munge.seed" 2>>"$home/log/munged.log" ||
            fail "munged did not start; its reason is in $home/log/munged.log."
    fi
    alive "$home/slurmctld.pid" || slurmctld -c 2>>"$home/log/slurmctld.log" ||
        fail "slurmctld did not start; its reason is in $home/log/slurmctld.log."
    for node in "${nodes[@]}"; do
        alive "$home/slurmd-$node.pid" || slurmd -N "$node" 2>>"$home/log/slurmd-$node.log" ||
            fail "slurmd of $node did not start; its reason is in $home/log/slurmd-$node.log."
    done
    for ((index = 0; index < 150; index++)); do
        [ "$(sinfo --noheader --Node --states=idle,mix,alloc --format=%N 2>/dev/null | wc -l)" = ${#nodes[@]} ] && return 0
        sleep 0.2
    done
    fail "the nodes were not ready within 30 s ($(sinfo --noheader --Node --format='%N %t' | paste -sd ',')); see $home/log."
}

jobs_left() {
    squeue --noheader --format=%i 2>/dev/null | paste -sd ' '
}

# SIGTERM to the daemons of these pid files, side by side, and SIGKILL to what is there after 10 s.
end_daemons() {
    local pid_file pid pids=() index
    for pid_file in "$@"; do
        if alive "$pid_file"; then pids+=("$(cat "$pid_file")"); fi
    done
    for pid in "${pids[@]}"; do kill "$pid"; done
    for pid in "${pids[@]}"; do
        for ((index = 0; index < 100; index++)); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -KILL "$pid"
    done
}

stop() {
    local index
    [ -d "$home" ] || return 0
    need_root "the end of a local Slurm"
    # A slurmd leaves the steps of its jobs running when it ends: they go first.
    if alive "$home/slurmctld.pid"; then
        scancel --partition=batch 2>/dev/null || true
        for ((index = 0; index < 150; index++)); do
            [ -n "$(jobs_left)" ] || break
            [ $index != 75 ] || scancel --partition=batch --signal=KILL --full 2>/dev/null || true
            sleep 0.2
        done
        [ -z "$(jobs_left)" ] || fail "the jobs $(jobs_left) did not end within 30 s; see $home/log."
    fi
    end_daemons "$home"/slurmd-*.pid "$home/slurmctld.pid"
    end_daemons "$home/munged.pid"
    if grep -qF "$mark" /etc/hosts; then set_hosts; fi
    # Where a container's mounts had no place to go, one was made.
    if [ -s "$home/mount_points" ]; then
        tac "$home/mount_points" | while read -r place; do
            if [ -d "$place" ]; then rmdir --ignore-fail-on-non-empty "$place"; elif [ ! -s "$place" ]; then rm -f "$place"; fi
        done
    fi
    find "$home" -mindepth 1 -maxdepth 1 ! -name log -exec rm -rf {} +
}

environment() {
    echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"
    echo "export PATH=$(printf %q "$here/slurm_local"):\$PATH"
}

case "${1:-}" in
install | start | stop) "$1" ;;
env) environment ;;
*) fail "give one of install, start, stop, env." ;;
esac
