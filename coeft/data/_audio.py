"""Sounds for a backbone: waveforms decoded and resampled once, and their spectrograms, both kept in the cache.

An entry is CACHE/waveforms/KEY with samples.npy (float32 (N, T)), or CACHE/spectrograms/KEY with samples.npy
(float32 (N, bands, frames)); beside it checks.npy (uint32 (N,), CRC-32 of each row) and meta.json. The key of waveforms
hashes the files' contents, rate, length and the decoder's versions; that of spectrograms also their settings.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coeft.backbones._backbone import Backbone, Hearing
from coeft.data._cache import HeldPixels, MappedPixels
from coeft.data._entries import CHECKED, obtain
from coeft.data._folders import SOUNDS, file_inputs
from coeft.data._part import Batch, Encoded, Progress
from coeft.data._sound import libraries, read_sound
from coeft.data._source import LISTED_ERRORS, Split, default_threads, listed, over_threads
from coeft.data._spectrogram import front_end
from coeft.data.audio_folder import AudioFolder
from coeft.errors import UserError

FORMAT = 1  # raised when decoding or spectrograms change, so that old entries are not found
CLIPS = 32  # whose spectrograms are made at once


@dataclass
class MappedSound(MappedPixels):
    """Waveforms (N, T) or spectrograms (N, bands, frames) of a cache entry."""

    def batch(self, fetched: np.ndarray) -> Batch:
        """sound, float32 (B, T) or (B, bands, frames)."""
        return {"sound": torch.from_numpy(fetched)}


@dataclass
class HeldSound(HeldPixels):
    """The same in memory."""

    def batch(self, fetched: np.ndarray) -> Batch:
        """sound, float32 (B, T) or (B, bands, frames)."""
        return {"sound": torch.from_numpy(fetched)}


def resolve_hearing(settings: AudioFolder, backbone: Backbone) -> Hearing:
    """What sounds of this data go through before this model.

    Raises:
        UserError: the clips are longer than what the model of sound takes, or images' settings are given for one.
    """
    fbank = backbone.fbank
    hearing = Hearing(
        sample_rate=settings.sample_rate if fbank is None else fbank.sample_rate,
        seconds=settings.seconds,
        longer=settings.longer,
        shorter=settings.shorter,
        features=settings.spectrogram if fbank is None else fbank,
    )
    frames = front_end(hearing).frames(hearing.samples)
    if fbank is None:
        if hearing.samples < settings.spectrogram.n_fft:
            raise UserError(
                f"data.seconds={settings.seconds:g} at {hearing.sample_rate} Hz are {hearing.samples} samples, fewer "
                f"than a window of data.spectrogram.n_fft={settings.spectrogram.n_fft}; lower n_fft"
            )
        return hearing
    given = [f"data.{key}" for key in ("image_size", "interpolation", "mean", "std") if getattr(settings, key)]
    if given:
        raise UserError(f"{', '.join(given)}: of pictures, but {backbone.name} takes sound; leave out")
    if not 1 <= frames <= fbank.frames:
        raise UserError(
            f"data.seconds={settings.seconds:g} makes {frames} frames; {backbone.name} takes 1 to {fbank.frames}, "
            f"up to {fbank.frames / 100 + 0.015:g} s"
        )
    return hearing


def sound_inputs(paths: Sequence[str | os.PathLike[str]]) -> Split:
    """Sounds to predict, see file_inputs."""
    return file_inputs(paths, SOUNDS)


@dataclass(frozen=True)
class AudioEncoder:
    """Files of sound to spectrograms or, where augmentations change them first, to waveforms."""

    hearing: Hearing
    waveforms: bool = False
    """Give waveforms."""
    modality = "audio"

    def encode(
        self,
        split: Split,
        *,
        made_from: str,
        on_error: str = "raise",
        threads: int = 0,
        keep: bool = True,
        progress: Progress = lambda done, total: None,
    ) -> Encoded:
        """See Encoder.encode."""
        libraries()
        shape = (len(split), self.hearing.samples)
        if not keep:
            array = np.zeros(shape, np.float32)
            decoded = _Decoded(split, self.hearing, on_error, threads, progress)
            decoded.each(array.__setitem__)
            held = array if self.waveforms else np.concatenate(list(_spectrograms(array, self.hearing)))
            return _encoded(HeldSound(held), decoded.bad, decoded.lengths(), self.hearing)
        key = _key(split, self.hearing)
        waveforms, meta = obtain(
            "waveforms",
            key,
            lambda entry: _open(entry, shape, {"bad", "lengths"}),
            lambda folder: _write_waveforms(folder, split, self.hearing, made_from, on_error, threads, progress),
            needed=4 * int(np.prod(shape)),
        )
        bad = {int(row): str(reason) for row, reason in meta["bad"].items()}
        if bad and on_error == "raise":
            raise UserError(_unreadable(split, bad, complete=True))
        store = waveforms if self.waveforms else self._spectrograms(waveforms, key, made_from)
        return _encoded(store, bad, meta["lengths"], self.hearing)

    def _spectrograms(self, waveforms: MappedSound, key: str, made_from: str) -> MappedSound:
        """The entry made of that of the waveforms."""
        front = front_end(self.hearing)
        bands = front.filters.shape[0]
        shape = (waveforms.shape[0], bands, front.frames(self.hearing.samples))
        facts = (key, repr(self.hearing.features), torch.__version__)
        spectrogram_key = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

        def write(folder: Path) -> dict[str, Any]:
            rows = (
                waveforms.fetch(np.arange(start, min(start + CLIPS, shape[0]))) for start in range(0, shape[0], CLIPS)
            )
            made = (row for batch in rows for block in _spectrograms(batch, self.hearing) for row in block)
            _write_rows(folder, shape, made)
            return {"samples": shape[0], "made_from": f"{made_from}, {bands} bands"}

        found, _ = obtain(
            "spectrograms", spectrogram_key, lambda entry: _open(entry, shape), write, needed=4 * int(np.prod(shape))
        )
        return found


def _spectrograms(waveforms: np.ndarray, hearing: Hearing) -> Iterator[np.ndarray]:
    """Spectrograms of waveforms (N, T) in blocks of (n, bands, frames)."""
    front = front_end(hearing)
    for start in range(0, len(waveforms), CLIPS):
        with torch.no_grad():
            yield front(torch.from_numpy(waveforms[start : start + CLIPS])).numpy()


def _encoded(store: Any, bad: dict[int, str], lengths: dict[str, int], hearing: Hearing) -> Encoded:
    warnings = []
    if lengths["longer"]:
        kept = "their centre" if hearing.longer == "centre" else "their start"
        warnings.append(f"{lengths['longer']} sounds are longer than data.seconds={hearing.seconds:g}: {kept} is used")
    if lengths["shorter"]:
        filled = "filled up with zeros" if hearing.shorter == "zeros" else "repeated"
        warnings.append(f"{lengths['shorter']} sounds are shorter than data.seconds={hearing.seconds:g}: {filled}")
    good = np.setdiff1d(np.arange(store.shape[0], dtype=np.int64), np.array(sorted(bad), np.int64))
    return Encoded(store=store, good=good, bad=bad, warnings=warnings)


class _Decoded:
    """Waveforms of a split, decoded in threads; what cannot be read, and how long the files are."""

    def __init__(self, split: Split, hearing: Hearing, on_error: str, threads: int, progress: Progress) -> None:
        self.split, self.hearing, self.on_error = split, hearing, on_error
        self.threads, self.progress = threads, progress
        self.bad: dict[int, str] = {}
        self.seconds: dict[int, float] = {}

    def lengths(self) -> dict[str, int]:
        """How many files are clearly (by more than 10 ms) longer or shorter than a clip."""
        found = [seconds - self.hearing.seconds for row, seconds in self.seconds.items() if row not in self.bad]
        return {"longer": sum(more > 0.01 for more in found), "shorter": sum(more < -0.01 for more in found)}

    def each(self, store: Callable[[int, np.ndarray], None], after: Callable[[int], None] = lambda done: None) -> None:
        """store(row, waveform) for every readable sound, in any order; after(done) follows each chunk.

        Raises:
            UserError: sounds cannot be read (on_error=raise).
        """
        total = len(self.split)

        def work(row: int, item: Any) -> None:
            try:
                waveform, self.seconds[row] = read_sound(item, self.hearing)
            except ValueError as error:
                self.bad[row] = str(error)
                return
            store(row, waveform)

        def chunk_done(done: int) -> None:
            if self.on_error == "raise" and len(self.bad) >= LISTED_ERRORS:
                raise UserError(_unreadable(self.split, self.bad, complete=False))
            after(done)
            self.progress(done, total)

        over_threads(work, self.split.items, threads=self.threads or default_threads(), after=chunk_done)
        if self.bad and self.on_error == "raise":
            raise UserError(_unreadable(self.split, self.bad, complete=True))


def _unreadable(split: Split, bad: dict[int, str], *, complete: bool) -> str:
    lines = [f"{split.names[row]}: {bad[row]}" for row in sorted(bad)]
    return listed("sound cannot be read", "sounds cannot be read", lines, complete=complete)


def _key(split: Split, hearing: Hearing) -> str:
    """32 hexadecimal digits for the contents, in order, and all that decides their waveforms."""
    digest = hashlib.blake2b(digest_size=16)
    plain = replace(hearing, features=None)
    digest.update(repr((FORMAT, libraries(), plain)).encode())
    digest.update(split.digests.tobytes())
    return digest.hexdigest()


def _write_waveforms(
    folder: Path, split: Split, hearing: Hearing, made_from: str, on_error: str, threads: int, progress: Progress
) -> dict[str, Any]:
    """Decode into the files of an entry; gives what its meta.json says."""
    decoded = _Decoded(split, hearing, on_error, threads, progress)
    shape = (len(split), hearing.samples)
    waiting: dict[int, np.ndarray] = {}
    blank = np.zeros(hearing.samples, np.float32)
    checks = np.zeros(len(split), np.uint32)
    with _rows_file(folder, shape) as file:
        written = 0

        def flush(done: int) -> None:
            nonlocal written
            for row in range(written, done):
                data = waiting.pop(row, blank).tobytes()
                checks[row] = zlib.crc32(data)
                file.write(data)
            written = done

        decoded.each(waiting.__setitem__, flush)
    split.check_unchanged()  # its key is the hash of what was there before
    np.save(folder / "checks.npy", checks)
    bad = {str(row): decoded.bad[row] for row in sorted(decoded.bad)}
    seconds, rate = f"{hearing.seconds:g} s", f"{hearing.sample_rate} Hz"
    return {
        "bad": bad, "lengths": decoded.lengths(), "samples": shape[0], "made_from": f"{made_from}, {seconds} at {rate}"
    }  # fmt: skip


def _rows_file(folder: Path, shape: tuple[int, ...]) -> Any:
    """samples.npy with its header written: row after row, so that a full disk is an error, not a killed process."""
    file = open(folder / "samples.npy", "wb")
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file


def _write_rows(folder: Path, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    checks = np.zeros(shape[0], np.uint32)
    with _rows_file(folder, shape) as file:
        for number, row in enumerate(rows):
            data = np.ascontiguousarray(row, "<f4").tobytes()
            checks[number] = zlib.crc32(data)
            file.write(data)
    np.save(folder / "checks.npy", checks)


def _open(
    entry: Path, shape: tuple[int, ...], facts: Collection[str] = ()
) -> tuple[MappedSound, dict[str, Any]] | None:
    """The entry and its meta.json, or None if it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        array = np.load(entry / "samples.npy", mmap_mode="r", allow_pickle=False)
        checks = np.load(entry / "checks.npy", allow_pickle=False)
        if array.shape != shape or array.dtype != np.float32 or checks.shape != shape[:1]:
            return None
        if not isinstance(meta, dict) or not set(facts) <= set(meta):
            return None
        # All rows, or rows spread evenly over an entry that would take long to read.
        step = max(1, array.nbytes // CHECKED)
        for row in range(0, shape[0], step):
            if zlib.crc32(array[row]) != checks[row]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return MappedSound(entry / "samples.npy", shape, array), meta
