#!/bin/bash
# Aurora under SLURM: eight nodes of eight GPUs, queued again by itself until the run is done.
#
#   sbatch examples/slurm.sh
#
# Five minutes before the time is up SLURM sends SIGUSR1 to this script, which passes it on to torchrun, and that to
# train.py: it ends its step, saves, and leaves. Then the job queues itself again, and the same command goes on from
# there. The folder of --out must be one that all nodes see.

#SBATCH --job-name=aurora
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=aurora-%j.out

trap 'asked=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a node that comes back is not told the address of the first one

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$SLURMD_NODENAME:29500" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGUSR1 --shutdown-timeout 240 \
    train.py --preset aurora-64 --data "/data/laion/{00000..41407}.tar" --out runs/laion --workers 8 "$@" &

while kill -0 $! 2>/dev/null; do wait $!; done
[ -z "$asked" ] || scontrol requeue "$SLURM_JOB_ID"
