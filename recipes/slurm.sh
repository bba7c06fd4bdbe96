#!/bin/bash
# A run on N nodes of a Slurm cluster, which goes on by itself in a new job when its time is over:
#
#   sbatch --nodes 2 recipes/slurm.sh train.py --config recipes/rl.toml recipes/dapo-longact.toml --name long
#   sbatch recipes/slurm.sh sft.py --config recipes/sft.toml --out runs/8B-sft
#
# Fifteen minutes before the end Slurm signals this script, and it every rank: the run saves and ends, the job
# is requeued, and --resume auto goes on. docs/cluster.md says what to change for your cluster. VENV is the
# environment's directory (default .venv); where it does not exist, as in a container, torchrun is PATH's.
#
#SBATCH --job-name=longact
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
PATH=$(realpath -m "${VENV:-.venv}")/bin:$PATH
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-8} / gpus))}

signalled='' step=''
# srun hands the signal to each node's torchrun, and that to its ranks.
trap 'signalled=yes; kill -USR1 "$step"' USR1
# Before a preemption Slurm signals the ranks itself and requeues; this script must not end before them.
trap : TERM

# A node may end a little before another that is still saving, but if its ranks have failed, none waits for it.
srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" --rdzv-backend=c10d \
    --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=800 "$@" --resume auto &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends a wait, not what is waited for
    wait "$step"
    code=$?
done
if [ -n "$signalled" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    code=75
fi
exit "$code"
