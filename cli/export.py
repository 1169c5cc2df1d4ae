"""coeft export: hand out what a run learnt."""

from pathlib import Path

from .arguments import Parser


def main(argv: list[str]) -> int:
    parser = Parser("export", "Hand out a run's adapter: a folder of safetensors and JSON; stock peft loads its LoRA.")
    parser.add_argument("what", choices=["adapter"])
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--out", metavar="DIR", help="a folder that does not exist yet; default: in the run directory")
    parser.add_argument("--fold", metavar="K", type=int, help="which fold's, for a cross-validation without a refit")
    arguments = parser.parse_intermixed_args(argv)
    from coeft.export import export_adapter

    out = Path(arguments.out).expanduser() if arguments.out else None
    print(export_adapter(Path(arguments.run).expanduser(), out, arguments.fold))
    return 0
