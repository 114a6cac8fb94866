#!/usr/bin/env bash
# Runs a job on workers that are jobs of a real SLURM, and compares what it leaves with a run of a single process.
#
#     benchmarks/slurm.sh FOLDER [extract | run]
#
# FOLDER must not exist. A SLURM of one node is set up in it, started, and ended: no installed service is used or changed.
# The job is pipeline.yaml, three times: in one process; on two SLURM jobs; on two SLURM jobs of which one is canceled on
# the way. `extract` (the default) compares every file of the stores except their logs of times; `run` also trains on
# the workers, few epochs, and compares every result row, except timings, and every adaptor. FOLDER/log.txt tells what
# happened.
#
# Needs Debian with the packages slurm-wlm and munge, root, two cores, and a Python with sidecache and dask-jobqueue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly FOLDER="${1:?FOLDER is missing}" STEP="${2:-extract}" SHARDS_BEFORE_CANCEL=10
readonly NODE_NAME="$(hostname -s)" USER_NAME="$(id -un)" CTLD_PORT=16817 D_PORT=16818

require() {
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt install slurm-wlm munge" >&2; exit 2; }
  done
  python -c "import sidecache, dask_jobqueue" || { echo "install sidecache and dask-jobqueue" >&2; exit 2; }
  [[ $(id -u) == 0 ]] || { echo "run this as root: slurmd starts jobs as their users" >&2; exit 2; }
  [[ ! -e $FOLDER ]] || { echo "$FOLDER exists" >&2; exit 2; }
}

configure() {
  mkdir -p "$FOLDER"/{slurm,state,spool}
  chmod 755 "$FOLDER"
  (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/slurm/munge.key")
  cat >"$FOLDER/slurm/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$NODE_NAME
SlurmUser=root
SlurmctldPort=$CTLD_PORT
SlurmdPort=$D_PORT
AuthType=auth/munge
AuthInfo=socket=$FOLDER/slurm/munge.socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurm/slurmctld.pid
SlurmdPidFile=$FOLDER/slurm/slurmd.pid
SlurmctldLogFile=$FOLDER/slurm/slurmctld.log
SlurmdLogFile=$FOLDER/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobCompType=jobcomp/filetxt
JobCompLoc=$FOLDER/slurm/finished_jobs.txt
NodeName=$NODE_NAME CPUs=$(nproc --all) RealMemory=$(awk '/MemTotal/ {print int($2 / 1100)}' /proc/meminfo) State=UNKNOWN
PartitionName=cpu Nodes=$NODE_NAME Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF="$FOLDER/slurm/slurm.conf"
  export DASK_JOBQUEUE__SLURM__LOG_DIRECTORY="$FOLDER/logs" DASK_JOBQUEUE__SLURM__LOCAL_DIRECTORY="$FOLDER/scratch"
}

daemons=()
# start COMMAND ...: a daemon in the foreground of its own, which ends with this script
start() {
  "$@" >>"$FOLDER/slurm/output.txt" 2>&1 &
  daemons+=($!)
}

stop() {
  scancel --quiet --full --state=running || true
  scancel --quiet --state=pending || true
  until [[ -z $(squeue --noheader 2>/dev/null) ]]; do sleep 0.5; done
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait
}

start_slurm() {
  start munged --foreground --force --key-file "$FOLDER/slurm/munge.key" --socket "$FOLDER/slurm/munge.socket" \
    --pid-file "$FOLDER/slurm/munged.pid" --seed-file "$FOLDER/slurm/munged.seed" --log-file "$FOLDER/slurm/munged.log"
  until [[ -S "$FOLDER/slurm/munge.socket" ]]; do sleep 0.1; done
  start slurmctld -D
  start slurmd -D
  until sinfo --noheader --format=%t 2>/dev/null | grep -q idle; do sleep 0.5; done
}

show() {
  echo "\$ $*"
  "$@"
}

# has_begun: whether some shards are written or, where it trains, some epochs are done
has_begun() {
  if [[ $STEP == extract ]]; then
    [[ $(n_files out/cache.zarr/train/layer_00/c) -ge $SHARDS_BEFORE_CANCEL ]]
  else
    [[ $(n_files out/run/checkpoints) -ge 1 ]]
  fi
}

n_files() { find "$FOLDER/$1" -type f 2>/dev/null | wc -l; }

n_running() { squeue --noheader --states=running --format=%i | wc -l; }

# cancel_one: cancels a worker once both run and have begun
cancel_one() {
  until [[ $(n_running) == 2 ]] && has_begun; do sleep 0.2; done
  show squeue
  show scancel "$(squeue --noheader --states=running --format=%i | head -n 1)"
  sleep 2
  show squeue
}

SETTINGS=("run_dir=$FOLDER/out/run" "store.path=$FOLDER/out/cache.zarr" store.shard_samples=16)
[[ $STEP == extract ]] || SETTINGS+=("methods=[linear_probe,losa,bitfit]" "train.seeds=[0,1]" train.epochs=3)
readonly SETTINGS

# on_slurm NAME: the job on two SLURM jobs; what it leaves goes to FOLDER/NAME
on_slurm() {
  show python -m benchmarks.slurm_job "$STEP" pipeline.yaml "${SETTINGS[@]}"
  mv "$FOLDER/out" "$FOLDER/$1"
  show sacct --completion --format=JobID,JobName,Partition,State,Elapsed
}

compare() {
  python - "$STEP" "$FOLDER/$1" "$FOLDER/$2" <<'PYTHON'
import sys
from pathlib import Path
from benchmarks.same_results import differences, different_files, files_below, rows_by_trial

step, before, after = sys.argv[1], *map(Path, sys.argv[2:])
stores = before / "cache.zarr", after / "cache.zarr"
found = list(different_files(*stores, skip="_log") if step == "extract" else differences(before, after))
print("\n".join(found))
n_rows = 0 if step == "extract" else len(rows_by_trial(before / "run"))
n_files = len(files_below(stores[0], "_log"))
print(f"{after.name}: {n_files} files of the store and {n_rows} trials compared with {before.name}: {len(found)} differences")
sys.exit(bool(found))
PYTHON
}

main() {
  configure
  trap stop EXIT
  start_slurm
  show sinfo
  echo "# in one process"
  show python -m sidecache "$STEP" pipeline.yaml "${SETTINGS[@]/#/-o}"
  mv "$FOLDER/out" "$FOLDER/one"
  echo "# on two SLURM jobs"
  on_slurm two
  compare one two
  echo "# on two SLURM jobs, one of which is canceled"
  cancel_one &
  on_slurm canceled
  compare one canceled
}

require
mkdir -p "$FOLDER"
main 2>&1 | sed -u -e "s#$FOLDER#FOLDER#g" -e "s#\b$NODE_NAME\b#NODE#g" -e "s#\b$USER_NAME\b#USER#g" | tee "$FOLDER/log.txt"
