#!/usr/bin/env bash
# Evaluate the checkpoints of a run while it trains, as its `evaluation` settings say. One GPU, or none.
#
#   sbatch slurm/diffugpt_s.sh evaluation.tasks=lambada,piqa evaluation.every=1000 evaluation.device=cuda \
#       evaluation.launch=false evaluation.data_dir=eval run_dir=runs/diffugpt_s
#   sbatch slurm/evaluate_run.sh runs/diffugpt_s [--once]
#
# It ends when the run has finished. Before its own time is up it requeues itself, and goes on.
#SBATCH --job-name=evaluate_run
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
source slurm/preamble.sh
trap 'scontrol requeue "${SLURM_JOB_ID}"' USR1
python -m tools.evaluate_run "$@" &
wait $!
