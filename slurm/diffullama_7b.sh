#!/usr/bin/env bash
# DiffuLLaMA 7B. On 4 nodes of 8 GPUs; the batch of the paper is kept by accumulation.
#
#   sbatch slurm/diffullama_7b.sh [key=value ...]          # such as optimizer.lr=1e-5 run_dir=/scratch/me/run
#   sbatch --nodes=2 slurm/diffullama_7b.sh                # any number of nodes that divides the global batch
#   DS_CONFIG=ds_configs/zero3_offload.json sbatch slurm/diffullama_7b.sh
#
# GH200 nodes with 4 GPUs: sbatch --nodes=8 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=72 slurm/diffullama_7b.sh
#SBATCH --job-name=diffullama_7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source slurm/preamble.sh
train "${CONFIG:-pretrain/configs/diffullama_7b.yaml}" "${DS_CONFIG:-ds_configs/zero3.json}" train.micro_batch_size=8 "$@"
