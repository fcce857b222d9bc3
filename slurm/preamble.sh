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
