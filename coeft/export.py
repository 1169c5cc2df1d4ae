"""Hand out what a run learnt."""

import shutil
import tempfile
from pathlib import Path

from coeft.adapter_io import read_manifest, write_tensors
from coeft.errors import UserError
from coeft.run import Run


def export_adapter(path: str | Path, out: Path | None = None, fold: int | None = None) -> Path:
    """Copy a run's adapter, or one fold's, to a folder of its own; return that folder.

    Args:
        path: a complete run.
        out: a folder that does not exist yet; None is RUN/export/adapter, with the fold's number for folds.
        fold: which fold's adapter, for a cross-validation.

    Raises:
        UserError: no complete run, no such fold, or `out` exists.
    """
    run = Run.open(path)
    source = run.adapter(fold)
    read_manifest(source)
    target = (out or run.path / "export" / ("adapter" if fold is None else f"adapter_fold_{fold}")).expanduser()
    if target.exists():
        raise UserError(f"--out: {target} exists; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            shutil.copytree(source, part, dirs_exist_ok=True)
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--out: cannot write {target} ({error.strerror})") from error
    return target


def export_weights(path: str | Path, out: Path) -> Path:
    """Write the model of a run as one plain state dict, for backbone.weights or timm; return the file.

    Every method must fold into the base model's own weights: full, bitfit, lora, or none. The head is left out.

    Raises:
        UserError: a method of the stack cannot be folded, or `out` exists.
    """
    from coeft.adapt import merge
    from coeft.assemble import restore

    run = Run.open(path)
    if out.exists():
        raise UserError(f"{out} exists; choose another file")
    built, _ = restore(run.config, run.adapter())
    left = merge(built.backbone, built.stack)
    if left:
        raise UserError(f"{run.path}: {', '.join(left)} cannot be folded into the base model's weights")
    heads = tuple(f"{head}." for head in built.backbone.heads)
    state = built.backbone.model.state_dict()
    write_tensors(out, {name: state[name] for name in state if not name.startswith(heads)}, {"format": "pt"})
    return out
