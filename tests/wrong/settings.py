"""Wrong settings on the command line, and wrong recipes, configs, suites and sweeps in files."""

from pathlib import Path

from wrong.case import DIGITS, Case, text_file, train

TYPED = [
    # keys
    train("a key that does not exist", ["sede=1"], "no key 'sede'", "did you mean seed"),
    train("a key with the wrong group", ["optimizer.lr=1e-3"], "no key 'optimizer'", "optim"),
    train("a method's key that does not exist", ["peft=lora", "peft.lora.rnk=4"], "peft.lora.rnk", "did you mean rank"),
    train("a trainer's key that does not exist", ["trainer.epochs=3"], "trainer.epochs", "max_epochs"),
    train("a key of the data that does not exist", ["data.batchsize=3"], "data.batchsize", "batch_size"),
    train("a key of the optimizer that does not exist", ["optim.momentum=0.9"], "optim.momentum", "there are"),
    train("a key below a number", ["optim.lr.value=1"], "optim.lr"),
    train("a key below a key that does not exist", ["trainer.clip.norm=1"], "trainer.clip", "clip_norm"),
    train("a key of cross-validation", ["cv.fold=5"], "cv.fold", "did you mean folds"),
    train("a key of the task", ["task.metrics=loss"], "task.metrics", "did you mean metric"),
    train("a key of the logger", ["logger.project=x"], "logger.project", "no such key"),
    train("a key of the head", ["optim.head.learning_rate=1"], "optim.head.learning_rate", "there are"),
    train("a key of the splits", ["data.splits.validation=x"], "data.splits", "val"),
    train("a setting of a method outside the stack", ["peft=coeff", "peft.lora.rank=4"], "peft=[coeff,lora]"),
    train("a setting of no method", ["peft.lroa.rank=4"], "peft.lroa", "lora"),
    train("no equals sign", ["peft"], "'peft' is not key=value"),
    train("a recipe without its key", ["vtab"], "not key=value", "recipe=vtab"),
    train("an empty argument", [""], "key=value"),
    train("only an equals sign", ["=3"], "=3", "no key"),
    train("a key of Hydra's", ["hydra.run.dir=x"], "hydra.run.dir=x", "run_dir=PATH"),
    train("a deletion of a key that does not exist", ["~sede"], "sede"),
    train("a deletion of a group", ["~optim"], "optim"),
    train("kind typed", ["optim.kind=sgd"], "optim.kind=sgd", "optim=sgd"),
    train("a class of one's own", ["optim._target_=os.system"], "allow_custom_targets=true"),
    train("a secret", ["data.splits.hf_token=abc"], "looks like a secret", "environment variable"),
    train("a password in an address", ["backbone.weights=https://me:pw@host/x"], "password in an address"),
    # groups
    train("an optimizer that does not exist", ["optim=adam"], "optim: no option 'adam'", "did you mean adamw"),
    train("a method that does not exist", ["peft=lorra"], "peft: no option 'lorra'", "did you mean lora"),
    train("a method in a list that does not exist", ["peft=[coeff,lroa]"], "no option 'lroa'", "lora"),
    train("a method twice", ["peft=[lora,lora]"], "lora stands in the stack twice"),
    train("none among methods", ["peft=[none,lora]"], "none is the empty stack"),
    train("methods without brackets", ["peft=coeff,lora"], "peft=[coeff,lora]"),
    train("a list for a group that takes one", ["optim=[adamw,sgd]"], "optim takes one option", "[adamw,sgd]"),
    train("a mapping for a group", ["optim={lr: 1}"], "optim", "optim.KEY=VALUE"),
    train("a task that does not exist", ["task=classify"], "task: no option 'classify'", "classification"),
    train("data that does not exist", ["data=image_folders"], "given twice"),
    train("a backbone that does not exist", ["backbone=vit_bas"], "given twice"),
    train("a logger that does not exist", ["logger=wandd"], "logger: no option 'wandd'", "wandb"),
    train("a trainer that does not exist", ["trainer=fast"], "trainer: no option 'fast'", "default"),
    train("null for a group", ["optim=null"], "optim: no option 'null'", "adamw"),
    Case(
        name="two backbones",
        argv=["train", "backbone=vit_mini", "backbone=vit_tiny"],
        words=("backbone= is given twice",),
    ),
    Case(name="a name of data with a typo", argv=["train", "data=digit"], words=("no option 'digit'", "digits")),
    Case(name="a name of a backbone with a typo", argv=["train", "backbone=vit_bas"], words=("'vit_bas'", "vit_base")),
    # types
    train("a text for a number", ["optim.lr=abc"], "optim.lr must be a number", "'abc'"),
    train("a list for a number", ["optim.lr=[1,2]"], "optim.lr must be a number", "[1, 2]"),
    train("a fraction for a whole number", ["trainer.max_epochs=1.5"], "max_epochs must be a whole number", "1.5"),
    train("a text for a whole number", ["seed=one"], "seed must be a whole number", "'one'"),
    train("null for a whole number", ["trainer.max_epochs=null"], "max_epochs must be a whole number", "None"),
    train("a number for true or false", ["cv.stratified=2.5"], "cv.stratified must be true or false"),
    train("a text for a list", ["seeds=abc"], "seeds must be a list of whole numbers", "'abc'"),
    train("a text in a list of numbers", ["seeds=[1,b]"], "seeds", "whole numbers"),
    train("a value for a mapping", ["cv=5"], "cv.folds", "5"),
    train("a value for a nested mapping", ["optim.head=0.1"], "optim.head.lr", "0.1"),
    train("a mapping for a number", ["seed={a: 1}"], "seed must be a whole number"),
    train("a list that cannot be read", ["seeds=[1,2"], "seeds=[1,2", "cannot read the list"),
    train("a mapping that cannot be read", ["suite={a: [}"], "suite", "cannot read the list or mapping"),
    train("an interpolation of nothing", ["optim.lr=${nothing}"], "nothing"),
    train("an interpolation that runs code", ["optim.lr=${oc.env:NO_SUCH}"], "NO_SUCH"),
    train("several values without -m", ["optim.lr=1e-3,1e-2"], "optim.lr must be a number", "1e-3,1e-2"),
    # ranges
    train("a rate of zero", ["optim.lr=0"], "optim.lr must be a positive number"),
    train("a negative rate", ["optim.lr=-1e-3"], "optim.lr must be a positive number"),
    train("an infinite rate", ["optim.lr=inf"], "optim.lr must be a positive number"),
    train("a rate that is no number", ["optim.lr=nan"], "optim.lr must be a positive number"),
    train("a negative weight decay", ["optim.weight_decay=-1"], "optim.weight_decay must be 0 or more"),
    train("an unknown schedule", ["optim.schedule=cosin"], "optim.schedule must be one of", "cosine"),
    train("a warm-up of everything", ["optim.warmup_fraction=1"], "warmup_fraction must be in [0, 1)"),
    train("one beta", ["optim.betas=[0.9]"], "optim.betas must be two numbers"),
    train("momentum of one", ["optim=sgd", "optim.momentum=1"], "optim.momentum must be in [0, 1)"),
    train(
        "nesterov without momentum", ["optim=sgd", "optim.nesterov=true", "optim.momentum=0"], "needs optim.momentum"
    ),
    train("no epochs", ["trainer.max_epochs=0"], "trainer.max_epochs must be 1 or more"),
    train("no patience", ["trainer.patience=0"], "trainer.patience must be 1 or more"),
    train("a norm of zero", ["trainer.clip_norm=0"], "trainer.clip_norm must be positive"),
    train("a norm that is no number", ["trainer.clip_norm=nan"], "trainer.clip_norm must be positive"),
    train("an unknown precision", ["trainer.precision=fp16"], "trainer.precision must be auto, fp32 or bf16"),
    train("no way to keep features", ["trainer.cache_frozen=maybe"], "cache_frozen must be auto, true or false"),
    train("no threads", ["trainer.threads=0"], "trainer.threads must be 1 to"),
    train("too many threads", ["trainer.threads=10000000000"], "trainer.threads", "10000000000"),
    train("a micro-batch of none", ["trainer.micro_batch_size=0"], "micro_batch_size must be 1 or more"),
    train("a micro-batch that does not divide", ["data.batch_size=30", "trainer.micro_batch_size=7"], "must divide"),
    train("a micro-batch larger than the batch", ["trainer.micro_batch_size=100"], "must divide", "64"),
    train("a batch of none", ["data.batch_size=0"], "data.batch_size must be 1 or more"),
    train("negative workers", ["data.num_workers=-1"], "data.num_workers must be 0 or more"),
    train("more devices than samples of a step", ["trainer.devices=4096"], "data.batch_size is 64", "4096 devices"),
    train("no device", ["trainer.devices=0"], "trainer.devices", "1 or more"),
    train("devices by a word", ["trainer.devices=many"], "trainer.devices", "auto"),
    train("an unknown strategy", ["trainer.strategy=dpp"], "trainer.strategy", "ddp"),
    train("negative folds", ["cv.folds=-1"], "cv.folds must be 0 or more"),
    train("more folds than samples", ["cv.folds=3000"], "fold", "3000"),
    train("no training samples left", ["cv.val_fraction=1"], "cv.val_fraction must be in [0, 1)"),
    train("a group without columns", ["cv.group=patient"], "cv.group=patient", "cv.group=null"),
    train("a rank of zero", ["peft=lora", "peft.lora.rank=0"], "peft.lora.rank must be a whole number, 1 or more"),
    train("a scale of zero", ["peft=lora", "peft.lora.alpha=0"], "peft.lora.alpha must be positive"),
    train("a dropout of one", ["peft.coeff.dropout=1"], "peft.coeff.dropout must be in [0, 1)"),
    train("an unknown start", ["peft.coeff.init=zeros"], "peft.coeff.init must be residual"),
    train("no layers", ["peft.coeff.layers=[]"], "peft.coeff.layers is empty", "null is all"),
    train("a layer that does not exist", ["peft.coeff.layers=[7]"], "no layer 7", "0 to 1"),
    train("a pattern that matches no layer", ["peft.coeff.layers=[blokcs]"], "blokcs", "matches no layer", "blocks"),
    train(
        "a layer that is neither",
        ["peft.coeff.layers=[1.5]"],
        "1.5",
        "neither an index, a range nor a regular expression",
    ),
    train("a broken pattern", ["peft=lora", "peft.lora.target_modules=['(']"], "'('", "not a regular expression"),
    train("a pattern that takes for ever", ["peft=lora", "peft.lora.target_modules=['(a+)+$']"], "(a+)+$", "for ever"),
    train("a target that does not exist", ["peft=lora", "peft.lora.target_modules=[qvk]"], "qvk", "qkv"),
    train("a slice that does not exist", ["peft=lora", "peft.lora.qkv=[q,x]"], "peft.lora.qkv", "q, k and v"),
    train("two that train the same", ["peft=[full,bitfit]"], "full trains every weight already", "full alone"),
    train("an unknown metric", ["task.metric=acuracy"], "no metric 'acuracy'", "accuracy"),
    train("a metric of two classes", ["task.metric=f1"], "task.metric=f1", "2 classes", "macro_f1"),
    train("smoothing of everything", ["task.label_smoothing=1"], "label_smoothing must be in [0, 1)"),
    train("a metric for several labels", ["task=multi_label", "task.metric=accuracy"], "multi_label", "no metric"),
    train("a balance beyond even", ["data.balance=2"], "data.balance must be in [0, 1]"),
    train("weights of an unknown kind", ["task.class_weight=even"], "task.class_weight", "balanced", "{rose: 2}"),
    train("a weight of no class", ["task.class_weight={ten: 2}"], "task.class_weight", "no class 'ten'"),
    train("a weight of nothing", ["task.class_weight={1: 0}"], "the weight of '1'", "positive number"),
    train("a test part of everything", ["data.test_fraction=1"], "data.test_fraction must be in (0, 1)"),
    train("a share and a number", ["data.test_fraction=0.5", "data.n_test=9"], "data.test_fraction and data.n_test"),
    train("a fraction of nothing", ["data.n_train=null", "data.fraction=0"], "data.fraction must be in (0, 1]"),
    train("a fraction and a number", ["data.fraction=0.5"], "data.n_train and data.fraction", "set all but one"),
    train("more samples than there are", ["data.n_train=100000"], "data.n_train", "100000"),
    train("more samples for tests than there are", ["data.n_test=100000"], "data.n_test", "100000"),
    train("patience without validation", ["trainer.patience=1", "cv.val_fraction=0"], "patience needs validation"),
    train("an image size of zero", ["data.image_size=0"], "data.image_size must be 1 or more"),
    train("an image size between patches", ["data.image_size=18"], "data.image_size", "multiple of the patches"),
    train("a huge image size", ["data.image_size=100000000"], "data.image_size", "100000000"),
    train("an unknown interpolation", ["data.interpolation=cubic"], "data.interpolation must be one of", "bicubic"),
    train("an unknown augmentation", ["data.augment=[flips]"], "no augmentation 'flips'", "flip"),
    train("an augmentation twice", ["data.augment=[flip,flip]"], "twice"),
    train("deviations of zero", ["data.std=[0,0,0]"], "data.std must be positive"),
    train("means of two channels", ["data.mean=[0.5,0.5]", "data.std=[0.5,0.5]"], "data.mean", "3"),
    train("a crop of nothing", ["data.crop_pct=0"], "data.crop_pct must be in (0, 1]"),
    train("an unknown way with errors", ["data.on_error=ignore"], "data.on_error must be raise or skip"),
    train("the test split as validation", ["data.splits.val=test"], "data.splits.val", "no split"),
    # backbones
    train("a timm model that does not exist", ["backbone.name=vit_tniy_patch16_224"], "no model", "vit_tiny"),
    train(
        "an unknown tag of a timm model", ["backbone.name=vit_tiny_patch16_224.gogle"], "no pre-trained tag", "augreg"
    ),
    train("an option that timm does not have", ["backbone.options={dept: 2}"], "dept", "depth"),
    train("heads that do not divide", ["backbone.options.num_heads=5"], "num_heads=5", "timm cannot build"),
    train("an option of a wrong type", ["backbone.options.depth=two"], "backbone.options", "depth='two'"),
    train("an option that coeft sets", ["backbone.options.num_classes=3"], "num_classes", "the config does"),
    Case(
        name="no attention to mix",
        argv=["train", "backbone=timm", "backbone.name=resnet18", "backbone.pretrained=false", "run_dir=out"],
        words=("peft.coeff does not fit resnet18", "attention"),
    ),
    train("a language model's task on timm", ["task=causal_lm"], "timm has no language models", "smollm2_135m"),
    train("regression of classes", ["task=regression"], "data=digits", "the task needs number"),
    # run directories
    train("a run directory that is a file", ["run_dir=file"], "file is a file", make=text_file("file", "x")),
    train("a run directory below a file", ["run_dir=file/run"], "file/run", make=text_file("file", "x")),
    train("a run directory in use", ["run_dir=mine"], "mine exists and is not empty", make=text_file("mine/a", "x")),
    train("a name too long", [f"run_dir={'n' * 300}"], "run_dir", "too long"),
    train("a zero byte in a path", ["run_dir=a\0b"], "run_dir", "null"),
    train("a start from nothing", ["init_from=nowhere"], "nowhere", "no such adapter folder"),
    # flags
    Case(name="an unknown command", argv=["trian"], words=("no command 'trian'", "train")),
    Case(name="an unknown flag", argv=["train", "--reslve", "x"], words=("no flag --reslve", "--resolve")),
    Case(name="an unknown --cfg", argv=["train", *DIGITS, "--cfg", "all"], words=("--cfg all", "--cfg job")),
    Case(
        name="a part of the config that does not exist",
        argv=["train", *DIGITS, "--cfg", "job", "-p", "optm"],
        words=("--package optm", "optim"),
    ),
    Case(name="--resolve alone", argv=["train", *DIGITS, "--resolve"], words=("--resolve", "--cfg job")),
    Case(name="--config-dir without a folder", argv=["train", "-cd", "nowhere"], words=("no folder nowhere",)),
    Case(name="--config-name alone", argv=["train", "-cn", "config"], words=("--config-name config", "--config-dir")),
    Case(
        name="several runs, one of them wrong",
        argv=["train", "-m", *DIGITS, "optim.lr=1e-3,abc"],
        words=("optim.lr must be a number", "abc"),
    ),
    Case(
        name="a table and no path",
        argv=["train", "data=table", "run_dir=out"],
        words=("data.path is required", "data.path=VALUE"),
    ),
    Case(
        name="a model and no name", argv=["train", "backbone=timm", "run_dir=out"], words=("backbone.name is required",)
    ),
    Case(
        name="three mistakes at once",
        argv=["train", *DIGITS, "optim.lr=-1", "optim.schedule=step", "trainer.max_epochs=0"],
        words=("optim.lr", "optim.schedule", "trainer.max_epochs"),
    ),
]


