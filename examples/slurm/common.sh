# shellcheck shell=bash
# What the batch scripts of this folder share; they source it, it is not submitted itself.
#
#   launch COMMAND…            run the command as a step of the job, one task per device
#   finish CODE RUN [ASKED]    decide whether the job goes back into the queue, and exit with CODE
#
# Variables of the user:
#   PYTHON            the interpreter (.venv/bin/python)
#   MAX_RESTARTS      how often a job is started again after a loss (10); preemptions and time limits do not count
#   EXCLUDE_SUSPECT   set to 1, a job that lost a node goes back into the queue without that node
#   SRUN_OPTIONS      more options for srun, such as those of containers (python_in_apptainer.sh has examples)
#   SLURM_WAIT        seconds that srun waits for the other tasks after the first has ended (15)
#
# docs/clusters.md has a table of what happens when.

# Print why the job cannot begin, and end.
refuse() {
    echo "error: $*" >&2
    exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || refuse "$0 is no job of Slurm: submit it with sbatch"
command -v scontrol srun >/dev/null || refuse "scontrol or srun is not in PATH on $(hostname): the batch script needs both"

# Compute nodes often have no internet. Training reads nothing but files, and these make sure that no library tries.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# What is compiled goes below $SLURM_TMPDIR, $TMPDIR or /tmp of each node (the program sees to that, unless
# TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR or TORCH_EXTENSIONS_DIR is set), never to a home directory that all nodes
# write at once.

# Since Slurm 22.05 srun does not take over the --cpus-per-task of the job. Where Slurm binds tasks to cores, each would
# get one.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# srun is not told of a task whose slurmstepd or node has vanished, and would wait for it until the time limit.
export SLURM_WAIT=${SLURM_WAIT:-15}

PYTHON=${PYTHON:-.venv/bin/python}

# Of an array this element alone: one of its elements has the job id of the whole array, and "scontrol requeue" of that
# id starts all elements again.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Where the processes meet: the first node of the job, on which this script runs, and a port below those that Linux gives
# to any outgoing connection (32768 and up).
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)
[ ${#nodes[@]} -gt 0 ] ||
    refuse "scontrol tells no nodes of job $SLURM_JOB_ID on $(hostname): is SLURM_CONF (${SLURM_CONF:-unset}) Slurm's configuration?"
MASTER_ADDR=${nodes[0]}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

# another_port: far from those of jobs submitted before or after this one, which may run on the same node.
another_port() { MASTER_PORT=$((20000 + (MASTER_PORT - 20000 + 4001) % 12000)); }

# find_port: leave MASTER_PORT if nobody listens there, or take another that is free.
find_port() {
    local try
    for try in {1..100}; do
        (: >"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null || (: >"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || return 0
        echo "port $MASTER_PORT of $MASTER_ADDR is taken: trying another" >&2
        another_port
    done
}
find_port

# What srun and the tasks say on standard error.
messages=$(mktemp) || refuse "no temporary file on $(hostname): set TMPDIR to a directory that the job can write"
trap 'rm -f "$messages"' EXIT

# A node that was away when a step was ended is told so when it is back, by the step's number. So the steps of a job that
# starts again have other numbers than those of the start before; steps that do nothing use up the lower ones.
for ((unused = ${SLURM_RESTART_COUNT:-0} % 10; unused > 0; unused--)); do
    srun --quiet --nodes=1 --ntasks=1 true
done

# launch COMMAND…: run it with srun and return srun's exit code. What is said on standard error is kept in $messages too.
launch() {
    local try tee code options left
    read -ra options <<<"${SRUN_OPTIONS:-}"
    for try in 1 2 3; do
        # The signals that ask the job to stop must not take the log from it.
        srun --kill-on-bad-exit=1 "${options[@]}" "$@" 2> >(trap '' TERM USR1 INT HUP && exec tee "$messages" >&2)
        code=$? tee=$!
        for ((left = 30; left > 0; left--)); do # it ends with srun, unless something of srun is left
            kill -0 "$tee" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$tee" 2>/dev/null
        # Between `find_port` and the start of the processes another program may have taken the port.
        if [ "$try" = 3 ] || ! grep -q '^error: MASTER_PORT: .* is taken' "$messages"; then break; fi
        another_port
        find_port
    done
    return "$code"
}

# fact NAME: the value of NAME in $facts, which is the job's line of `scontrol show job`; nothing without it.
fact() { [[ " $facts" =~ \ $1=([^ ]*) ]] && echo "${BASH_REMATCH[1]}"; }

# ask_slurm: set `facts`; Slurm is asked for half a minute, because without an answer an unfinished run would count as done.
ask_slurm() {
    local try
    for try in 1 2 3 4 5 6; do
        facts=$(scontrol --oneliner show job "$job" 2>/dev/null) && return
        [ "$try" = 6 ] || sleep "${REQUEUE_PAUSE:-5}"
    done
    return 1
}

# node_of TASK: the name of the node on which that task of the step runs.
node_of() { echo "${nodes[$1 / ${SLURM_NTASKS_PER_NODE:-1}]:-an unknown node}"; }

# find_cause CODE: set `cause` (fault, memory, start or loss), `what` in words, `suspect`, a node or nothing, and `code`.
#
# srun's exit code is the largest of all tasks, and those that it ends itself because another has failed are among them.
# What comes first in its messages tells more: the cause. But exit code 3 is what the others end with when one is gone, and
# 1 what a deepspeed launcher ends with when srun ends it, and srun itself after a kill for lack of memory. Above 128 is a
# death by signal: 137 of a shell, 247 of a launcher.
find_cause() {
    local line node task ending='' failed='srun: error: ([^ ]+): tasks? ([0-9]+)[^:]*: (.*)'
    cause='' what='' suspect=''
    while read -r line; do
        if [[ $line =~ "Node failure on "([^ ]+) || $line =~ "failed on node "([^ :]+) ]]; then
            cause=loss what="node ${BASH_REMATCH[1]} was lost" suspect=${BASH_REMATCH[1]}
            return
        elif [[ $line =~ "Unable to create step for job "[0-9]+": "(.*) ]]; then # nothing of ours has begun
            cause=start what="Slurm did not start its processes: ${BASH_REMATCH[1]}"
        elif [[ $line =~ Terminating\ StepId ]]; then
            ending=1
        elif [ -n "$cause" ]; then
            continue
        elif [[ $line =~ StepId=[^\ ]+\ tasks?\ ([0-9]+)[^:]*:\ running ]]; then # srun has waited for it in vain
            task=${BASH_REMATCH[1]} suspect=$(node_of "$task")
            cause=loss what="nothing was heard of task $task on $suspect"
        elif [[ $line =~ $failed ]]; then
            node=${BASH_REMATCH[1]} task=${BASH_REMATCH[2]} line=${BASH_REMATCH[3]}
            case $line in
            "Exited with exit code 3") what=${what:-task $task on $node lost contact with another, or saw no progress} ;;
            "Exited with exit code "*)
                [ -z "$ending" ] || [ "${line##* }" != 1 ] || continue
                cause=fault what="task $task on $node ended with exit code ${line##* }" code=${line##* }
                if [ "$code" -gt 128 ]; then cause=loss suspect=$node; fi
                ;;
            Killed* | Terminated*)
                [ -z "$ending" ] || continue # by srun
                cause=loss what="task $task on $node: $line" suspect=$node
                ;;
            "Out Of Memory"*) cause=memory what="task $task on $node ran out of memory" ;;
            *) cause=loss what="task $task on $node: $line" suspect=$node ;;
            esac
        fi
    done <"$messages"
    what=${what:-exit code $1}
    [ -z "$cause" ] || return 0
    cause=fault
    if [ "$1" = 3 ] || [ "$1" -gt 128 ]; then cause=loss; fi
}

