#!/bin/bash
# Trains Aurora under SLURM on eight nodes of eight GPUs each, and requeues itself until the run is done.
#
#   sbatch examples/slurm.sh
#
# Five minutes before the time limit SLURM sends SIGUSR1. This script forwards it to torchrun, which forwards it to
# train.py. The run finishes its step, saves and exits, and the requeued job resumes it. The folder of --out must be on
# a file system that all nodes share. The options --signals-to-handle and --shutdown-timeout of torchrun need PyTorch
# 2.14.

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

# Without this, a quarter of the memory was reserved but not used by tensors.
export PYTORCH_ALLOC_CONF=expandable_segments:True
# Without this, PyTorch 2.14 does not tell a restarted node the address of the first one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Since SLURM 22.05 srun does not inherit --cpus-per-task.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$SLURMD_NODENAME:29500" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGUSR1 --shutdown-timeout 240 \
    train.py --preset aurora-64 --data "/data/laion/{00000..41407}.tar" --out runs/laion --workers 8 "$@" &

while kill -0 $! 2>/dev/null; do wait $!; done  # the signal interrupts wait
if [ "$asked" ]; then scontrol requeue "$SLURM_JOB_ID"; else wait $!; fi
