#!/bin/bash
# Written by fulltune launch
#SBATCH --job-name={{ job.name }}
#SBATCH --nodes={{ train.num_machines }}
#SBATCH --ntasks-per-node=1
#SBATCH --output={{ job.name }}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# edit: cores and GPUs of each node (or --gres=gpu:a100:8), and how many seconds before the time limit to save
#SBATCH --cpus-per-task={{ cores }}
{% if job.gpus %}
#SBATCH --gpus-per-node={{ job.gpus }}
{% endif %}
#SBATCH --signal=TERM@120
#
# edit: what your cluster requires; lines with ## have no effect
##SBATCH --partition=gpu
##SBATCH --account=NAME
##SBATCH --qos=NAME
##SBATCH --time=12:00:00
##SBATCH --mem=0
##SBATCH --constraint=NAME
##SBATCH --exclusive
#
# Names are quoted so that nothing in them is expanded:
# shellcheck disable=SC2016

# edit: how often an interrupted run is queued again
max_requeues=100

# edit: the recipe's folder as the nodes see it
cd {{ [folder] | shell }} || exit 2

# edit: what loads fulltune's environment: module load cuda, source /venv/bin/activate
export PATH="$PATH":{{ [programs] | shell }}

# edit: the command; add --wait-for-machines 30m where the nodes do not start at once
command=({{ job.command | shell }})

# Slurm also signals this shell before the time limit. It keeps running to see how the tasks end.
trap ':' TERM
{% if train.num_machines > 1 %}
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
rendezvous="$first:$((10000 + SLURM_JOB_ID % 20000))"
export rendezvous
{% endif %}
# An interrupted machine has saved. It exits with 0, because srun would otherwise end the ones that still save.
interrupted="fulltune-$SLURM_JOB_ID.interrupted"
export interrupted
rm -f "$interrupted"
task='
trap : TERM
"$@"{{ ' --machine-rank "$SLURM_NODEID" --rendezvous "$rendezvous"' if train.num_machines > 1 }}
code=$?
if ((code == 75)); then : > "$interrupted"; exit 0; fi
exit "$code"
'
# Without --mpi=none, libraries would mistake the variables of Slurm's MPI for those of their own launcher. Since Slurm
# 22.05 a step does not inherit --cpus-per-task.
srun --mpi=none --kill-on-bad-exit=1{{ ' --label' if train.num_machines > 1 }} ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    bash -c "$task" fulltune-machine "${command[@]}"
code=$?
if ((code == 0)) && [[ -e "$interrupted" ]]; then
    code=75
fi
rm -f "$interrupted"
# After scancel, or if Slurm itself requeues the job, it is no longer running and is not requeued here.
if ((code == 75)) && [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
    if ((${SLURM_RESTART_COUNT:-0} < max_requeues)); then
        echo "interrupted and saved; queued again"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "interrupted and saved after $max_requeues requeues; not queued again" >&2
    fi
fi
exit "$code"