# last_update RUN: the newest update in its records; nothing where it has none.
last_update() { tail -n 2 "$1/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\),.*/\1/p' | tail -n 1; }

# may_try_again RUN: whether a job that lost something is started again: set `loss`, the line to be added to RUN/losses when
# it is; if not, set `why`. Such a line is: job, update, cause, node=SUSPECT or -, and in words.
may_try_again() {
    local update lost last count tries=0
    update=$(last_update "$1")
    # A directory that is not a run yet must stay empty; so without records only the job's first start has another try,
    # and of starts that Slurm refused, which it may do once after a requeue, only the second.
    if [ -z "$update" ] || [ ! -e "$1/config.yaml" ]; then
        why="and no update was made in an earlier start either"
        [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || why="in the job's first start"
        [ "$cause" != start ] || tries=1
        [ "${SLURM_RESTART_COUNT:-0}" = "$tries" ]
        return
    fi
    lost=$(grep -s "^$job " "$1/losses")
    last=$(tail -n 1 <<<"$lost") count=$(grep -c . <<<"$lost")
    if [ "$cause" = memory ] && [[ $lost == *" memory "* ]]; then
        why="for the second time"
    elif [[ $last == "$job $update "* ]] && [[ $cause != start || $last == *" start - "* ]]; then
        why="at update $update, where it was lost before"
    elif [ "$count" -ge "${MAX_RESTARTS:-10}" ]; then
        why="after MAX_RESTARTS=${MAX_RESTARTS:-10} restarts"
    elif ! : >>"$1/losses"; then
        why="and $1/losses cannot be written"
    else
        loss="$job $update $cause ${suspect:+node=}${suspect:--} $what"
        return 0
    fi
    return 1
}

# decide CODE RUN [ASKED]: set `verdict` to done, stays (out of the queue), requeued (by Slurm) or requeue, and `why`.
#
# What `scontrol show job` says after a SIGTERM (Slurm 22.05):
#
#   | why the job ends                      | JobState   | Reason    | Restarts | PreemptTime    | Slurm itself       |
#   | scancel                               | COMPLETING | None      | as before| None or absent | nothing            |
#   | requeued by somebody                  | COMPLETING | None      | one more | absent         | requeues           |
#   | preempted, REQUEUE, grace time over   | COMPLETING | None      | one more | absent         | requeues           |
#   | preempted, REQUEUE, in the grace time | RUNNING    | None      | as before| a time         | requeues at its end|
#   | preempted, CANCEL; or scancel in the  | COMPLETING | None      | as before| a time         | nothing            |
#   |   grace time                          |            |           |          |                |                    |
#   | time limit                            | COMPLETING | TimeLimit | as before| None or absent | nothing            |
decide() {
    local mark='' mode preempted
    [ ! -e "$2/requeue" ] || mark=$(cat "$2/requeue")
    verdict='done' why=
    if [ "$1" = 0 ] && [ -z "$mark" ]; then return; fi
    find_cause "$1"
    [ -z "$mark" ] || suspect='' # it ended in good order
    why=${mark:-$what}
    verdict=stays
    if [[ $mark == "file "* && -z ${3:-} ]]; then return; fi # somebody's file `stop`
    if ! ask_slurm; then verdict=unknown && return; fi
    preempted=$(fact PreemptTime)
    [ "$preempted" != None ] || preempted=
    mode=$(scontrol --oneliner show partition "${SLURM_JOB_PARTITION:-}" 2>/dev/null)
    [[ " $mode" =~ \ PreemptMode=([^\ ]*) ]] && mode=${BASH_REMATCH[1]} || mode=
    if [ "$(fact Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
        verdict=requeued
    elif [ -n "$preempted" ] && [[ $mode == *CANCEL* ]]; then
        why+=", preempted in a partition that cancels (PreemptMode=CANCEL)"
    elif [ "$(fact Reason)" = TimeLimit ]; then
        verdict=requeue why+=", its time was up"
    elif [[ ! $(fact JobState) =~ ^(RUNNING|SIGNALING|RESIZING|STOPPED|SUSPENDED)$ ]]; then # SIGNALING: by --signal
        why+=", cancelled"
    elif [ -n "$preempted" ]; then
        verdict=requeue why+=", preempted"
    elif [ -n "$mark" ]; then
        verdict=requeue
    elif [ -n "${3:-}" ]; then
        verdict=requeue why="after a signal, $what"
    elif [ "$cause" = fault ]; then
        verdict=failed
    elif may_try_again "$2"; then
        verdict=requeue why=$what
    else
        verdict=failed why="$what, $why"
    fi
    if [ "$verdict" = requeue ] && [ "$(fact Requeue)" = 0 ]; then
        verdict=stays why+=", and Slurm may not requeue it (sbatch --no-requeue)"
    fi
}

# requeue: ask for it. Slurm, or somebody, may have done so meanwhile.
requeue() {
    local try
    for try in 1 2 3 4 5 6; do
        scontrol requeue "$job" && break
        [ "$try" -lt 6 ] || return 1
        if ask_slurm && [ "$(fact Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then break; fi
        sleep "${REQUEUE_PAUSE:-5}"
    done
    if [ -n "$suspect" ] && [ "${EXCLUDE_SUSPECT:-}" = 1 ]; then
        scontrol update "JobId=$job" "ExcNodeList=$suspect" && echo "from now on without node $suspect"
    fi
    return 0
}

# finish CODE RUN [ASKED]: put the job back into the queue if that is right, and exit with CODE; docs/clusters.md has a
# table.
#
# A run that was asked to stop saves a checkpoint and leaves the file `requeue`; one that finished or failed does not. With
# ASKED, this shell got a signal: a code other than 0 without the file is then that of a run which the signal ended before
# it could save. What somebody has stopped for good, by scancel or by a file `stop` of his own, stays out of the queue.
finish() {
    local code=$1 verdict why cause='' what='' suspect='' loss='' facts=''
    decide "$@"
    case $verdict in
    stays) echo "stopped before its end ($why): not requeued; submit the job again to continue" ;;
    requeued) echo "stopped before its end ($why): Slurm has put job $job back into the queue" ;;
    failed)
        echo "error: the run failed ($why): see the messages above; the job does not start again by itself" >&2
        [ -z "$suspect" ] || echo "node $suspect is suspected: sbatch --exclude=$suspect starts without it" >&2
        ;;
    requeue)
        echo "stopped before its end ($why): job $job goes back into the queue"
        [ -z "$suspect" ] || echo "node $suspect is suspected (EXCLUDE_SUSPECT=1 has the job start without it)"
        if ! requeue; then
            verdict=unknown
        elif [ -n "$loss" ]; then
            echo "$loss" >>"$2/losses"
        fi
        ;;
    esac
    if [ "$verdict" = unknown ]; then
        echo "error: job $job could not be requeued: Slurm does not answer; the run is not finished: submit it again" >&2
        exit 75
    fi
    exit "$code"
}
