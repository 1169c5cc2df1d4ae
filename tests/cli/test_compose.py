"""Command lines to checked configs: what is accepted, what comes out, and what is refused with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coeft.cli.compose import compose, encode, read_value
from coeft.cli.main import main
from coeft.cli.recipes import read_recipe
from coeft.config import Allowed, TrainConfig, load_config, to_dict, to_yaml
from coeft.errors import UserError
from coeft.optim.adamw import AdamW

RECIPE = """\
# A recipe of the tests.
defaults:
  - override /backbone: vit_tiny
  - override /data: digits
  - override /peft: [coeff, lora]
  - override /optim: adamw

backbone:
  pretrained: false
data:
  batch_size: 17
peft:
  coeff:
    dropout: 0.3
  lora:
    rank: 4
optim:
  lr: 5.0e-4
cv:
  folds: 5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "Mein Rezept, ünï (1) [a]=b.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def one(*overrides: str, **flags: str) -> TrainConfig:
    compositions = compose(overrides, **flags)  # type: ignore[arg-type]
    assert len(compositions) == 1 and not compositions[0].members
    return compositions[0].config


def refused(*overrides: str, **flags: str) -> list[str]:
    with pytest.raises(UserError) as error:
        compose(overrides, **flags)  # type: ignore[arg-type]
    return str(error.value).splitlines()


def test_without_a_recipe_the_defaults_apply() -> None:
    config = one()
    assert (config.recipe, config.backbone.name, config.data.kind) == (None, "vit_tiny_patch16_224", "digits")
    assert list(config.peft) == ["coeff"]
    assert (config.optim.kind, config.task.kind, config.logger.kind) == ("adamw", "classification", "csv")


def test_precedence_is_defaults_recipe_command_line(recipe: Path) -> None:
    config = one(f"recipe={recipe}", "peft.lora.alpha=3", "optim.weight_decay=0.5", "optim.lr=2e-3", "seed=7")
    assert config.recipe == "Mein Rezept, ünï (1) [a]=b"
    assert (config.peft["lora"].rank, config.peft["lora"].alpha, config.peft["lora"].dropout) == (4, 3.0, 0.0)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.schedule) == (2e-3, 0.5, "cosine")
    assert (config.cv.folds, config.cv.stratified, config.seed) == (5, True, 7)


@pytest.mark.parametrize(
    ("typed", "stack"),
    [
        ("peft=lora", ["lora"]),
        ("peft=[lora]", ["lora"]),
        ("peft=[lora,coeff]", ["lora", "coeff"]),
        ("peft=[coeff,lora]", ["coeff", "lora"]),
        ("peft=[bitfit,coeff]", ["bitfit", "coeff"]),
        ("peft=none", []),
        ("peft=[none]", []),
        ("peft=full", ["full"]),
    ],
)
def test_a_typed_stack_replaces_the_recipes(recipe: Path, typed: str, stack: list[str]) -> None:
    config = one(f"recipe={recipe}", typed)
    assert list(config.peft) == stack
    assert "lora" not in stack or config.peft["lora"].rank == 4  # what the recipe says for it still holds
    assert "coeff" not in stack or config.peft["coeff"].dropout == 0.3


def test_another_typed_option_drops_the_recipes_settings_for_that_group(recipe: Path) -> None:
    assert one(f"recipe={recipe}", "optim=sgd").optim.lr == 1e-2
    assert one(f"recipe={recipe}", "optim=adamw").optim.lr == 5e-4
    assert one(f"recipe={recipe}", "optim=sgd", "optim.momentum=0.5").optim.momentum == 0.5
    assert one(f"recipe={recipe}", "backbone=vit_small").backbone.pretrained is True
    assert one(f"recipe={recipe}", "backbone=vit_tiny").backbone.pretrained is False
    config = one(f"recipe={recipe}", "data=fashion_mnist")
    assert (config.data.kind, config.data.batch_size, config.optim.lr) == ("fashion_mnist", 64, 5e-4)


