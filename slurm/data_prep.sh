#!/usr/bin/env bash
# Documents to shards on many nodes:  TASKS=64 sbatch slurm/data_prep.sh CONFIG.yaml [key=value ...]
#
# This job submits an array of TASKS jobs, each of which makes its share of the work, and a job that writes the manifest
# when all of them have succeeded. With `deduplicate: exact` there are two more before them: an array that hashes the
# documents, and one job that finds the duplicates. VERIFY=1 adds an array after them that checks every shard. A job that
# is killed or requeued continues where it stopped. To make what is missing, submit the same line again. CPUS=8 is for
# each of these jobs; other options for each, such as memory or a partition:  SHARE_OPTIONS="--mem=64G --partition=cpu"
#SBATCH --job-name=data_prep
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --requeue
source slurm/preamble.sh

tasks="${TASKS:-16}"
share=("${SLURM_CPUS_PER_TASK:-1}" "${SLURM_ARRAY_TASK_ID:-0}" "${SLURM_ARRAY_TASK_COUNT:-1}")

# submit STAGE AFTER [option ...] -- argument ...: a job that begins when job AFTER ("": none) has succeeded
submit() {
    local stage=$1 after=$2 options=() job
    shift 2
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    [[ -z "${after}" ]] || options+=(--dependency="afterok:${after}" --kill-on-invalid-dep=yes)
    job=$(STAGE="${stage}" sbatch --parsable ${options[@]+"${options[@]}"} slurm/data_prep.sh "$@") || return # -e does not reach here
    echo "${job%%;*}" # a federation's cluster comes after it
}

# setting NAME CONFIG [key=value ...]: a setting's value
setting() {
    python - "$@" <<'END'
import sys

from common.config import load_config
from data_prep.config import PrepareConfig

print(getattr(load_config(PrepareConfig, sys.argv[2], sys.argv[3:], interpolate=False), sys.argv[1]))
END
}

case "${STAGE:-submit}" in
submit)
    python -m data_prep prepare "$@" --dry_run
    # shellcheck disable=SC2206
    each=(--cpus-per-task="${CPUS:-8}" ${SHARE_OPTIONS:-})
    array=(--array="0-$((tasks - 1))" "${each[@]}")
    deduplicate=$(setting deduplicate "$@") # by itself: in a condition, a failure would count as "none"
    before=""
    if [[ "${deduplicate}" == exact ]]; then
        hashes=$(submit hash "" "${array[@]}" -- "$@")
        before=$(submit choose "${hashes}" "${each[@]}" -- "$@")
        echo "submitted ${tasks} jobs that hash as job ${hashes} and the choice after them as job ${before}"
    fi
    shares=$(submit share "${before}" "${array[@]}" -- "$@")
    merge=$(submit merge "${shares}" -- "$@")
    if [[ -n "${VERIFY:-}" ]]; then
        checks=$(submit verify "${merge}" "${array[@]}" -- "$@")
        echo "submitted ${tasks} checks of the shards as job ${checks}"
    fi
    echo "submitted ${tasks} shares as job ${shares} and the merge after them as job ${merge}"
    ;;
hash)
    python -m data_prep deduplicate "$@" num_workers="${share[0]}" --task "${share[1]}" --num_tasks "${share[2]}"
    ;;
choose)
    python -m data_prep deduplicate "$@" num_workers="${share[0]}"
    ;;
share)
    python -m data_prep prepare "$@" num_workers="${share[0]}" --task "${share[1]}" --num_tasks "${share[2]}"
    ;;
merge)
    python -m data_prep merge "$@"
    ;;
verify)
    output_dir=$(setting output_dir "$@")
    python -m data_prep verify "${output_dir}" --num_workers "${share[0]}" --task "${share[1]}" --num_tasks "${share[2]}"
    ;;
esac
