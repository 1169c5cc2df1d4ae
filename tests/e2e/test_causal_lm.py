"""Language models from the command line: a small random Llama learns to answer."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from small import coeft, lasting, results
from tiny_chat import ANSWER, chats, command, questions, tiny_llama, write

from coeft import load_adapter
from coeft.assemble import assemble, build_backbone, restore
from coeft.attention.mixer import CoeffMixer
from coeft.data._chat import Renderer
from coeft.data._module import TrainOrder
from coeft.run import Run
from coeft.train import Epoch, Interrupted, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, the whole model trained."""
    folder = tmp_path_factory.mktemp("runs") / "chat"
    line = [*command(model), f"data.path={data}", "data.messages=messages", "peft=full", "peft.full.lr=1e-2"]
    assert coeft("train", *line, "trainer.max_epochs=5", "task.max_new_tokens=12", f"run_dir={folder}") == 0
    return folder


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_answers_follow(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert losses[-1] < 0.2 < 2 < losses[0]
    written = samples(run)
    assert [row["epoch"] for row in written] == [epoch for epoch in range(5) for _ in range(3)]
    assert all(row["expected"] == ANSWER for row in written)
    assert all(row["generated"] == ANSWER for row in written[-3:])
    assert not any(row["generated"] == ANSWER for row in written[:3])
    assert written[0]["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_adapters_of_language_models_have_no_head_and_load(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(run)
    assert found["metric"] == "loss" and found["value"] == pytest.approx(found["folds"][0]["value"])
    assert not (run / "adapter" / "head.safetensors").exists()
    built, classes = restore(Run.open(run).config, run / "adapter")
    assert classes == [] and built.module.task.num_outputs == 0
    assert coeft("eval", run) == 0
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("exact_match", "perplexity", "token_accuracy"))
    assert "validation" in shown and "held" not in shown  # it has no other data


@pytest.mark.parametrize("form", ["prompt", "line", "table", "chats", "several"])
def test_predict_answers(
    run: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "What is water 3?"
    if form == "prompt":
        assert coeft("predict", run, prompt) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"
    if form == "line":
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n\nWhat is a/b//c?\n"))
        assert coeft("predict", run, "-") == 0
        assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"
    if form == "table":
        (tmp_path / "prompts.csv").write_text(f'prompt\n"{prompt}"\nand fire?\n')
        assert coeft("predict", run, tmp_path / "prompts.csv", "--out", tmp_path / "out.jsonl") == 0
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert rows == [{"input": prompt, "generated": ANSWER}, {"input": "and fire?", "generated": ANSWER}]
    if form == "chats":
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "?"}]
        file = write(tmp_path / "chats.jsonl", [{"messages": chat}])
        assert coeft("predict", run, file, "--out", tmp_path / "out.csv") == 0
        assert (tmp_path / "out.csv").read_text().splitlines() == ["input,generated", f"{prompt},{ANSWER}"]
    if form == "several":
        assert coeft("predict", run, prompt, "and fire?", "--max-new-tokens", "2") == 0
        rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
        assert [row[0] for row in rows] == ["input", prompt, "and fire?"]
        assert ANSWER.startswith(rows[1][1]) and len(rows[1][1]) < len(ANSWER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: no such file"),
        (["a", "--temperature", "-1"], "temperature must be 0"),
        (["a", "--out", "x.txt"], "must end in .csv or .jsonl"),
        (["a", "--fold", "1"], "leave --fold out"),
        (["x" * 2000], "the model takes 128 in all"),
    ],
)
def test_predict_says_what_is_wrong(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coeft("predict", run, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("micro", [8, 2])
def test_a_step_is_the_mean_over_its_tokens_however_it_is_divided(model: Path, micro: int, tmp_path: Path) -> None:
    """Two steps of clipped gradient descent by hand; the second has three rows. A mean of means would differ."""
    rows = [{"prompt": "Say", "completion": " yes" * (1 + number % 7)} for number in range(11)]
    file = write(tmp_path / "pairs.jsonl", rows)
    line = [*command(model), f"data.path={file}", "data.prompt=prompt", "data.completion=completion"]
    line += ["peft=[coeff]", "peft.coeff.dropout=0", "peft.coeff.lr=0.5", "optim=sgd", "optim.momentum=0"]
    line += ["optim.schedule=constant", "optim.warmup_fraction=0", "optim.weight_decay=0", "trainer.clip_norm=0.02"]
    line += ["trainer.max_epochs=1", "task.samples_per_epoch=0", "cv.val_fraction=0"]
    assert coeft("train", *line, f"trainer.micro_batch_size={micro}", f"run_dir={tmp_path / 'run'}") == 0
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    cfg = Run.open(tmp_path / "run").config
    trained, _ = restore(cfg, tmp_path / "run" / "adapter")

    backbone = build_backbone(cfg)
    hand = assemble(cfg, backbone, 0)
    alphas = [p for p in hand.module.parameters() if p.requires_grad]
    renderer = Renderer(backbone.tokenizer)
    order = list(TrainOrder(len(rows), seed=0, fold=0))
    norms = []
    for step in (order[:8], order[8:]):
        losses = []
        for number in step:
            row = renderer.render(rows[number])
            ids = torch.tensor([row.input_ids])
            shares = torch.log_softmax(backbone.model(input_ids=ids).logits[0], -1)
            losses += [-shares[place - 1, ids[0, place]] for place in range(1, ids.shape[1]) if row.learnt[place]]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), alphas)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        norms.append(float(norm))
        with torch.no_grad():
            for alpha, gradient in zip(alphas, gradients, strict=True):
                alpha -= 0.5 * gradient * min(1.0, 0.02 / norm)
    assert norms[0] > 0.02  # it is clipped
    found = [p for p in trained.module.parameters() if p.requires_grad]
    assert max(float(alpha.detach().abs().max()) for alpha in found) > 1e-3
    for one, other in zip(found, alphas, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_packed_rows_train_and_folds_have_their_own_models(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*command(model), f"data.path={data}", "data.messages=messages", "peft=[coeff,lora]", "task.packing=true"]
    line += ["data.max_length=100", "data.batch_size=2", "trainer.max_epochs=1", "cv.folds=2"]
    line += ["task.metric=exact_match", "task.max_new_tokens=2", "task.samples_per_epoch=1"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'run'}") == 0
    found = results(tmp_path / "run")
    assert [fold["n_test"] for fold in found["folds"]] == [24, 24]
    assert found["heldout"]["perplexity"] > 1 and found["value"] == found["heldout"]["exact_match"]
    assert len(samples(tmp_path / "run" / "fold_1")) == 1
    capsys.readouterr()
    assert coeft("predict", tmp_path / "run", "What?") == 2
    assert "choose one by --fold K" in capsys.readouterr().err
    assert coeft("predict", tmp_path / "run", "What?", "--fold", "1", "--max-new-tokens", "2") == 0
    assert coeft("export", "adapter", tmp_path / "run", "--fold", "1", "--out", tmp_path / "adapter") == 0
    both_reload(model, tmp_path / "run", tmp_path / "adapter")


def both_reload(model: Path, run: Path, adapter: Path) -> None:
    """The adapter in coeft (all of it) and in plain peft (its LoRA part) gives the run's logits."""
    tokens = torch.arange(3, 43).view(2, 20)
    built, _ = restore(Run.open(run).config, adapter)
    trained = built.backbone.model.eval()

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(model)

    loaded = load_adapter(base(), adapter)
    assert torch.equal(logits(loaded), logits(trained))
    assert (logits(loaded) - logits(base())).abs().max() > 1e-3
    for mixer in (module for module in trained.modules() if isinstance(module, CoeffMixer)):
        assert mixer.alpha().abs().max() > 0
        mixer.set_alpha(torch.zeros(mixer.num_heads, mixer.num_heads))
    with pytest.warns(match="other_parts_need_coeft"):
        stock = peft.PeftModel.from_pretrained(base(), adapter).eval()
    torch.testing.assert_close(logits(stock), logits(trained), rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_is_resumed_with_its_samples(run: Path, tmp_path: Path) -> None:
    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    cfg = replace(Run.open(run).config, run_dir=str(tmp_path / "again"))
    with pytest.raises(Interrupted):
        train(cfg, watch=stop)
    assert samples(tmp_path / "again")
    assert coeft("resume", tmp_path / "again") == 0
    assert samples(tmp_path / "again") == samples(run)
    assert lasting(results(tmp_path / "again")) == lasting(results(run))


def test_a_model_without_a_template_says_what_to_do(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    template = bare / "chat_template.jinja"
    moved = tmp_path / "own.jinja"
    template.rename(moved)
    line = [*command(bare), f"data.path={data}", "data.messages=messages", "peft=coeff", "dry_run=true"]
    assert coeft("train", *line) == 2
    assert "no chat template" in (shown := capsys.readouterr().err) and "data.chat_template=FILE" in shown
    assert coeft("train", *line, f"data.chat_template={moved}") == 0
    moved.write_text("{% for message in messages %}")
    assert coeft("train", *line, f"data.chat_template={moved}") == 2
    assert "own.jinja, line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=digits"], "data=digits has no text"),
        (["data.augment=[flip]", "data.image_size=32"], "data.image_size, data.augment: of images"),
    ],
)
def test_images_and_their_settings_are_refused(
    model: Path, data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*command(model), f"data.path={data}", "data.messages=messages", "peft=coeff", "dry_run=true"]
    if options[0].startswith("data="):
        line = [word for word in line if not word.startswith("data")]
    assert coeft("train", *line, *options) == 2
    assert message in capsys.readouterr().err


