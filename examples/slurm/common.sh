# shellcheck shell=bash
# What the batch scripts of this folder share; they source it, it is not submitted itself.
#
# Compute nodes often have no internet. Training reads nothing but files, and these make sure that no library tries.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# What is compiled goes below $SLURM_TMPDIR, $TMPDIR or /tmp of each node (the program sees to that, unless
# TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR or TORCH_EXTENSIONS_DIR is set), never to a home directory that all nodes
# write at once.

# Since Slurm 22.05 srun does not take over the --cpus-per-task of the job: each task would get one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

PYTHON=${PYTHON:-.venv/bin/python}

# Where the processes meet: the first node of the job, and a port that two jobs on one node are unlikely to share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# finish CODE RUN_DIR [ASKED]: put the job back into the queue if the run says so, and exit with CODE.
# A run that was asked to stop saves a checkpoint and leaves the file `requeue`; one that finished or failed does not.
# Exit codes cannot tell these apart: launchers replace them. With ASKED, this shell got a signal: then a code other
# than 0 without the file is that of a run which the signal ended before it could save, and goes back as well.
finish() {
    local reason
    if [ -e "$2/requeue" ]; then
        reason=$(cat "$2/requeue")
    elif [ -n "${3:-}" ] && [ "$1" -ne 0 ]; then
        reason="after a signal, with code $1"
    else
        exit "$1"
    fi
    # Of an array this element alone: one of its elements has the job id of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    echo "stopped before its end ($reason): job $job goes back into the queue"
    scontrol requeue "$job"
    exit "$1"
}
