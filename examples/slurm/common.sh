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

# Where the processes meet: the first node of the job, and a port that two jobs on one node are unlikely to share, below
# those that Linux gives to any outgoing connection (32768 and up).
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

# cancelled JOB: whether somebody has ended it with scancel: it is ending, but its time is not up and it is not preempted.
cancelled() {
    local facts
    facts=" $(scontrol --oneliner show job "$1" 2>/dev/null) "
    [[ $facts =~ \ JobState=(CANCELLED|COMPLETING)\  && $facts == *" Reason=None "* && $facts == *" PreemptTime=None "* ]]
}

# requeue JOB: scontrol is asked again for half a minute, since without an answer an unfinished run would count as done.
requeue() {
    local try
    for try in 1 2 3 4 5 6; do
        scontrol requeue "$1" && return
        [[ " $(scontrol --oneliner show job "$1" 2>/dev/null) " == *" JobState=PENDING "* ]] && return # somebody else did
        [ "$try" = 6 ] || sleep "${REQUEUE_PAUSE:-5}"
    done
    echo "error: job $1 could not be requeued; the run is not finished: submit it again to continue" >&2
    exit 75
}

# finish CODE RUN_DIR [ASKED]: put the job back into the queue if the run says so, and exit with CODE.
# A run that was asked to stop saves a checkpoint and leaves the file `requeue`; one that finished or failed does not.
# Exit codes cannot tell these apart: launchers replace them. With ASKED, this shell got a signal: then a code other
# than 0 without the file is that of a run which the signal ended before it could save, and goes back as well.
# What somebody has stopped for good, by scancel or by a file `stop` of his own, does not.
finish() {
    local reason
    if [ -e "$2/requeue" ]; then
        reason=$(cat "$2/requeue")
        if [[ $reason == "file "* && -z ${3:-} ]]; then
            echo "stopped before its end ($reason): not requeued; submit the job again to continue"
            exit "$1"
        fi
    elif [ -n "${3:-}" ] && [ "$1" -ne 0 ]; then
        reason="after a signal, with code $1"
    else
        exit "$1"
    fi
    # Of an array this element alone: one of its elements has the job id of the whole array.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    if cancelled "$job"; then
        echo "stopped before its end ($reason), cancelled: not requeued; submit the job again to continue"
        exit "$1"
    fi
    echo "stopped before its end ($reason): job $job goes back into the queue"
    requeue "$job"
    exit "$1"
}
