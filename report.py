"""A page about runs: what the adversary learned, and how the network did beside the controls.

    python report.py logs/advaa                                    # logs/advaa/report/report.html, and PNGs beside it
    python report.py logs/advaa logs/random logs/none --output page

The page opens with the verdict and a table of the runs. It contains all its images and loads nothing from elsewhere.
It can be made while a run is in progress. It needs matplotlib (requirements-dev.txt).
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before the imports that take long

import argparse
from pathlib import Path

from training.exit import exit_with_status
from utils import CommandLine, UserError


def main() -> None:
    args = parse_arguments()
    from analysis import figures, sections  # after the arguments: they take seconds to import
    from analysis.page import write_page
    from analysis.runs import read_run, run_names

    if not figures.has_matplotlib():
        raise UserError("report.py needs matplotlib: pip install -r requirements-dev.txt")
    runs = [read_run(directory) for directory in dict.fromkeys(args.runs)]
    folder = args.output or args.runs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place with --output") from None
    parts = [sections.summary(runs), sections.curves(runs)]
    parts += [sections.policies(run, name, args.dataroot) for run, name in zip(runs, run_names(runs), strict=True)]
    parts.append(sections.operations(runs[0], args.dataroot))
    print(write_page(parts, folder))


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: report, in the first run's directory")
    parser.add_argument("--dataroot", metavar="DIR", help="where the run's images are, if they have been moved")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_status(main)