def test_rows_that_teach_nothing_are_errors_or_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Say", "completion": " yes"} for _ in range(12)]
    rows += [{"prompt": "Say" * 40, "completion": " yes"}, {"prompt": "Say", "completion": " yes" * 20}]
    file = write(tmp_path / "pairs.jsonl", rows)
    line = [*command(model), f"data.path={file}", "data.prompt=prompt", "data.completion=completion", "peft=coeff"]
    line += ["data.max_length=12", "dry_run=true"]
    assert coeft("train", *line) == 2
    assert "pairs.jsonl:13" in (shown := capsys.readouterr().err) and "nothing of the completion" in shown
    assert coeft("train", *line, "data.on_error=skip") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 of 14 rows were cut at data.max_length" in shown


def test_multiple_choice_learns_from_questions(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = questions(tmp_path / "questions.jsonl", 100)
    line = [*command(model, "multiple_choice"), f"data.path={file}", "data.input=question", "data.choices=choices"]
    line += ["data.label=answer", "peft=full", "peft.full.lr=1e-2", "trainer.max_epochs=6", "data.n_test=12"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'run'}") == 0
    found = results(tmp_path / "run")
    assert found["metric"] == "accuracy" and found["value"] > 0.6
    assert set(found["test"]) >= {"accuracy", "accuracy_unnormalised", "loss"}
    capsys.readouterr()
    assert coeft("predict", tmp_path / "run", file) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 100 and list(rows[0]) == ["input", "prediction", "A", "B", "C"]
    assert sum(float(rows[0][letter]) for letter in "ABC") == pytest.approx(1, abs=1e-4)
    right = [json.loads(text)["answer"] for text in file.read_text().splitlines()]
    assert sum(row["prediction"] == answer for row, answer in zip(rows, right, strict=True)) > 60
