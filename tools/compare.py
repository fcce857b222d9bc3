"""Compare evaluated models: scores beside each other, and paired differences from the first with 95% intervals.

    python -m tools.compare results/gpt2 results/diffugpt                  # prints, and writes comparison/
    python -m tools.compare results/a results/b results/c --paper --output comparisons/abc

In: folders that `python -m tools.evaluate` or `python -m tools.nelbo` has written. Out: compare.md and compare.html,
which needs no other file. Models are compared on the examples that both have; an example with the same id that is not
the same is an error. With --paper the published numbers stand beside, with their known faults.
"""

import sys
from pathlib import Path

from rich.console import Console

from common.cli import command, make_parser
from common.errors import UserError
from common.files import write_atomically

from .evaluation import comparison_page
from .evaluation.comparison import compare, read_evaluations

OWN = "<!-- written by python -m tools.compare -->"  # how both files begin
FEWEST_RESAMPLES = 100


def check_output(folder: Path) -> list[Path]:
    """compare.md and compare.html in `folder`, which is made. Raises UserError where other things have these names."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror}") from None
    files = [folder / "compare.md", folder / "compare.html"]
    for path in files:
        if path.is_dir() or (path.exists() and OWN.encode() not in path.read_bytes()[:200]):
            raise UserError(f"{path} is not of this command and would be lost; choose another --output")
    return files


@command
def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = make_parser("python -m tools.compare", __doc__)
    parser.add_argument("folders", nargs="+", metavar="OUT", help="results; the others are compared with the first")
    parser.add_argument("--output", default="comparison", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--paper", action="store_true", help="show Tables 1 and 9 of arXiv 2410.17891 beside")
    parser.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: %(default)s")
    args = parser.parse_args(argv)
    if args.resamples < FEWEST_RESAMPLES:
        raise UserError(f"--resamples is {args.resamples}, expected at least {FEWEST_RESAMPLES}")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected 0 or more")
    evaluations = read_evaluations(args.folders)
    pages = check_output(Path(args.output))
    comparison = compare(evaluations, args.resamples, args.seed)
    tables = comparison_page.grids(comparison, args.paper)
    sentences = comparison_page.remarks(comparison, args.paper)
    markdown = f"{OWN}\n# Comparison\n\n{comparison_page.markdown(tables, sentences)}"
    html = f"<!doctype html>\n{OWN}\n{comparison_page.html(tables, sentences, comparison)}"
    for path, content in zip(pages, (markdown, html), strict=True):
        write_atomically(path, content.encode())
    console = Console(highlight=False, markup=False)
    for grid in tables:
        console.print(comparison_page.terminal_table(grid))
    for sentence in sentences:
        console.print(f"- {sentence}")
    console.print(f"wrote {pages[0]} and {pages[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