def recipe(name: str, text: str | bytes, *words: str, more: tuple[str, ...] = ()) -> Case:
    """A recipe's file."""
    return Case(
        name=f"a recipe with {name}",
        argv=["train", "recipe=mine.yaml", *DIGITS, *more],
        words=words,
        make=text_file("mine.yaml", text),
    )


def loop(here: Path) -> None:
    (here / "mine.yaml").write_text("defaults:\n  - other.yaml\n")
    (here / "other.yaml").write_text("defaults:\n  - mine.yaml\n")


BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

DOUBLES = "a0: x\n" + "".join(f"a{number + 1}: ${{a{number}}}${{a{number}}}\n" for number in range(60))

RECIPES = [
    Case(name="a recipe that does not exist", argv=["train", "recipe=quickstrat"], words=("quickstrat", "quickstart")),
    Case(
        name="a recipe in a folder that does not exist",
        argv=["train", "recipe=vtab/cifar10"],
        words=("vtab/cifar10", "vtab/cifar100"),
    ),
    Case(name="a recipe's file that is not there", argv=["train", "recipe=./no.yaml"], words=("no file ./no.yaml",)),
    Case(
        name="a recipe's file that is a folder",
        argv=["train", "recipe=./no.yaml"],
        words=("no.yaml",),
        make=lambda here: (here / "no.yaml").mkdir(),
    ),
    Case(name="two recipes", argv=["train", "recipe=quickstart", "recipe=quickstart"], words=("given twice",)),
    Case(name="recipes without -m", argv=["train", "recipe=quickstart,vtab/cifar100"], words=("-m",)),
    recipe("a typo in a key", "optim:\n  lrr: 1\n", "mine.yaml, line 2", "optim.lrr", "lr"),
    recipe("a value of a wrong type", "optim:\n  lr: high\n", "mine.yaml, line 2", "optim.lr must be a number"),
    recipe("a value out of range", "trainer:\n  patience: -3\n", "mine.yaml, line 2", "patience must be 1 or more"),
    recipe("tabs", "optim:\n\tlr: 1\n", "mine.yaml, line 2", "not YAML"),
    recipe("an open bracket", "seeds: [1, 2\n", "mine.yaml", "not YAML"),
    recipe("a key twice", "seed: 1\nseed: 2\n", "mine.yaml", "seed", "line 2"),
    recipe("bytes that are no text", b"seed: \xff\xfe\n", "mine.yaml", "UTF-8"),
    recipe("control characters", "seed: \x07\n", "mine.yaml", "not YAML"),
    recipe("a list at the top", "- seed: 1\n", "mine.yaml", "a mapping of keys to values"),
    recipe("a word alone", "quickstart\n", "mine.yaml", "quickstart: no such key", "recipe"),
    recipe("a class to be made", "seed: !!python/object/apply:os.system ['true']\n", "mine.yaml", "line 1"),
    recipe("brackets a thousand deep", "seeds: " + "[" * 5000 + "]" * 5000, "mine.yaml", "nested"),
    recipe("a billion laughs", BILLION, "mine.yaml"),
    recipe("interpolations that double", DOUBLES, "mine.yaml", "interpolations"),
    recipe("an alias of itself", "seeds: &a [*a]\n", "mine.yaml"),
    recipe("defaults that are no list", "defaults: quickstart\n", "mine.yaml", "defaults must be a list"),
    recipe("an entry of defaults that is a number", "defaults: [3]\n", "mine.yaml", "override /GROUP: OPTION"),
    recipe("an unknown group in defaults", "defaults:\n  - override /optimiser: sgd\n", "'optimiser'", "optim"),
    recipe("an unknown option in defaults", "defaults:\n  - override /optim: sdg\n", "mine.yaml", "'sdg'", "sgd"),
    recipe("a pick without override", "defaults:\n  - optim: sgd\n", "mine.yaml", "- override /optim: sgd"),
    recipe("two recipes that it extends", "defaults: [quickstart, vtab/cifar100]\n", "mine.yaml", "can extend one"),
    recipe(
        "a base after a pick",
        "defaults:\n  - override /peft: [lora]\n  - quickstart\n",
        "mine.yaml",
        "must stand before",
    ),
    recipe("a base that does not exist", "defaults: [quickstrat]\n", "mine.yaml", "quickstrat", "quickstart"),
    recipe("a base's file that is not there", "defaults: [no.yaml]\n", "no file no.yaml", "mine.yaml"),
    recipe("a kind", "optim:\n  kind: sgd\n", "mine.yaml, line 2", "- override /optim: sgd"),
    recipe("a stack outside of defaults", "peft: [lora]\n", "mine.yaml, line 1", "- override /peft: [lora]"),
    recipe("a class of one's own", "optim:\n  _target_: os.system\n", "mine.yaml, line 2", "allow_custom_targets=true"),
    recipe("leave for classes of one's own", "allow_custom_targets: true\n", "can only be typed"),
    recipe("Hydra's settings", "hydra:\n  run:\n    dir: x\n", "mine.yaml", "Hydra's own settings"),
    recipe("a token", "logger:\n  api_key: abc\n", "mine.yaml, line 2", "looks like a secret"),
    recipe("an interpolation of nothing", "optim:\n  lr: ${no.such}\n", "mine.yaml, line 2", "no.such"),
    recipe("an interpolation of itself", "seed: ${seed}\n", "seed"),
    recipe("a resolver that does not exist", "seed: ${no_such:1}\n", "mine.yaml, line 1", "no_such"),
    recipe("an open interpolation", "seed: ${seed\n", "mine.yaml", "seed"),
    recipe("a number as a group", "optim: 3\n", "mine.yaml", "optim"),
    recipe("a mapping with a list as key", "? [a, b]\n: 1\n", "mine.yaml"),
    Case(
        name="recipes that extend each other", argv=["train", "recipe=mine.yaml"], words=("extends itself",), make=loop
    ),
    recipe("a member of a suite with a typo", "suite:\n  a: [optim.lrr=1]\n", "suite.a", "optim.lrr", "lr"),
    recipe("a member with a path for a name", "suite:\n  ../a: [seed=1]\n", "'../a'", "cannot be the name"),
    recipe("a member with the name of a file of runs", "suite:\n  results.json: [seed=1]\n", "cannot be the name"),
    recipe("a suite in a suite", "suite:\n  a: ['suite={}']\n", "suite.a", "cannot stand inside a suite"),
    recipe("members that are the same", "suite:\n  a: [seed=1]\n  b: [seed=1]\n", "a and b", "the same run"),
    recipe("a member that is no list", "suite:\n  a: seed=1\n", "suite", "list"),
    recipe("a suite that is a list", "suite: [seed=1]\n", "mine.yaml, line 1", "suite", "a mapping"),
    recipe("a seed twice", "seeds: [1, 1]\n", "seeds: [1, 1] repeats a seed"),
    recipe("seed beside seeds", "seeds: [1, 2]\n", "seed is set beside seeds", more=("seed=1",)),
]


