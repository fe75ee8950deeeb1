#!/bin/bash
# sbatch docs/slurm.sh config/7b.py --data.path data/texts
# Five minutes before the time is up Slurm sends USR1 to this script, which lets the run save (it ends with 143 then) and puts the
# job back into the queue; --resume then goes on from there. A job whose machine has failed is put back by Slurm itself.
#SBATCH --job-name=nanostack
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

cd "${SLURM_SUBMIT_DIR:?this is a job script: sbatch docs/slurm.sh CONFIG.py}" || exit
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1 # to the processes of the run; srun itself would kill them

# shellcheck disable=SC2016 # the variables are those of each process
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train.py "$@" --resume
' train "$@" &
step=$!
wait "$step"
status=$?
if [ "$again" ]; then # the signal ended the first wait
    wait "$step"
    status=$?
    [ "$status" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID" && status=0
fi
exit "$status"
