"""Finished runs that are damaged, adapters, checkpoints and weights that lie, and commands that ask for what is not."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wrong.case import DIGITS, Case, Maker, both, text_file
from wrong.data import png

DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000


def gone(name: str) -> Maker:
    def make(here: Path) -> None:
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def cut(name: str, keep: int) -> Maker:
    """Keeps the first bytes of a file; negative leaves so many out."""
    return lambda here: (here / name).write_bytes((here / name).read_bytes()[:keep])


def changed(name: str, **values: Any) -> Maker:
    """Sets keys of a JSON file; Ellipsis takes one out."""

    def make(here: Path) -> None:
        tree = json.loads((here / name).read_text())
        tree.update(values)
        (here / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return make


def edited(name: str, change: Callable[[Any], Any]) -> Maker:
    """Changes a JSON file."""

    def make(here: Path) -> None:
        tree = json.loads((here / name).read_text())
        (here / name).write_text(json.dumps(change(tree) or tree))

    return make


def replaced(name: str, old: str, new: str) -> Maker:
    def make(here: Path) -> None:
        text = (here / name).read_text()
        assert old in text
        (here / name).write_text(text.replace(old, new, 1))

    return make


def header(name: str, change: Callable[[dict[str, Any]], None], size: int | None = None) -> Maker:
    """Changes the header of a safetensors file, or what it says of its own size."""

    def make(here: Path) -> None:
        content = (here / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        tree = json.loads(content[8 : 8 + length])
        change(tree)
        text = json.dumps(tree).encode()
        (here / name).write_bytes(struct.pack("<Q", size or len(text)) + text + content[8 + length :])

    return make


def nan(name: str) -> Maker:
    """Overwrites the last value of a safetensors file with NaN."""
    return lambda here: (here / name).write_bytes((here / name).read_bytes()[:-4] + struct.pack("<f", float("nan")))


def first(tree: dict[str, Any]) -> dict[str, Any]:
    """What a header says of its first tensor."""
    return next(value for key, value in sorted(tree.items()) if key != "__metadata__")


def renamed(tree: dict[str, Any]) -> None:
    name = next(key for key in sorted(tree) if key != "__metadata__")
    tree[f"../{name}"] = tree.pop(name)


def finished(
    name: str, command: list[str], *words: str, make: Maker | None = None, needs: tuple[str, ...] = ("run",),
    stdin: str | None = None,
) -> Case:  # fmt: skip
    return Case(name=name, argv=command, words=words, make=make, needs=needs, stdin=stdin)


EVAL = ["eval", "run"]
PREDICT = ["predict", "run", "a.png"]
IMAGE = text_file("a.png", png())


def run(name: str, make: Maker, *words: str) -> Case:
    """A damaged run, opened by eval."""
    return finished(f"a run {name}", EVAL, *words, make=make)


RUNS = [
    run("that is not there", gone("run"), "run: no such run directory"),
    run("that is a file", both(gone("run"), text_file("run", "x")), "run: no such run directory"),
    run("that is an empty folder", both(gone("run"), lambda here: (here / "run").mkdir()), "has no config.yaml"),
    run("without results", gone("run/results.json"), "did not complete", "coeft resume run"),
    run("with results cut off", cut("run/results.json", 50), "run/results.json", "not a JSON file"),
    run("with empty results", text_file("run/results.json", ""), "run/results.json", "not a JSON file"),
    run("with results that are a list", text_file("run/results.json", "[]"), "run/results.json", "completed"),
    run("with results of bytes", text_file("run/results.json", b"\xff\xfe"), "run/results.json", "not a JSON file"),
    run("with results nested deeply", text_file("run/results.json", DEEP), "run/results.json", "not a JSON file"),
    run("with results that say nothing", text_file("run/results.json", "{}"), "run/results.json", "completed"),
    run("with a config that is no YAML", text_file("run/config.yaml", "a: ["), "run/config.yaml", "not YAML"),
    run("with an empty config", text_file("run/config.yaml", ""), "run/config.yaml", "is required"),
    run("with a config of a list", text_file("run/config.yaml", "- a"), "run/config.yaml", "mapping of keys"),
    run("with an unknown key", replaced("run/config.yaml", "seed:", "sede:"), "run/config.yaml", "sede", "seed"),
    run("with an unknown kind", replaced("run/config.yaml", "kind: digits", "kind: digit"), "'digit'", "digits"),
    run(
        "with a class of its own",
        replaced("run/config.yaml", "kind: adamw", "_target_: os.system"),
        "run/config.yaml",
        "allow_custom_targets",
    ),
    run(
        "with a config that is a folder",
        both(gone("run/config.yaml"), lambda here: (here / "run/config.yaml").mkdir()),
        "has no config.yaml",
    ),
    run("without its adapter", gone("run/adapter"), "run/adapter", "no such adapter folder"),
    run("without its environment", gone("run/environment.json"), "run/environment.json", "cannot be read"),
    run(
        "with threads that are text",
        changed("run/environment.json", threads="two"),
        "run/environment.json",
        "threads",
        "'two'",
    ),
    run("with threads below one", changed("run/environment.json", threads=0), "run/environment.json", "threads"),
    run(
        "of another model",
        replaced("run/config.yaml", "embed_dim: 32", "embed_dim: 64"),
        "run/adapter",
        "another base model",
    ),
    run("of another stack", replaced("run/config.yaml", "rank: 8", "rank: 4"), "run/adapter", "lora.rank is 8, not 4"),
    finished("eval without a run", ["eval"], "RUN", "coeft eval --help", needs=()),
    finished("eval of an override", ["eval", "data.root=x"], "the run directory comes first", needs=()),
    finished("eval of a suite", ["eval", "suite"], "is a suite", "seed_0, seed_1", needs=("suite",)),
    finished("eval with a wrong key", [*EVAL, "optim.lr=1"], "optim.lr=1", "data.KEY=VALUE"),
    finished("eval with a key that does not exist", [*EVAL, "data.ntest=1"], "data.ntest", "n_test"),
    finished("eval with data that do not exist", [*EVAL, "data=digit"], "'digit'", "digits"),
    finished("eval with a wrong value", [*EVAL, "data.batch_size=0"], "data.batch_size must be 1 or more"),
    finished(
        "eval with data of other classes",
        [*EVAL, "data=image_folder", "data.root=images"],
        "cat",
        "not trained on",
        make=both(text_file("images/cat/a.png", png()), text_file("images/dog/a.png", png())),
    ),
    finished("folds with one gone", ["eval", "folds"], "fold_1/adapter", make=gone("folds/fold_1"), needs=("folds",)),
    finished(
        "folds without their numbers",
        ["eval", "folds"],
        "results.json",
        "folds",
        make=changed("folds/results.json", folds=...),
        needs=("folds",),
    ),
    finished(
        "folds that are text",
        ["export", "adapter", "folds", "--fold", "0"],
        "results.json",
        "folds",
        make=changed("folds/results.json", folds="ab"),
        needs=("folds",),
    ),
]


def adapter(name: str, make: Maker, *words: str) -> Case:
    """A damaged adapter of a run, opened by predict."""
    return finished(f"an adapter {name}", PREDICT, *words, make=both(IMAGE, make))


LORA = "run/adapter/adapter_model.safetensors"
COEFF = "run/adapter/coeff/adapter_model.safetensors"
HEAD = "run/adapter/head.safetensors"
MANIFEST = "run/adapter/coeft.json"


def settings(key: str, value: Any) -> Maker:
    """Sets a key of the first method in the manifest."""
    return edited(MANIFEST, lambda tree: tree["stack"][0].update({key: value}))


ADAPTERS = [
    adapter("without a manifest", gone(MANIFEST), "no coeft.json"),
    adapter("with a manifest cut off", cut(MANIFEST, 99), "coeft.json", "not a JSON file"),
    adapter("with a manifest nested deeply", text_file(MANIFEST, DEEP), "coeft.json", "not a JSON file"),
    adapter("with a manifest of bytes", text_file(MANIFEST, b"\xff"), "coeft.json", "not a JSON file"),
    adapter("with a list as manifest", text_file(MANIFEST, "[]"), "coeft.json", "'format' must be 1"),
    adapter("of a later format", changed(MANIFEST, format=99), "format 99", "upgrade coeft"),
    adapter("of a format that is text", changed(MANIFEST, format="1"), "'format' must be 1"),
    adapter("of a format of true", changed(MANIFEST, format=True), "'format' must be 1"),
    adapter("of a format below one", changed(MANIFEST, format=-1), "'format' must be 1"),
    adapter("without a stack", changed(MANIFEST, stack=...), "coeft.json", "'stack' must be a list"),
    adapter(
        "with another stack",
        edited(MANIFEST, lambda t: t["stack"].pop() and None),
        "coeft.json",
        "the stack is [coeff]",
        "[coeff, lora]",
    ),
    adapter("with a method that does not exist", settings("kind", "coef"), "coeft.json", "coeff"),
    adapter("with a key that does not exist", settings("drop", 0.1), "coeft.json", "drop"),
    adapter("with a value out of range", settings("dropout", 7), "coeft.json", "dropout must be in [0, 1)"),
    adapter("with a value that is a mapping", settings("dropout", {"a": 1}), "coeft.json", "dropout must be a number"),
    adapter("with a class of its own", settings("_target_", "os.system"), "coeft.json", "_target_"),
    adapter(
        "with a method twice", edited(MANIFEST, lambda t: t["stack"].append(t["stack"][0])), "coeft.json", "its own"
    ),
    adapter("without a base model", changed(MANIFEST, base_model=...), "coeft.json", "'base_model'"),
    adapter(
        "with shapes that are text",
        edited(MANIFEST, lambda t: t["base_model"].update(parameters={"cls_token": "x"})),
        "another base model",
    ),
    adapter(
        "of other weights", edited(MANIFEST, lambda t: t["base_model"].update(sample_sha256="0" * 64)), "other weights"
    ),
    adapter("with outputs that are text", changed(MANIFEST, outputs="ten"), "'outputs' must be a number"),
    adapter("with outputs below zero", changed(MANIFEST, outputs=-1), "'outputs' must be a number"),
    adapter("with outputs beyond all memory", changed(MANIFEST, outputs=10**12), "outputs", "head.safetensors"),
    adapter("with a scale that is text", changed(MANIFEST, scale=["a", "b"]), "'scale' must be"),
    adapter("with a scale of zero", changed(MANIFEST, scale=[0, 0]), "'scale' must be"),
    adapter("with a scale that is no number", changed(MANIFEST, scale=[float("nan"), 1]), "'scale' must be"),
    adapter("with a scale too large", changed(MANIFEST, scale=[10**400, 1]), "'scale' must be"),
    adapter("without weights", gone(LORA), "adapter_model.safetensors", "no such file"),
    adapter("without a config", gone("run/adapter/adapter_config.json"), "adapter_config.json", "cannot be read"),
    adapter("with a config of a list", text_file("run/adapter/adapter_config.json", "[]"), "must be a mapping"),
    adapter("with a rank of another", changed("run/adapter/adapter_config.json", r=16), "alpha=8"),
    adapter(
        "with a scale of another",
        changed("run/adapter/adapter_config.json", lora_alpha=1),
        "alpha 1",
        "peft.lora.alpha=1",
    ),
    adapter("without a part", gone("run/adapter/coeff"), "run/adapter", "coeff"),
    adapter("without a head", gone(HEAD), "head.safetensors"),
    adapter(
        "with a head without names", header(HEAD, lambda t: t.pop("__metadata__")), "head.safetensors", "class_names"
    ),
    adapter(
        "with names nested deeply",
        header(HEAD, lambda t: t["__metadata__"].update(class_names="[" * 99_999)),
        "head.safetensors",
        "class_names",
    ),
    adapter(
        "with fewer names than outputs",
        header(HEAD, lambda t: t["__metadata__"].update(class_names='["a"]')),
        "head.safetensors",
        "1",
        "10",
    ),
    adapter(
        "with names that are numbers",
        header(HEAD, lambda t: t["__metadata__"].update(class_names="[1, 2]")),
        "class_names must be a list of texts",
    ),
    adapter("with weights cut off", cut(LORA, -99), LORA, "safetensors"),
    adapter("with weights of no byte", text_file(LORA, b""), LORA, "safetensors"),
    adapter("with weights cut off in the header", cut(LORA, 40), LORA, "safetensors"),
    adapter("with a header that lies of its size", header(LORA, lambda t: None, size=2**63), LORA, "safetensors"),
    adapter("with a header that is no JSON", text_file(LORA, struct.pack("<Q", 8) + b"{notjson"), LORA, "safetensors"),
    adapter(
        "with offsets beyond the file",
        header(LORA, lambda t: first(t).update(data_offsets=[0, 2**60])),
        LORA,
        "safetensors",
    ),
    adapter(
        "with a shape that overflows",
        header(LORA, lambda t: first(t).update(shape=[2**40, 2**40])),
        LORA,
        "safetensors",
    ),
    adapter("with a shape below zero", header(LORA, lambda t: first(t).update(shape=[-8, 32])), LORA, "safetensors"),
    adapter("with an unknown type", header(LORA, lambda t: first(t).update(dtype="F1024")), LORA, "safetensors"),
    adapter(
        "with whole numbers for weights",
        header(COEFF, lambda t: first(t).update(dtype="I32")),
        "coeff",
        "int32",
        "float",
    ),
    adapter("with names that climb out", header(LORA, renamed), "run/adapter", "../", "unexpected"),
    adapter("with weights that are no numbers", nan(COEFF), "coeff", "finite"),
    adapter("with a head that is no number", nan(HEAD), "head.safetensors", "finite"),
    adapter("with weights that are a pickle", text_file(LORA, pickle.dumps({"a": 1})), LORA, "safetensors"),
    adapter(
        "with weights that are a folder", both(gone(LORA), lambda here: (here / LORA).mkdir()), LORA, "no such file"
    ),
    adapter(
        "with a link to itself",
        both(gone(LORA), lambda here: (here / LORA).symlink_to("adapter_model.safetensors")),
        LORA,
        "no such file",
    ),
    adapter(
        "with a link to a device",
        both(gone(LORA), lambda here: (here / LORA).symlink_to("/dev/zero")),
        LORA,
        "no such file",
    ),
    adapter(
        "with a manifest linked to a device",
        both(gone(MANIFEST), lambda here: (here / MANIFEST).symlink_to("/dev/zero")),
        "coeft.json",
    ),
    Case(
        name="a start from another stack",
        argv=["train", *DIGITS, "peft=lora", "init_from=run"],
        words=("init_from", "[coeff, lora]", "[lora]"),
        needs=("run",),
    ),
    Case(
        name="a start from an adapter of another model",
        argv=["train", *DIGITS, "peft=[coeff,lora]", "init_from=run/adapter", "backbone.options.depth=3"],
        words=("init_from", "another base model", "blocks.2"),
        needs=("run",),
    ),
    Case(
        name="a start from a run that did not complete",
        argv=["train", *DIGITS, "peft=coeff", "init_from=stopped"],
        words=("stopped", "did not complete", "coeft resume"),
        needs=("stopped",),
    ),
]


def resumed(name: str, make: Maker, *words: str, needs: tuple[str, ...] = ("stopped",)) -> Case:
    """A run that cannot be continued."""
    return finished(f"resume, {name}", ["resume", needs[0] if needs else "nowhere"], *words, make=make, needs=needs)


LAST = "stopped/checkpoints/last.ckpt"


def other_pickle(here: Path) -> None:
    import torch

    torch.save([1, 2], here / LAST)


def without_epoch(here: Path) -> None:
    import torch

    tree = torch.load(here / LAST, weights_only=True)
    del tree["epoch"]
    torch.save(tree, here / LAST)


def other_weights(here: Path) -> None:
    import torch

    tree = torch.load(here / LAST, weights_only=True)
    tree["state_dict"] = {name: value[:1] for name, value in tree["state_dict"].items()}
    torch.save(tree, here / LAST)


RESUMES = [
    resumed("nothing there", lambda here: None, "nowhere: no such run directory", needs=()),
    resumed("a complete run", lambda here: None, "run is complete", needs=("run",)),
    resumed("a complete suite", lambda here: None, "suite is complete", needs=("suite",)),
    resumed("a damaged config", text_file("stopped/config.yaml", "seed: [\n"), "stopped/config.yaml", "not YAML"),
    resumed("a checkpoint cut off", cut(LAST, 2000), LAST, "checkpoint"),
    resumed("a checkpoint without a byte", text_file(LAST, b""), LAST, "checkpoint"),
    resumed("a checkpoint of text", text_file(LAST, "hello"), LAST, "checkpoint"),
    resumed("a checkpoint that is a list", other_pickle, LAST, "checkpoint"),
    resumed("a checkpoint without its epoch", without_epoch, LAST, "not a checkpoint of this version"),
    resumed("a checkpoint of other shapes", other_weights, LAST),
    resumed("other data", replaced("stopped/config.yaml", "n_train: 40", "n_train: 41"), "stopped", "data", "new run"),
    resumed("an environment that is a list", text_file("stopped/environment.json", "[]"), "stopped/environment.json"),
    resumed("a damaged table of metrics", text_file("stopped/metrics.csv", b"\xff\xfe\0\0"), "stopped/metrics.csv"),
    resumed("a fold that is no fold", text_file("stopped/fold.json", '{"row": 1}'), "stopped/fold.json"),
    resumed(
        "a fold without its value",
        text_file("stopped/fold.json", '{"row": {"fold": 0, "n_train": 1, "n_val": 1, "n_test": 1}}'),
        "stopped/fold.json",
        "'value'",
    ),
    resumed("samples that are no lines of JSON", text_file("stopped/samples.jsonl", "{\n"), "stopped/samples.jsonl"),
    resumed(
        "a member of a suite that is damaged",
        both(gone("suite/results.json"), cut("suite/seed_0/results.json", 9)),
        "suite/seed_0/results.json",
        needs=("suite",),
    ),
    resumed(
        "a suite without its members",
        both(gone("suite/results.json"), gone("suite/.members")),
        "suite",
        ".members",
        needs=("suite",),
    ),
    resumed(
        "a sweep with damaged settings",
        text_file("sweep/sweep.yaml", "sweep: [\n"),
        "sweep/sweep.yaml",
        "not YAML",
        needs=("sweep",),
    ),
    resumed(
        "a sweep without settings", text_file("sweep/sweep.yaml", "name: a\n"), "sweep/sweep.yaml", needs=("sweep",)
    ),
]

VIT = "weights/vit.safetensors"


def weights(name: str, make: Maker | None, *words: str, file: str = VIT) -> Case:
    line = ["train", *DIGITS, "backbone.pretrained=true", f"backbone.weights={file}"]
    return Case(name=f"weights {name}", argv=line, words=words, make=make, needs=("weights",))


def pickled(here: Path) -> None:
    import torch

    torch.save({"model": print}, here / "weights/vit.pth")


WEIGHTS = [
    weights("that are not there", None, "there is no file weights/vi.safetensors", file="weights/vi.safetensors"),
    weights("that are a folder", None, "weights is a folder", "name the file", file="weights"),
    weights("cut off", cut(VIT, -99), VIT, "whole safetensors file"),
    weights("cut off in the header", cut(VIT, 99), VIT, "whole safetensors file"),
    weights("of no byte", text_file(VIT, b""), VIT, "whole safetensors file"),
    weights("with a header that lies", header(VIT, lambda t: None, size=2**62), VIT, "whole safetensors file"),
    weights("of another width", header(VIT, lambda t: first(t).update(shape=[4, 8])), VIT, "[4, 8], not [32]"),
    weights("of other names", header(VIT, lambda t: t.update({"x": t.pop("norm.bias")})), "norm.bias is missing"),
    weights(
        "that are text",
        text_file("weights/vit.pth", "hello"),
        "weights/vit.pth",
        "nor a torch state dict",
        file="weights/vit.pth",
    ),
    weights("that are code", pickled, "weights/vit.pth", "no code", "safetensors", file="weights/vit.pth"),
    weights("that coeft does not ship", None, "package://vit", "coeft ships no", file="package://vit"),
    weights("that are no numbers", nan(VIT), VIT, "finite"),
]


def llama(name: str, make: Maker, *words: str) -> Case:
    from wrong.data import TEXT, TWO

    made = both(text_file("t.jsonl", TWO), make)
    return Case(
        name=f"a model folder {name}",
        argv=[*TEXT, "data.path=t.jsonl", "backbone.pretrained=true"],
        words=words,
        make=made,
        needs=("llama",),
    )


FOLDERS = [
    llama("without a config", gone("llama/config.json"), "llama has no config.json"),
    llama("with a broken config", cut("llama/config.json", 20), "llama/config.json", "not readable as JSON"),
    llama("with a config nested deeply", text_file("llama/config.json", DEEP), "llama/config.json", "not readable"),
    llama("of an unknown type", changed("llama/config.json", model_type="lama"), "'lama'", "llama"),
    llama(
        "with code",
        changed("llama/config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        "Python code",
        "trust_remote_code=true",
    ),
    llama("with a width that does not fit", changed("llama/config.json", hidden_size=64), "llama", "64"),
    llama("with sizes that are text", changed("llama/config.json", hidden_size="wide"), "llama", "hidden_size"),
    llama("without weights", gone("llama/model.safetensors"), "llama", "safetensors"),
    llama(
        "with weights cut off",
        cut("llama/model.safetensors", -99),
        "weights of llama cannot be read",
        "not fully covered",
    ),
    llama(
        "without a tokenizer",
        both(gone("llama/tokenizer.json"), gone("llama/tokenizer_config.json")),
        "without a tokenizer",
        "tokenizer.json",
    ),
    llama("with a broken tokenizer", cut("llama/tokenizer.json", 99), "tokenizer of llama"),
]


def damaged_results(here: Path) -> None:
    (here / "run" / "results.json").write_text("{")


PREDICTS = [
    finished("predict without a run", ["predict"], "RUN", "coeft predict --help", needs=()),
    finished("predict nothing", ["predict", "run"], "nothing to predict", stdin=""),
    finished("predict a file that is not there", PREDICT, "a.png", "no such file"),
    finished("predict an image that is none", PREDICT, "a.png", "not an image", make=text_file("a.png", "x")),
    finished("predict an empty folder", ["predict", "run", "d"], "d", make=lambda here: (here / "d").mkdir()),
    finished("predict a table that is empty", ["predict", "run", "a.csv"], "a.csv", make=text_file("a.csv", "")),
    finished(
        "predict a table without rows",
        ["predict", "run", "a.csv"],
        "a.csv",
        "no rows",
        make=text_file("a.csv", "input\n"),
    ),
    finished(
        "predict a table with an empty cell",
        ["predict", "run", "a.csv"],
        "a.csv",
        "row 2",
        "'input'",
        make=both(IMAGE, text_file("a.csv", "input,x\na.png,1\n,2\n")),
    ),
    finished("predict a table of bytes", ["predict", "run", "a.csv"], "a.csv", make=text_file("a.csv", b"\xff\xfe\0")),
    finished("predict broken JSON", ["predict", "run", "a.jsonl"], "a.jsonl", make=text_file("a.jsonl", '{"a": ')),
    finished(
        "predict numbers for names",
        ["predict", "run", "a.jsonl"],
        "3",
        "no such file",
        make=text_file("a.jsonl", '{"input": 3}\n'),
    ),
    finished(
        "predict to a file that is there",
        [*PREDICT, "--out", "a.csv"],
        "a.csv exists",
        "another file",
        make=both(IMAGE, text_file("a.csv", "x")),
    ),
    finished("predict to a folder that is not there", [*PREDICT, "--out", "no/a.csv"], "no/a.csv", make=IMAGE),
    finished("predict with a fold", [*PREDICT, "--fold", "0"], "--fold", make=IMAGE),
    finished(
        "predict with settings of text", [*PREDICT, "--temperature", "1"], "temperature", "language model", make=IMAGE
    ),
    finished("predict with a fold that is text", [*PREDICT, "--fold", "one"], "--fold", "'one'", make=IMAGE),
    finished("predict with a suite", ["predict", "suite", "a.png"], "is a suite", "seed_0", needs=("suite",)),
    finished(
        "speak for a negative time",
        ["predict", "speaker", "hi", "--max-new-tokens", "0"],
        "max",
        "1 or more",
        needs=("speaker", "llama"),
    ),
    finished(
        "speak at a negative temperature",
        ["predict", "speaker", "hi", "--temperature", "-1"],
        "temperature",
        needs=("speaker", "llama"),
    ),
    finished(
        "speak with a share above one",
        ["predict", "speaker", "hi", "--top-p", "2", "--temperature", "1"],
        "top",
        "1",
        needs=("speaker", "llama"),
    ),
    finished(
        "speak into a spreadsheet",
        ["predict", "speaker", "hi", "--out", "a.xlsx"],
        "a.xlsx",
        ".csv or .jsonl",
        needs=("speaker", "llama"),
    ),
    finished(
        "speak of a table without the column",
        ["predict", "speaker", "a.csv"],
        "a.csv",
        "messages",
        make=text_file("a.csv", "text\nhi\n"),
        needs=("speaker", "llama"),
    ),
]

EXPORTS = [
    finished("export of what is not", ["export", "adaptor", "run"], "'adaptor'", "did you mean adapter"),
    finished("export of no run", ["export", "adapter", "nowhere"], "nowhere: no such run directory", needs=()),
    finished(
        "export to a folder that is there",
        ["export", "adapter", "run", "--out", "d"],
        "d exists",
        "another folder",
        make=lambda here: (here / "d").mkdir(),
    ),
    finished("export below a file", ["export", "adapter", "run", "--out", "a/d"], "a/d", make=text_file("a", "x")),
    finished("export of folds", ["export", "adapter", "folds"], "choose one by --fold K", needs=("folds",)),
    finished(
        "export of a fold that is not",
        ["export", "adapter", "folds", "--fold", "7"],
        "no fold 7",
        "0, 1",
        needs=("folds",),
    ),
    finished(
        "export of a fold of a run",
        ["export", "adapter", "run", "--fold", "0", "--coeff", "keep"],
        "--coeff",
        "export model",
    ),
    finished("export of a suite", ["export", "adapter", "suite"], "is a suite", "seed_0", needs=("suite",)),
    finished("export of a sweep", ["export", "adapter", "sweep"], "is a sweep", "trials/0000", needs=("sweep",)),
    finished(
        "export, a threshold alone", ["export", "model", "run", "--threshold", "0.1"], "--threshold", "--coeff expand"
    ),
    finished(
        "export, a negative threshold", ["export", "model", "run", "--coeff", "expand", "--threshold", "-1"], "above 0"
    ),
    finished("export, an unknown way", ["export", "model", "run", "--coeff", "fold"], "'fold'", "expand"),
    finished("export of a damaged adapter", ["export", "adapter", "run"], "coeft.json", make=cut(MANIFEST, 9)),
    finished("export of an adapter with weights cut off", ["export", "adapter", "run"], LORA, make=cut(LORA, -9)),
    finished("export of a model cut off", ["export", "model", "run", "--out", "d"], HEAD, make=cut(HEAD, -9)),
]

REPORTS = [
    finished("report of nothing", ["report"], "RUN", "coeft report --help", needs=()),
    finished("report of no folder", ["report", "nowhere"], "nowhere: no such run directory", needs=()),
    finished(
        "report of a folder without runs",
        ["report", "d"],
        "no run in this folder",
        make=lambda here: (here / "d").mkdir(),
        needs=(),
    ),
    finished(
        "report of a damaged run",
        ["report", "run", "--no-samples"],
        "no complete run",
        "results.json",
        make=cut("run/results.json", 9),
    ),
    finished(
        "report of results of another kind",
        ["report", "run", "--no-samples"],
        "no complete run",
        "results.json",
        make=changed("run/results.json", folds=[{"fold": 0}]),
    ),
    finished(
        "report of values that are text",
        ["report", "run", "--no-samples"],
        "no complete run",
        "results.json",
        make=changed("run/results.json", folds=[{"fold": "a", "value": "b", "n_test": 1, "n_train": 1, "n_val": 1}]),
    ),
    finished(
        "report of results nested deeply",
        ["report", "run", "--no-samples"],
        "results.json",
        make=text_file("run/results.json", DEEP),
    ),
    finished(
        "report of a fold that is a list",
        ["report", "run", "--no-samples"],
        "fold.json",
        make=text_file("run/fold.json", "[]"),
    ),
    finished(
        "report of an environment that is a list",
        ["report", "run", "--no-samples"],
        "environment.json",
        make=text_file("run/environment.json", "[]"),
    ),
    finished(
        "report with an unknown baseline",
        ["report", "run", "--no-samples", "--baseline", "x"],
        "--baseline",
        "'x'",
        "run",
    ),
    finished("report of an unknown format", ["report", "run", "--format", "pdf"], "'pdf'", "html"),
    finished(
        "report to a file of another's",
        ["report", "run", "--out", "a.html"],
        "a.html exists and is no report",
        make=text_file("a.html", "x"),
    ),
    finished(
        "report to a folder",
        ["report", "run", "--out", "d"],
        "d is a folder",
        "report.html",
        make=lambda here: (here / "d").mkdir(),
    ),
    finished("report to a folder that is not there", ["report", "run", "--out", "no/a.html"], "there is no folder no"),
    finished("report with wrong heads", ["report", "run", "--heads", "1-2"], "--heads 1-2", "5:0,5:3"),
    finished(
        "report, figures of a table",
        ["report", "run", "--format", "md", "--figures", "d"],
        "--figures",
        "leave --format out",
    ),
    finished(
        "report, a table to a file that is there",
        ["report", "run", "--format", "md", "--out", "a.md"],
        "a.md exists",
        make=text_file("a.md", "x"),
    ),
]

LISTS = [
    finished("list of what is not", ["list", "recipe"], "'recipe'", "recipes", needs=()),
    finished("list without a word", ["list"], "WHAT", "coeft list --help", needs=()),
    finished("list that matches nothing", ["list", "backbones", "xyzzy"], "no backbones match 'xyzzy'", needs=()),
    finished("list with two filters", ["list", "recipes", "a", "b"], "one FILTER", needs=()),
    finished("list of recipes, sorted", ["list", "recipes", "--sort", "time"], "coeft list runs", needs=()),
    finished("list of runs by an unknown column", ["list", "runs", "--sort", "size_mb"], "'size_mb'", "size", needs=()),
    finished("list of runs in no folder", ["list", "runs", "no/where"], "no folder no/where", needs=()),
    finished("list of runs where there are none", ["list", "runs"], "no runs in runs/", "give the folder", needs=()),
    finished("show of what is not", ["show", "recipie", "quickstart"], "'recipie'", "recipe", needs=()),
    finished("show of a recipe that is not", ["show", "recipe", "quickstat"], "'quickstat'", "quickstart", needs=()),
    finished("show of a recipe above", ["show", "recipe", "../conf/train"], "no recipe", needs=()),
    finished("show of a method that is not", ["show", "method", "loar"], "'loar'", "lora", needs=()),
    finished("copy of what is not", ["copy", "method", "lora"], "'method'", "recipe", needs=()),
    finished("copy of a recipe that is not", ["copy", "recipe", "quickstat"], "'quickstat'", "quickstart", needs=()),
    finished(
        "copy to a file that is there",
        ["copy", "recipe", "quickstart", "a.yaml"],
        "a.yaml exists",
        make=text_file("a.yaml", "x"),
        needs=(),
    ),
    finished("copy to a file of another kind", ["copy", "recipe", "quickstart", "a.txt"], "ends with .yaml", needs=()),
    finished(
        "copy to a folder that is not there", ["copy", "recipe", "quickstart", "no/a.yaml"], "no/a.yaml", needs=()
    ),
    finished("cache, an unknown word", ["cache", "clean"], "'clean'", "clear", needs=()),
    finished("cache, an unknown flag", ["cache", "--all"], "--all", needs=()),
]

CASES = [
    *RUNS,
    *ADAPTERS,
    *RESUMES,
    *WEIGHTS,
    *FOLDERS,
    *PREDICTS,
    *EXPORTS,
    *REPORTS,
    *LISTS,
]
