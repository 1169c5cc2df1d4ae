"""coeft resume: continue an interrupted run, fold or suite."""

from pathlib import Path

from .arguments import Parser


def main(argv: list[str]) -> int:
    parser = Parser("resume", "Continue an interrupted run, cross-validation or suite.")
    parser.add_argument("run", metavar="RUN", help="the run directory")
    arguments = parser.parse_args(argv)
    from coeft.train import resume

    print(resume(Path(arguments.run).expanduser()))
    return 0