def test_a_recipe_extends_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - quickstart\n  - override /peft: [lora]\npeft: {lora: {rank: 3}}\nseed: 5\n")
    shipped, mine = one("recipe=quickstart"), one(f"recipe={path}")
    assert (list(mine.peft), mine.peft["lora"].rank, mine.seed, mine.recipe) == (["lora"], 3, 5, "mine")
    assert (mine.data, mine.cv, mine.backbone) == (shipped.data, shipped.cv, shipped.backbone)
    other = tmp_path / "other.yaml"
    other.write_text("defaults: [./mine.yaml]\nseed: 6\n")
    again = one(f"recipe={other}")
    assert (again.peft, again.seed) == (mine.peft, 6)


def test_extending_with_another_option_drops_the_settings_of_the_first(tmp_path: Path, recipe: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults:\n  - '{recipe}'\n  - override /optim: sgd\n", encoding="utf-8")
    assert one(f"recipe={path}").optim.lr == 1e-2
    assert one(f"recipe={path}", "optim=adamw").optim.lr == AdamW().lr  # nor do they come back
    assert one(f"recipe={path}").data.batch_size == 17


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.25, head: {lr: '${optim.lr}'}}\ncv: {folds: '${seed}'}\nseed: 3\n")
    config = one(f"recipe={path}", "run_dir=out/${seed}")
    assert (config.optim.head.lr, config.cv.folds, config.run_dir) == (0.25, 3, "out/3")
    path.write_text("optim: {lr: '${optim.rate}'}\n")
    assert "mine.yaml, line 1: optim.lr: Interpolation key 'optim.rate' not found" in refused(f"recipe={path}")[0]


@pytest.mark.parametrize(
    "value",
    [
        "/plain/path",
        "relative path/with spaces",
        "dätä/ünïcode/日本語",
        "a=b",
        "[bracket]/x[1]",
        "(paren) {brace}",
        "a,b",
        'it\'s "quoted"',
        "back\\slash\\",
        "1e3",
        "007",
        "true",
        "x: y # z",
        "-",
        "@home/$HOME",
        "range(3)",
        " leading and trailing ",
    ],
)
def test_paths_may_be_typed_as_the_shell_gives_them(value: str) -> None:
    assert one(f"run_dir={value}").run_dir == value
    config = one("data=image_folder", f"data.root={value}", f"backbone.weights={value}")
    assert (config.data.root, config.backbone.weights) == (value, value)


def test_home_is_expanded() -> None:
    config = one("run_dir=~/runs ü/x", "data=image_folder", "data.root=~")
    assert (config.run_dir, config.data.root) == (str(Path.home() / "runs ü" / "x"), str(Path.home()))
    assert one("run_dir=null").run_dir is None


@given(st.text(st.characters(codec="utf-8", exclude_characters="$"), min_size=1))
@settings(deadline=None)
def test_any_text_is_taken_to_the_letter(text: str) -> None:
    quoted = text[0] in "'\"" and text[-1] == text[0]  # Hydra's own quotes
    if not quoted and text.lower() != "null":
        assert read_value(f"run_dir={text}") == text


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$\0\r\n\x85\u2028\u2029"))


