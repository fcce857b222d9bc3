#!/usr/bin/env bash
# Documents to shards on many nodes:  TASKS=64 sbatch slurm/data_prep.sh CONFIG.yaml [key=value ...]
#
# This job finds duplicates if the configuration asks for it. Then it submits an array of TASKS jobs, each of
# which makes its share of the work, and a last job that writes the manifest when all of them have succeeded.
# A share that is killed or requeued continues where it stopped. To make what is missing, submit the same line
# again. Options for each share, such as memory or a partition:  SHARE_OPTIONS="--mem=64G --partition=cpu"
#SBATCH --job-name=data_prep
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --requeue
source slurm/preamble.sh

case "${STAGE:-submit}" in
submit)
    python -m data_prep prepare "$@" --dry_run
    python -m data_prep deduplicate "$@"
    # shellcheck disable=SC2086
    shares=$(STAGE=share sbatch --parsable --array="0-$((${TASKS:-16} - 1))" --cpus-per-task="${CPUS:-8}" \
        ${SHARE_OPTIONS:-} slurm/data_prep.sh "$@")
    merge=$(STAGE=merge sbatch --parsable --dependency="afterok:${shares}" --kill-on-invalid-dep=yes \
        slurm/data_prep.sh "$@")
    echo "submitted ${TASKS:-16} shares as job ${shares} and the merge after them as job ${merge}"
    ;;
share)
    python -m data_prep prepare "$@" num_workers="${SLURM_CPUS_PER_TASK:-1}" \
        --task "${SLURM_ARRAY_TASK_ID}" --num_tasks "${SLURM_ARRAY_TASK_COUNT}"
    ;;
merge)
    python -m data_prep merge "$@"
    ;;
esac