def sweep(name: str, arguments: list[str], *words: str) -> Case:
    """A wrong search."""
    return Case(name=f"a sweep with {name}", argv=["sweep", *DIGITS, *arguments], words=words)


SWEEPS = [
    sweep("a name that does not exist", ["sweep=lrr"], "sweep: no option 'lrr'", "lr"),
    sweep("a file that is not there", ["sweep=no.yaml"], "no file no.yaml"),
    sweep("a key that does not exist", ["sweep=lr", "sweep.trials=3"], "sweep.trials", "n_trials"),
    sweep("no trials", ["sweep=lr", "sweep.n_trials=0"], "sweep.n_trials must be 1 or more"),
    sweep("a number of trials in words", ["sweep=lr", "sweep.n_trials=ten"], "sweep.n_trials must be a whole number"),
    sweep("an unknown sampler", ["sweep=lr", "sweep.sampler=bayes"], "no sampler 'bayes'", "tpe"),
    sweep("an unknown pruner", ["sweep=lr", "sweep.pruner=asha"], "no pruner 'asha'", "median"),
    sweep("an unknown objective", ["sweep=lr", "sweep.objectives=[accuracy]"], "no objective 'accuracy'", "validation"),
    sweep("an unknown launcher", ["sweep=lr", "sweep.launcher=slurm"], "no launcher 'slurm'", "local"),
    sweep("an empty space", ["sweep.space={}"], "sweep.space is empty", "sweep.space.optim.lr="),
    sweep("a key of the space that does not exist", ["sweep.space.optim.lrr=[1,2]"], "optim.lrr", "lr"),
    sweep("values of a wrong type", ["sweep.space.optim.lr=[a,b]"], "optim.lr must be a number"),
    sweep("values out of range", ["sweep.space.optim.lr=[1e-3,-1]"], "optim.lr must be a positive number"),
    sweep("no values", ["sweep.space.optim.lr=[]"], "optim.lr", "must not be empty"),
    sweep("a value twice", ["sweep.space.optim.lr=[1e-3,1e-3]"], "repeats a value"),
    sweep("a range upside down", ["sweep.space.optim.lr={low: 1, high: 0.1}"], "low must be less than high"),
    sweep("a logarithm of zero", ["sweep.space.optim.lr={low: 0, high: 1, log: true}"], "low must be positive"),
    sweep("a grid of a range", ["sweep.sampler=grid", "sweep.space.optim.lr={low: 0.1, high: 1}"], "a list of values"),
    sweep(
        "a method outside of the stack", ["sweep.space.peft.lora.rank=[1,2]"], "no trial has lora", "peft=[coeff,lora]"
    ),
    sweep("what cannot be searched", ["sweep.space.seeds=[1,2]"], "seeds", "cannot be searched"),
    sweep("what is typed too", ["sweep.space.optim.lr=[1,2]", "optim.lr=1"], "typed and searched", "=null"),
    sweep("a storage that is no address", ["sweep=lr", "sweep.storage=study.db"], "sqlite:///FILE"),
    sweep("an address without Ray", ["sweep=lr", "sweep.address=auto"], "sweep.launcher=ray"),
    sweep("a pruner and two objectives", ["sweep=pareto", "sweep.pruner=median"], "needs a single objective"),
    sweep("nothing to select by", ["sweep=lr", "cv.val_fraction=0"], "validation data", "cv.val_fraction"),
    sweep("no name", ["sweep="], "no option ''", "grid"),
    Case(
        name="a sweep's file that is no sweep",
        argv=["sweep", *DIGITS, "sweep=mine.yaml"],
        words=("mine.yaml", "sampler"),
        make=text_file("mine.yaml", "samplr: tpe\n"),
    ),
    Case(
        name="a sweep's file with a space that is a list",
        argv=["sweep", *DIGITS, "sweep=mine.yaml"],
        words=("mine.yaml", "space must be a mapping"),
        make=text_file("mine.yaml", "space: [optim.lr]\n"),
    ),
]

CASES = [*TYPED, *RECIPES, *SWEEPS]
