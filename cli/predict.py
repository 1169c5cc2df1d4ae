"""coeft predict: predictions for files, a folder, a table, texts or standard input."""

import sys
from pathlib import Path

from coeft.errors import UserError

from .arguments import Parser


def main(argv: list[str]) -> int:
    parser = Parser("predict", "Predict with a finished run: a CSV row (input, prediction, probabilities) for each.")
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="files, folders, tables, texts; - reads standard input, one a line"
    )
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.inputs and sys.stdin.isatty():
        raise UserError("predict: give an INPUT: an image, a folder, a table, a text, or - for standard input")
    from coeft.predict import predict

    predict(
        Path(arguments.run).expanduser(),
        arguments.inputs or ["-"],
        Path(arguments.out).expanduser() if arguments.out else None,
    )
    return 0
