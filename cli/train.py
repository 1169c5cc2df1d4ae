"""coeft train: compose, check, then run one config, a suite, or several runs."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from coeft.config import TrainConfig, to_dict, to_yaml
from coeft.errors import UserError, near

from .arguments import Parser
from .compose import Composition, compose

LOOKED_FOR = 3.0  # seconds after which the first thing that is missing is told alone
EPILOG = """\
keys (KEY=VALUE, in any order):
  recipe=NAME or recipe=FILE.yaml     coeft list recipes
  backbone=NAME  data=NAME            coeft list backbones, coeft list datasets
  task=NAME                           classification, multi_label, regression, causal_lm, multiple_choice
  peft=NAME, peft=[NAME,NAME]         coeft list methods; peft=none trains the head alone
  peft.lora.rank=4  optim.lr=1e-3     any setting of what was chosen; --cfg job shows them all
  cv.folds=5  seeds=[0,1,2]           cross-validation; the same run with several seeds
  dry_run=true                        everything but training

examples:
  coeft train recipe=quickstart peft=[coeff,lora] peft.lora.rank=4
  coeft train backbone=vit_base data=image_folder data.root=~/flowers peft=coeff
  coeft train recipe=text/sentiment data.path=reviews.csv
  coeft train recipe=llm/chat data.path=chats.jsonl
  coeft train --config-dir RUN --config-name config             repeats a run
  coeft train -m recipe=quickstart optim.lr=1e-3,1e-4           one run for each value

The run directory's path is the last line on standard output.
"""


def parser() -> Parser:
    found = Parser("train", "Train with a recipe, or with backbone=, data= and peft=.", EPILOG)
    found.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    found.add_argument("-c", "--cfg", metavar="job", help="print the checked config instead of running it")
    found.add_argument("--resolve", action="store_true", help="with --cfg: accepted; what is printed is resolved")
    found.add_argument("-p", "--package", metavar="KEY", help="with --cfg: print only this part, such as optim")
    found.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder with options of your own, or a run")
    found.add_argument("-cn", "--config-name", metavar="NAME", help="a config in that folder, without .yaml")
    found.add_argument("-m", "--multirun", action="store_true", help="one run for each combination of a,b values")
    found.add_argument("-r", "--run", action="store_true", help="one run (as without it)")
    return found


def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.cfg not in (None, "job"):
        raise UserError(f"--cfg {arguments.cfg}: only --cfg job; coeft keeps Hydra's own settings to itself")
    if (arguments.resolve or arguments.package) and not arguments.cfg:
        raise UserError("--resolve and --package belong to --cfg job")
    compositions = compose(
        arguments.overrides,
        config_dir=arguments.config_dir,
        config_name=arguments.config_name,
        multirun=arguments.multirun,
    )
    if arguments.cfg:
        print("---\n".join(_shown(composition.config, arguments.package) for composition in compositions), end="")
        return 0
    for number, composition in enumerate(compositions, 1):
        if len(compositions) > 1:
            print(f"run {number} of {len(compositions)}", file=sys.stderr)
        _run(composition)
    return 0


def _shown(config: TrainConfig, package: str | None) -> str:
    if package is None:
        return to_yaml(config, keep_run_dir=True)
    from omegaconf import OmegaConf

    node: Any = to_dict(config)
    for part in package.split("."):
        if not isinstance(node, dict) or part not in node:
            raise UserError(f"--package {package}: no {part!r}; {near(part, node if isinstance(node, dict) else [])}")
        node = node[part]
    return OmegaConf.to_yaml(OmegaConf.create(node)) if isinstance(node, dict | list) else f"{node}\n"


def _check(configs: Iterable[TrainConfig]) -> None:
    """Look for data and models before torch is imported and anything is trained.

    Raises:
        UserError: what is missing, of all runs as far as that can be said in a few seconds.
    """
    started = time.monotonic()
    problems: list[str] = []
    for settings in (settings for config in configs for settings in (config.data, config.backbone)):
        if problems and time.monotonic() - started > LOOKED_FOR:
            break  # a network that does not answer takes seconds each time
        try:
            if hasattr(settings, "check"):
                settings.check()
        except UserError as error:
            problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _run(composition: Composition) -> None:
    _check((composition.members or {"": composition.config}).values())
    if composition.config.dry_run:
        from coeft.dry_run import dry_run

        for name, config in (composition.members or {"": composition.config}).items():
            if name:
                print(f"\n{name}", file=sys.stderr)
            dry_run(config)
    elif composition.members:
        from coeft.suite import run_suite

        print(run_suite(composition.config, composition.members))
    else:
        from coeft.ranks import speaks
        from coeft.train import train

        run_dir = train(composition.config)
        if speaks():
            print(run_dir)