@given(st.recursive(PLAIN | TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
@settings(max_examples=200, deadline=None)
def test_encoded_values_are_read_back(value: object) -> None:
    assert read_value(f"data.hub_columns={encode(value)}") == value


def test_mappings_are_encoded_too() -> None:
    value = {"a/b": "it's ü", "c d": ["x", None, 3, {"e": 0.5}], "true": True}
    assert read_value(f"data.hub_columns={encode(value)}") == value
    assert read_value(f"data.hub_columns={encode([value, 1])}") == [value, 1]


def test_lists_that_hydra_cannot_read_are_read_as_yaml() -> None:
    patterns = (
        one("peft=lora", r"peft.lora.target_modules=[blocks\.\d+\.attn\.(qkv|proj)$, mlp]").peft["lora"].target_modules
    )
    assert patterns == [r"blocks\.\d+\.attn\.(qkv|proj)$", "mlp"]
    assert one("peft.coeff.layers=[-1,0]").peft["coeff"].layers == [-1, 0]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["peft.lora.rnk=4"], "peft.lora.rnk: no such key; did you mean rank?"),
        (["+peft.lora.rnk=4"], "peft.lora.rnk: no such key; did you mean rank?"),
        (["peft=lorra"], "peft: no option 'lorra'; did you mean lora"),
        (["~=True"], "~=True: no key ''; there are"),
        (["~peft=True"], "~peft=True: what is to be left out is named by ~peft alone"),
        (["peft=[coeff,lorra]"], "peft: no option 'lorra'; did you mean lora"),
        (["peft=[lora,lora]"], "peft: lora stands in the stack twice"),
        (["peft=[none,lora]"], "peft: none is the empty stack; it cannot stand in a list with methods"),
        (["peft=coeff,lora"], "peft=coeff,lora: a stack is peft=[coeff,lora]; several runs need -m"),
        (["peft.lorra.rank=4"], "peft.lorra: no such method; did you mean lora"),
        (
            ["peft=coeff", "peft.lora.rank=4"],
            "peft.lora.rank is typed, but the stack is [coeff]; add the method by peft=[coeff,lora]",
        ),
        (
            ["peft=none", "peft.lora.rank=4"],
            "peft.lora.rank is typed, but the stack is []; add the method by peft=[lora]",
        ),
        (["peft.lora.kind=coeff"], "peft.lora.kind=coeff: choose the stack by peft=[...]"),
        (["peft.lora=3"], "peft: choose the stack by peft=[coeff,lora], a method's settings by peft.lora.rank=8"),
        (["optim.lr=abc"], "optim.lr must be a number, not 'abc'"),
        (["optim.lr=-1"], "optim.lr must be a positive number, not -1.0"),
        (["optim=adamwx"], "optim: no option 'adamwx'; did you mean adamw?"),
        (["optim=[adamw]"], "optim takes one option, not the list [adamw]"),
        (["optim={lr:3}"], "optim: pick an option by its name, then set its keys one by one: optim.KEY=VALUE"),
        (["optim.kind=sgd"], "optim.kind=sgd: choose an option by optim=sgd"),
        (["optim=sgd", "optim=adamw"], "optim= is given twice"),
        (["backbone=vit_bas"], "backbone: no option 'vit_bas'; did you mean vit_base"),
        (["data=digit"], "data: no option 'digit'; did you mean digits?"),
        (["recpie=x"], "recpie=x: no key 'recpie'; did you mean recipe?"),
        (["cv.fold=5"], "cv.fold: no such key; did you mean folds?"),
        (["cv=5"], "cv is not a value of its own but has the keys cv.folds, cv.stratified"),
        (["cv.folds=2.5"], "cv.folds must be a whole number, not 2.5"),
        (["cv.folds=-1"], "cv.folds must be 0 or more, not -1"),
        (["cv.stratified=perhaps"], "cv.stratified must be true or false, not 'perhaps'"),
        (["optim.betas=[0.9,x]"], "optim.betas must be a list of numbers, not [0.9, 'x']"),
        (["trainer.patience=0"], "trainer.patience must be 1 or more epochs, or null, not 0"),
        (["trainer.patience=x"], "trainer.patience must be a whole number or null, not 'x'"),
        (["trainer.max_epoch=3"], "trainer.max_epoch: no such key; did you mean max_epochs?"),
        (["task.metric=acuracy"], "task.metric: no metric 'acuracy'; did you mean accuracy"),
        (["optim.lr=1e-3,1e-4"], "optim.lr must be a number, not '1e-3,1e-4'"),
        (["optim.lr"], "'optim.lr' is not key=value"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: coeft writes its own run directory and log; set run_dir=PATH"),
        (["optim._target_=os.system"], "optim._target_: a config may name a class of your own only if you type"),
        (["data._target_=os.system", "allow_custom_targets=true"], "data._target_: os.system is not a dataclass"),
        (["data._target_=no.such", "allow_custom_targets=true"], "data._target_: No module named 'no'; is its folder"),
        (["logger=wandb", "logger.entity=https://me:pw@host"], "logger.entity holds a password in an address"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(recipe: Path, typed: list[str], message: str) -> None:
    lines = refused(f"recipe={recipe}", *typed)
    assert len(lines) == 1 and lines[0].startswith(message), lines


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("recipe=vtab/cifar10", "no recipe 'vtab/cifar10'; did you mean vtab/cifar100 or vtab/caltech101 or vtab/all?"),
        ("recipe=./no such.yaml", "recipe: no file ./no such.yaml"),
        ("quickstart", "'quickstart' is not key=value; did you mean recipe=quickstart?"),
        ("recipe=quickstart,vtab/cifar100", "recipe=quickstart,vtab/cifar100: one recipe for one run; several need -m"),
    ],
)
def test_a_wrong_recipe_is_named(typed: str, message: str) -> None:
    assert refused(typed) == [message]


def test_all_mistakes_are_found_at_once(recipe: Path) -> None:
    typed = [
        "recpie=3",
        "peft=[coeff,bitfti]",
        "optim.lr=-1",
        "seed=x",
        "cv.fold=3",
        "trainer.max_epochs=0",
        "data.root=x",
    ]
    assert refused(f"recipe={recipe}", *typed) == [
        "recpie=3: no key 'recpie'; did you mean recipe?",
        "peft: no option 'bitfti'; did you mean bitfit?",
        "data.root: no such key; there are " + ", ".join(sorted(to_dict(one().data))),
        "optim.lr must be a positive number, not -1.0",
        "seed must be a whole number, not 'x'",
        "cv.fold: no such key; did you mean folds?",
        "trainer.max_epochs must be 1 or more, not 0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peft:\n  lora:\n    rnk: 4\n", "line 3: peft.lora.rnk: no such key; did you mean rank?"),
        ("peft: {coeff: {dropout: 2}}\n", "line 1: peft.coeff.dropout"),
        ("sead: 3\n", "line 1: sead: no such key; did you mean seed"),
        ("seed: 1\noptim:\n  lr: fast\n", "line 3: optim.lr must be a number, not 'fast'"),
        (
            "optim: adamw\n",
            "line 1: optim: 'adamw' is not a mapping of settings; choose an option by optim=adamw on the",
        ),
        ("peft: [lora]\n", "line 1: peft: pick the stack in the defaults list: - override /peft: [lora]"),
        (
            "optim: {kind: sgd}\n",
            "line 1: optim.kind: pick an option in the defaults list instead: - override /optim: sgd",
        ),
        ("peft: {lora: {kind: lora}}\n", "line 1: peft.lora.kind: pick an option in the defaults list instead"),
        ("defaults: [override /backbone: vit_bse]\n", "defaults: backbone: no option 'vit_bse'; did you mean vit_base"),
        ("defaults: [override /backbon: vit_base]\n", "defaults: no group 'backbon'; did you mean backbone?"),
        ("defaults:\n  - backbone: vit_base\n", "defaults: write - override /backbone: vit_base"),
        (
            "defaults: [vtab/cifar10]\n",
            "no recipe 'vtab/cifar10'; did you mean vtab/cifar100 or vtab/caltech101 or vtab/all?",
        ),
        ("defaults: [mine.yaml]\n", "extends itself"),
        ("defaults: 3\n", "defaults must be a list"),
        ("seed: 1\nseed: 2\n", "line 2: not YAML: found duplicate key seed"),
        ("seed: [1\n", "line 2: not YAML: "),
        ("- 1\n", "a config is a mapping of keys to values"),
        ("hydra: {callbacks: {x: {_target_: os.system}}}\n", "a recipe cannot set Hydra's own settings"),
        ("allow_custom_targets: true\n", "allow_custom_targets can only be typed on the command line"),
        (
            "data: {_target_: os.system}\n",
            "line 1: data._target_: a config may name a class of your own only if you type",
        ),
        ("logger: {api_key: abc}\n", "line 1: logger.api_key looks like a secret"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    lines = refused(f"recipe={path}")
    assert lines[0].startswith(str(path)) and message in lines[0], lines


def test_a_recipes_settings_outside_the_stack_are_checked_then_dropped(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("peft: {lora: {rank: 2}}\n")
    assert list(one(f"recipe={path}").peft) == ["coeff"]
    path.write_text("peft: {lora: {rank: 0}, bitfit: {rnk: 2}}\n")
    lines = refused(f"recipe={path}")
    assert [line.removeprefix(f"{path}, line 1: ") for line in lines] == [
        "peft.lora.rank must be a whole number, 1 or more, not 0",
        "peft.bitfit.rnk: no such key; there are kind, layers, lr, weight_decay",
    ]


def test_the_config_of_a_run_repeats_it(tmp_path: Path, recipe: Path) -> None:
    run = tmp_path / "rün [1]=x"
    run.mkdir()
    typed = [
        "peft=[lora,coeff]",
        "peft.coeff.layers=[-1]",
        "optim=sgd",
        "data=image_folder",
        "data.root=~/a ü",
        "optim.lr=1e-05",
    ]
    config = one(f"recipe={recipe}", *typed)
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(run / "config.yaml") == config
    flags = {"config_dir": str(run), "config_name": "config"}
    assert one(**flags) == config
    assert one(f"recipe={run / 'config.yaml'}") == config
    changed = one("peft=[lora]", "optim.momentum=0", **flags)
    assert (changed.peft, changed.optim.momentum) == ({"lora": config.peft["lora"]}, 0)
    assert one("optim=adamw", **flags).optim == one().optim
    assert refused("recipe=quickstart", **flags) == ["recipe= and --config-name both name a config; give one of them"]
    assert refused(config_dir=str(run), config_name="confg")[0].endswith("confg.yaml; did you mean config?")
    assert refused(config_dir=str(run / "no"))[0].startswith("--config-dir: no folder")


def test_config_dir_adds_options_and_primary_configs(tmp_path: Path) -> None:
    folder = tmp_path / "meine [Optionen]=ü (1)"
    (folder / "optim").mkdir(parents=True)
    (folder / "optim" / "fast.yaml").write_text("defaults: [adamw, _self_]\nlr: 0.5\n")
    config = one("optim=fast", config_dir=str(folder))
    assert (config.optim.lr, config.optim.kind) == (0.5, "adamw")
    assert refused("optim=fats", config_dir=str(folder))[0].startswith("optim: no option 'fats'; did you mean fast")
    lines = ["data: digits", "backbone: vit_tiny", "task: classification", "optim: fast", "peft: [lora]", "logger: csv"]
    (folder / "own.yaml").write_text(
        "defaults:\n" + "".join(f"  - {line}\n" for line in lines) + "  - _self_\nseed: 4\n"
    )
    config = one("seed=5", "peft=[coeff,lora]", config_dir=str(folder), config_name="own")
    assert (config.seed, list(config.peft), config.optim.lr) == (5, ["coeff", "lora"], 0.5)


def test_a_users_class_needs_to_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dataclasses import dataclass\n@dataclass(frozen=True, kw_only=True)\nclass Mine:\n    strength: int = 1\n"
    )
    (tmp_path / "my_coeft_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("peft:\n  mine: {_target_: my_coeft_methods.Mine, strength: 3}\n")
    assert "allow_custom_targets=true" in refused(f"recipe={path}")[0]
    config = one(f"recipe={path}", "allow_custom_targets=true")
    assert list(config.peft) == ["coeff", "mine"] and config.peft["mine"].strength == 3
    assert refused(f"recipe={path}", "allow_custom_targets=true", "peft.mine.strenth=3")[0].endswith(
        "did you mean strength?"
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved, allowed=Allowed(custom_targets=True)) == config
    with pytest.raises(UserError, match="allow_custom_targets=true"):
        load_config(saved)


SUITE = """\
defaults:
  - override /peft: [coeff, lora]
peft: {full: {lr: 1.0e-5}, lora: {rank: 4}}
optim: {lr: 0.25}
suite:
  none: [peft=none]
  lora: ["peft=[lora]", peft.lora.rank=2]
  both: []
  full: [peft=full, optim=sgd]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    return path


def test_members_of_a_suite_are_checked_configs(suite: Path) -> None:
    (found,) = compose([f"recipe={suite}", "optim.weight_decay=0.5", "run_dir=x"])
    assert {name: list(member.peft) for name, member in found.members.items()} == {
        "none": [], "lora": ["lora"], "both": ["coeff", "lora"], "full": ["full"],
    }  # fmt: skip
    members = found.members
    assert (members["lora"].peft["lora"].rank, members["both"].peft["lora"].rank) == (2, 4)
    assert (members["full"].peft["full"].lr, members["full"].optim.kind, members["full"].optim.lr) == (
        1e-5,
        "sgd",
        1e-2,
    )
    assert all(
        member.optim.weight_decay == 0.5 and not member.suite and not member.run_dir for member in members.values()
    )
    assert found.config.run_dir == "x"


def test_the_config_of_a_suite_repeats_all_members(suite: Path, tmp_path: Path) -> None:
    typed = ["peft.lora.rank=6", "optim.lr=0.125", "seeds=[0,3]", "cv.folds=2", "task.label_smoothing=0.5"]
    (found,) = compose([f"recipe={suite}", *typed])
    assert found.members["lora-seed_3"].peft["lora"].rank == 6 and found.members["full-seed_0"].optim.lr == 0.125
    (tmp_path / "config.yaml").write_text(to_yaml(found.config))
    (again,) = compose([], config_dir=str(tmp_path), config_name="config")
    assert again == found
    assert load_config(tmp_path / "config.yaml") == found.config


def test_seeds_alone_are_a_suite() -> None:
    (found,) = compose(["recipe=quickstart", "seeds=[0,1]"])
    assert {name: member.seed for name, member in found.members.items()} == {"seed_0": 0, "seed_1": 1}
    assert found.members["seed_1"].peft == one("recipe=quickstart").peft


GROUPED = "suite={a: [peft=none], b: ['peft=[lora]'], c: ['peft=[coeff]']}"


def test_the_groups_of_a_suite_are_part_of_its_config_and_not_of_its_runs(tmp_path: Path) -> None:
    (found,) = compose([GROUPED, "suite_groups={one: [a, b], other: [c]}", "seeds=[0,1]"])
    assert found.config.suite_groups == {"one": ["a", "b"], "other": ["c"]} and len(found.members) == 6
    assert not any(member.suite_groups for member in found.members.values())
    (tmp_path / "config.yaml").write_text(to_yaml(found.config))
    (again,) = compose([], config_dir=str(tmp_path), config_name="config")
    assert again.config.suite_groups == found.config.suite_groups and list(again.members) == list(found.members)
    (other,) = compose([GROUPED, "suite_groups={}"])
    assert not other.config.suite_groups


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["suite_groups={one: [a]}"], "suite_groups: there is no suite whose runs could be in groups"),
        ([GROUPED, "suite_groups={one: [a, d]}"], "suite_groups.one: the suite has no run 'd'; there are a, b, c"),
        ([GROUPED, "suite_groups={one: [a], two: [b, a]}"], "suite_groups.two: a stands in one too; a run is in one"),
        ([GROUPED, "suite_groups={one: [a, a]}"], "suite_groups.one: a stands twice; a run is in one group"),
        ([GROUPED, "suite_groups={one: []}"], "suite_groups.one: name the runs whose mean is to be told"),
        ([GROUPED, "suite_groups={one: a}"], "suite_groups must be a mapping from names to a list of texts"),
        (
            ["suite={a: [peft=none], b: [task.metric=macro_f1]}", "suite_groups={one: [a], two: [b]}"],
            "suite_groups: a mean over runs takes one metric, but theirs are macro_f1 (b), accuracy (a); set task.",
        ),
        (["suite={a: ['suite_groups={x: [a]}']}"], "suite.a: suite_groups={x: [a]}: a suite cannot stand inside"),
    ],
)
def test_a_mistake_in_the_groups_of_a_suite_is_named(typed: list[str], message: str) -> None:
    assert refused(*typed)[0].startswith(message)


def test_suites_may_be_typed() -> None:
    (found,) = compose(["suite={a: [peft=lora], b: ['peft=[coeff,lora]', optim.lr=0.5]}"])
    assert {name: list(member.peft) for name, member in found.members.items()} == {
        "a": ["lora"],
        "b": ["coeff", "lora"],
    }
    assert found.members["b"].optim.lr == 0.5


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["peft=lora"], "suite: none and both come out as the same run"),
        (["peft.bitfit.lr=1"], "peft.bitfit.lr is typed, but no member of the suite has"),
        (["optim.lrr=1"], "optim.lrr: no such key; did you mean lr?"),
        (["suite={a: [peft=lorra], b: [cv.fold=3]}"], "suite.a: peft: no option 'lorra'; did you mean lora"),
        (["suite={a: ['suite={}'], b: []}"], "suite.a: suite={}: a suite cannot stand inside a suite"),
        (
            ["suite={a: [recipe=quickstart], b: []}"],
            "suite.a: recipe=quickstart: a member shares the recipe of its suite",
        ),
        (["suite={a/b: [peft=lora]}"], "suite.a/b: 'a/b' cannot be the name of a member's folder"),
        (["suite={a: peft=lora}"], "suite must be a mapping from names to a list of texts"),
        (["seeds=[1,1]"], "seeds: [1, 1] repeats a seed"),
        (["seeds=[0,1]", "seed=3"], "seed is set beside seeds"),
        (["seeds=3"], "seeds must be a list of whole numbers, not 3"),
    ],
)
def test_a_mistake_in_a_suite_is_named(suite: Path, typed: list[str], message: str) -> None:
    assert refused(f"recipe={suite}", *typed)[0].startswith(message)


def test_multirun_composes_every_combination(recipe: Path) -> None:
    found = compose([f"recipe={recipe}", "peft=[coeff],[lora,coeff]", "optim.lr=1e-3,1e-4", "run_dir=x"], multirun=True)
    assert [(list(one.config.peft), one.config.optim.lr, one.config.run_dir) for one in found] == [
        (["coeff"], 1e-3, "x/0"),
        (["coeff"], 1e-4, "x/1"),
        (["lora", "coeff"], 1e-3, "x/2"),
        (["lora", "coeff"], 1e-4, "x/3"),
    ]
    picked = compose([f"recipe={recipe}", "optim=sgd,adamw"], multirun=True)
    assert [one.config.optim.lr for one in picked] == [1e-2, 5e-4]  # only another option drops the recipe's rate
    with pytest.raises(UserError, match="lorra"):
        compose(["peft=lora,lorra"], multirun=True)


@pytest.mark.parametrize("name", ["quickstart", "quickstart/compare", "vtab/cifar100"])
def test_shipped_recipes_are_read(name: str) -> None:
    assert read_recipe(name).name == name


def test_cfg_job_prints_what_was_checked(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", f"recipe={recipe}", "--cfg", "job", "--resolve", "optim.lr=3", "run_dir=x"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == one(f"recipe={recipe}", "optim.lr=3", "run_dir=x")
    assert main(["train", f"recipe={recipe}", "--cfg", "job", "-p", "optim.lr"]) == 0
    assert capsys.readouterr().out == "0.0005\n"
    assert main(["train", f"recipe={recipe}", "--cfg", "job", "optim.lr=-3"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "coeft: optim.lr must be a positive number, not -3.0\n")


def test_a_config_is_checked_before_anything_heavy_is_imported(recipe: Path) -> None:
    code = f"""
import sys
from coeft.cli.main import main
assert main(["train", {f"recipe={recipe}"!r}, "peft.lora.rnk=4"]) == 2
assert main(["train", {f"recipe={recipe}"!r}, "--cfg", "job"]) == 0
heavy = {{"torch", "numpy", "lightning", "timm", "transformers", "peft", "datasets", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "did you mean rank?" in run.stderr and "Traceback" not in run.stderr
