"""Push models to the Hugging Face Hub, and pull them. HF_TOKEN and HF_ENDPOINT say who and where.

    python -m tools.hub push exports/diffugpt_s my-team/diffugpt_s               # a folder, to main
    python -m tools.hub watch runs/diffugpt_s my-team/diffugpt_s --every 1000    # each checkpoint due, beside training
    python -m tools.hub pull my-team/diffugpt_s models/diffugpt_s --revision step_1000

`watch` pushes checkpoint 1000 as revision step_1000, and the newest also as main. It ends when the run has finished.
Each command can be killed and given again at any moment. See docs/hub.md.
"""

import argparse
import signal
import sys

from common.cli import make_parser, resumable_command
from common.log import log

from . import repository
from .hub_watch import POLL_SECONDS, watch
from .weights import DTYPES


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m tools.hub", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="push, watch or pull")
    push = verbs.add_parser("push", help="upload a folder that tools.export has written")
    push.add_argument("folder", help="with config.json and safetensors")
    push.add_argument("repo_id", metavar="org/name", help="is created where it is missing")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")
    push.add_argument("--private", action="store_true", help="a new repository is private; an error for a public one")
    watched = verbs.add_parser("watch", help="export and push a run's checkpoints as they come")
    watched.add_argument("run_dir", help="what `run_dir` is in training; may not exist yet")
    watched.add_argument("repo_id", metavar="org/name", help="is created where it is missing")
    watched.add_argument(
        "--every", type=int, required=True, metavar="N", help="push checkpoints of every N steps, and the run's last"
    )
    watched.add_argument("--private", action="store_true", help="as of push")
    watched.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as trained")
    watched.add_argument(
        "--poll", type=float, default=POLL_SECONDS, metavar="SECONDS", help="between looks; default: %(default)g"
    )
    watched.add_argument("--once", action="store_true", help="push what is there, then end")
    pull = verbs.add_parser("pull", help="download a model")
    pull.add_argument("repo_id", metavar="org/name")
    pull.add_argument("out_dir", help="the folder to write; must be empty or not exist")
    pull.add_argument("--revision", metavar="REVISION", help="a branch, tag or commit; default: main")
    return parser


@resumable_command
def main(argv: list[str] | None = None) -> int:
    """Push, watch or pull; returns the exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    if args.verb == "push":
        log.info("pushed %s", repository.push(args.folder, args.repo_id, args.revision, args.private))
    elif args.verb == "pull":
        log.info("wrote %s", repository.pull(args.repo_id, args.out_dir, args.revision))
    else:
        watch(args.run_dir, args.repo_id, args.every, args.private, args.dtype, args.poll, args.once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
