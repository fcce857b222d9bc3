#!/usr/bin/env bash
# Evaluate a checkpoint on the GPUs of a node.
#
#   sbatch slurm/evaluate.sh exports/diffullama_7b --tasks table1 --data_dir eval --output evaluations/7b
#   sbatch --gpus-per-node=1 slurm/evaluate.sh exports/diffugpt_s --tasks lambada --data_dir eval --output evaluations/s
#
# The same line goes on where it stopped. GPUS: processes, where Slurm does not say how many GPUs there are.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-1}}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} > GPUS ? ${SLURM_CPUS_PER_TASK:-1} / GPUS : 1))}"
source slurm/preamble.sh
srun torchrun --standalone --nproc_per_node "${GPUS}" -m tools.evaluate "$@"
