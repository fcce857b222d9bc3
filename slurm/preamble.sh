# Sourced by the job scripts. They are submitted from the repository's root: sbatch slurm/....sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# MODULES: environment modules to load first, such as "cuda/12.8 gcc/13"; VENV: the environment that has this project.
if [[ -n "${MODULES:-}" ]]; then
    # shellcheck disable=SC2086
    module load ${MODULES}
fi
VENV="${VENV:-.venv}"
if [[ ! -f "${VENV}/bin/activate" ]]; then
    echo "error: no environment at ${VENV}: make setup, or set VENV" >&2
    exit 2
fi
source "${VENV}/bin/activate"
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # compute nodes rarely reach the Hub: fetch models and data before
export WANDB_MODE="${WANDB_MODE:-offline}"   # then: wandb sync RUN_DIR/wandb/offline-*
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch by itself
export NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like depend on the cluster: set them before sbatch, they are passed on.

# train CONFIG DEEPSPEED_CONFIG [key=value ...]: one process a GPU, by srun. The processes read their rank from
# Slurm. 300 s before its time is up, and when it is preempted, the job gets USR1: the run finishes its step,
# saves, and leaves with 75; then the job requeues itself, and the same command goes on.
train() {
    local nodes
    nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST}")
    MASTER_ADDR="${MASTER_ADDR:-$(head -n 1 <<<"${nodes}")}"
    MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
    export MASTER_ADDR MASTER_PORT
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of whatever submitted this job: srun sets the task's own
    local config=$1 ds_config=$2 code=0 run signalled=yes
    shift 2
    stop() { # forward it to the steps; `wait` returned early and must be called again
        signalled=yes
        scancel --signal=USR1 "${SLURM_JOB_ID}" 2>/dev/null || true
    }
    trap stop USR1 TERM
    # shellcheck disable=SC2086
    srun --kill-on-bad-exit=0 ${SRUN_OPTIONS:-} python pretrain/main.py \
        --config "${config}" --deepspeed_config "${ds_config}" "$@" &
    run=$!
    while [[ -n "${signalled}" ]]; do
        signalled="" code=0
        wait "${run}" || code=$?
    done
    if ((code == 75)); then
        echo "stopped on request; requeueing job ${SLURM_JOB_ID}"
        scontrol requeue "${SLURM_JOB_ID}"
        sleep 60 # the requeue ends this shell
    fi
    return "${code}"
}
