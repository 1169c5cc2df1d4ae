"""Sounds: files, spectrograms against transformers' own, augmentations by what they do to tones, caches and groups."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sounds import RATE, tone, tones, write
from torch import Tensor
from transformers import ASTFeatureExtractor, audio_utils

from coeft.backbones._backbone import Backbone, Fbank, Hearing, Preprocessing
from coeft.config import CV
from coeft.data import _audio, _sound_transforms, audio_folder
from coeft.data._audio import AudioEncoder, resolve_hearing, sound_inputs
from coeft.data._data import Data, load_data, load_inputs
from coeft.data._entries import cache_info
from coeft.data._folds import make_folds
from coeft.data._sound import read_sound
from coeft.data._sound_transforms import Features, Picture, SoundAugment, pitch_shift
from coeft.data._spectrogram import KaldiFbank, LogMel, mel_filters
from coeft.data.audio_folder import AudioFolder, Spectrogram, Strength
from coeft.errors import UserError

AST = Fbank(sample_rate=16_000, bands=128, frames=1024, mean=-4.2677393, std=4.5689974)


def hearing(**settings: Any) -> Hearing:
    known: dict[str, Any] = {
        "sample_rate": RATE, "seconds": 0.5, "longer": "centre", "shorter": "zeros", "features": Spectrogram()
    }  # fmt: skip
    return Hearing(**known | settings)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def loudest(waveform: Tensor | np.ndarray, rate: int = RATE) -> float:
    """Hz of the largest peak of a spectrum, between bins by a parabola over its logarithm."""
    values = np.asarray(waveform, np.float64)
    power = np.log(np.abs(np.fft.rfft(values * np.hanning(len(values)))) ** 2 + 1e-30)
    top = int(power.argmax())
    left, here, right = power[top - 1 : top + 2]
    return (top + 0.5 * (left - right) / (left - 2 * here + right)) * rate / len(values)


# Spectrograms


def mel(hertz: np.ndarray) -> np.ndarray:
    """O'Shaughnessy's scale."""
    return 2595 * np.log10(1 + hertz / 700)


@pytest.mark.parametrize("norm", [None, "slaney"])
def test_mel_filters_are_triangles_between_equal_steps_in_mel(norm: str | None) -> None:
    filters, centres = mel_filters(513, 64, 20.0, 8000.0, 16_000, "htk", norm=norm)
    corners = 700 * (10 ** (np.linspace(mel(np.array(20.0)), mel(np.array(8000.0)), 66) / 2595) - 1)
    frequencies = np.linspace(0, 8000, 513)
    for band, (left, middle, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        peak = 2 / (right - left) if norm else 1.0
        expected = peak * np.interp(frequencies, [left, middle, right], [0, 1, 0])
        np.testing.assert_allclose(filters[band], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(centres, corners[1:-1], rtol=1e-9)
    straight, _ = mel_filters(257, 128, 20, 8000, 16_000, "kaldi", triangularize_in_mel_space=True)
    steps = np.linspace(mel(np.array(20.0)), mel(np.array(8000.0)), 130)
    places = mel(np.linspace(0, 8000, 257))
    expected = [np.interp(places, steps[band : band + 3], [0, 1, 0]) for band in range(128)]
    np.testing.assert_allclose(straight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"n_fft": 512, "hop_length": 200, "n_mels": 40, "mel_scale": "slaney"}])
def test_a_log_mel_spectrogram_is_that_of_transformers(settings: dict[str, Any]) -> None:
    chosen = Spectrogram(f_max=7000.0, norm="slaney", **settings)
    waveform = noise(8000) + tone(440.0).astype(np.float32)
    front = LogMel(chosen, RATE)
    window = audio_utils.window_function(chosen.n_fft, "hann")
    power = audio_utils.spectrogram(
        waveform, window, chosen.n_fft, chosen.hop_length, chosen.n_fft, power=2.0,
        mel_filters=front.filters.double().numpy().T, mel_floor=1e-20,
    )  # fmt: skip
    expected = 10 * np.log10(power * 4 / window.sum() ** 2)
    found = front(torch.from_numpy(waveform)[None])
    assert found.shape == (1, chosen.n_mels, front.frames(8000))
    torch.testing.assert_close(found[0].double(), torch.from_numpy(expected), rtol=0, atol=2e-3)


def test_zero_decibels_are_a_sine_of_full_scale_or_the_loudest_moment() -> None:
    sine = torch.from_numpy(tone(1000.0, peak=1.0)).float()[None]
    wide = Spectrogram(n_mels=16)  # whose bands are wider than the window's main lobe
    assert LogMel(wide, RATE)(sine).amax() == pytest.approx(1.76, abs=1.0)  # 3/2 of its power: the lobe has three bins
    hiss = torch.from_numpy(noise(8000))[None]
    quiet = LogMel(replace(wide, reference="max"), RATE)(torch.cat([hiss, 0.01 * hiss]))
    assert quiet.amax((1, 2)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(quiet[0], quiet[1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("extra", [{}, {"num_mel_bins": 64, "max_length": 300, "mean": -1.5, "std": 2.0}])
def test_features_are_those_of_the_feature_extractor_of_ast(extra: dict[str, Any]) -> None:
    extractor = ASTFeatureExtractor(**extra)
    assert not hasattr(extractor, "kaldi") and hasattr(
        extractor, "mel_filters"
    )  # its NumPy way: there is no torchaudio
    features = Fbank(
        sample_rate=16_000, bands=extractor.num_mel_bins, frames=extractor.max_length, mean=extractor.mean,
        std=extractor.std,
    )  # fmt: skip
    waveforms = [noise(32_000), (noise(32_000) + tone(523.0, 2.0) + 0.1).astype(np.float32)]
    expected = extractor(waveforms, sampling_rate=16_000, return_tensors="pt")["input_values"]
    found = Features(hearing(seconds=2.0, features=features))(torch.from_numpy(np.stack(waveforms)))
    assert found.shape == expected.shape == (2, features.frames, features.bands)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-3)


def test_front_ends_compute_in_float32_under_autocast() -> None:
    waveforms = torch.from_numpy(noise(8000))[None]
    for front in (LogMel(Spectrogram(), RATE), KaldiFbank(AST)):
        with torch.autocast("cpu", torch.bfloat16):
            found = front(waveforms)
        assert found.dtype == torch.float32
        assert torch.equal(found, front(waveforms))


def test_bands_without_a_frequency_are_refused() -> None:
    with pytest.raises(UserError, match="n_mels=128 bands are too narrow.*n_fft=256"):
        LogMel(Spectrogram(n_fft=256), RATE)
    with pytest.raises(UserError, match="f_max=9000 Hz is above 8000 Hz"):
        LogMel(Spectrogram(f_max=9000.0), RATE)
    with pytest.raises(UserError, match="f_min=4000 Hz must be below 3000"):
        LogMel(Spectrogram(f_min=4000.0, f_max=3000.0), RATE)


def test_a_picture_has_low_frequencies_at_the_bottom_and_time_from_left_to_right() -> None:
    look = Preprocessing(
        image_size=(32, 48), mean=(0.5, 0.5, 0.5), std=(0.25,) * 3, interpolation="bilinear", crop_pct=1
    )
    silence = np.zeros(4000)
    late = torch.from_numpy(np.concatenate([silence, tone(6000.0, 0.25)]))[None].float()
    early = torch.from_numpy(np.concatenate([tone(200.0, 0.25), silence]))[None].float()
    picture = Picture(hearing(), look)
    high, low = picture(torch.cat([late, early]))
    assert high.shape == (3, 32, 48) and torch.equal(high[0], high[2])
    assert (
        high[0, :16, 24:].amax() > high[0, :, :20].amax() + 1 and high[0, :16].amax() > high[0, 16:, 30:40].amax() + 1
    )
    assert low[0, 16:, :24].amax() > low[0, :, 28:].amax() + 1 and low[0, 16:].amax() > low[0, :16, 8:18].amax() + 1
    assert low.min() >= (0 - 0.5) / 0.25 and low.max() <= (1 - 0.5) / 0.25
    spectrograms = picture.front(torch.cat([late, early]))
    kept = spectrograms.clone()
    torch.testing.assert_close(picture(spectrograms), torch.stack([high, low]))
    assert torch.equal(spectrograms, kept)  # what the data holds is not changed


# Files


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.WAV"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_tone_is_the_same_in_every_format_and_at_every_rate(name: str, rate: int, tmp_path: Path) -> None:
    path = tmp_path / name
    left, right = tone(440.0, 0.5, rate, peak=0.8), tone(440.0, 0.5, rate, peak=0.4)
    soundfile.write(path, np.stack([left, right], 1), rate)
    found, seconds = read_sound(path, hearing())
    assert found.shape == (8000,) and found.dtype == np.float32
    assert seconds == pytest.approx(0.5, abs=0.1)  # MP3 fills up its last frame
    assert loudest(found[1000:7000]) == pytest.approx(440.0, abs=1.0)
    assert np.sqrt(2 * np.mean(found[2000:6000] ** 2)) == pytest.approx(0.6, abs=0.02)  # the mean of both channels


def test_longer_sounds_are_cut_and_shorter_ones_filled_up(tmp_path: Path) -> None:
    values = np.arange(1000) / 2000
    path = write(tmp_path / "a.wav", values, 1000)
    clip = hearing(sample_rate=1000, seconds=0.5)
    np.testing.assert_allclose(read_sound(path, clip)[0], values[250:750], atol=1e-4)
    np.testing.assert_allclose(read_sound(path, replace(clip, longer="start"))[0], values[:500], atol=1e-4)
    long = replace(clip, seconds=2.5)
    found, seconds = read_sound(path, long)
    np.testing.assert_allclose(found, np.concatenate([values, np.zeros(1500)]), atol=1e-4)
    assert seconds == 1.0
    repeated = read_sound(path, replace(long, shorter="repeat"))[0]
    np.testing.assert_allclose(repeated, np.concatenate([values, values, values[:500]]), atol=1e-4)


def no_rate(path: Path) -> None:
    data = bytearray(write(path, tone(440.0)).read_bytes())
    data[24:28] = struct.pack("<I", 0)
    path.write_bytes(data)


def not_finite(path: Path) -> None:
    soundfile.write(path, np.array([0.1, np.nan] * 4000, np.float32), RATE, subtype="FLOAT")


def cut_off(path: Path) -> None:
    path.write_bytes(write(path, tone(440.0)).read_bytes()[:30])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty file": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("hello"), "not a sound file that libsndfile reads"),
    "a header without sound": (cut_off, "not a sound file that libsndfile reads"),
    "no samples": (lambda path: write(path, np.zeros(0)), "no samples \\(zero length\\)"),
    "a sample rate of 0": (no_rate, "a sample rate or a number of channels of 0"),
    "values that are not finite": (not_finite, "values that are not finite"),
    "no file": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_says_why(name: str, tmp_path: Path) -> None:
    make, why = BROKEN[name]
    make(tmp_path / "bad.wav")
    with pytest.raises(ValueError, match=why):
        read_sound(tmp_path / "bad.wav", hearing())


# Augmentations


def strength(**values: Any) -> Strength:
    return Strength(**{"probability": 1.0} | values)


@pytest.mark.parametrize("semitones", [-7.0, -2.0, 3.0, 12.0])
def test_a_pitch_shift_moves_a_tone_and_keeps_its_length_level_and_tempo(semitones: float) -> None:
    clip = torch.from_numpy(tone(440.0, 1.0)).float()
    shifted = pitch_shift(clip, semitones)
    assert shifted.shape == clip.shape
    assert loudest(shifted[2000:-2000]) == pytest.approx(440.0 * 2 ** (semitones / 12), rel=2e-3)
    middle = slice(4000, -4000)
    assert shifted[middle].std() == pytest.approx(float(clip[middle].std()), rel=0.1)
    bursts = torch.from_numpy(tone(1000.0, 2.0) * (np.arange(32_000) // 4000 % 2)).float()  # on and off, four times
    moved = pitch_shift(bursts, semitones)
    for eighth in range(1, 7):
        loud = moved[eighth * 4000 + 1200 : eighth * 4000 + 2800].square().mean().sqrt()
        assert (loud > 0.15) == bool(eighth % 2), eighth


def test_no_pitch_shift_is_the_clip() -> None:
    clip = torch.from_numpy(noise(16_000))
    torch.testing.assert_close(pitch_shift(clip, 0.0)[1000:-1000], clip[1000:-1000], rtol=0, atol=1e-3)


def test_waveform_augmentations_do_what_their_strengths_say() -> None:
    clip = torch.from_numpy(tone(440.0)).float()
    ramp = torch.arange(8000.0)
    shifts, gains, ratios = set(), [], []
    for draw in range(40):
        torch.manual_seed(draw)
        rolled = _sound_transforms.time_shift(ramp, strength(time_shift=0.25))
        start = int(rolled.argmin())
        assert torch.equal(rolled, ramp.roll(start))
        shifts.add(start if start <= 4000 else start - 8000)
        louder = _sound_transforms.gain(clip, strength(gain=6.0))
        gains.append(20 * float(torch.log10(louder.std() / clip.std())))
        noisy = _sound_transforms.noise(clip, strength(noise=[10.0, 20.0]))
        ratios.append(10 * float(torch.log10(clip.square().mean() / (noisy - clip).square().mean())))
    assert -2000 <= min(shifts) < -1000 and 1000 < max(shifts) <= 2000
    assert -6 <= min(gains) < -3 and 3 < max(gains) <= 6
    assert 9.8 <= min(ratios) < 12 and 18 < max(ratios) <= 20.2
    assert torch.equal(_sound_transforms.noise(torch.zeros(10), strength()), torch.zeros(10))


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_have_the_clips_mean_and_a_share_at_most(axis: int) -> None:
    spectrogram = torch.rand(20, 30)
    widths = set()
    for draw in range(60):
        torch.manual_seed(draw)
        masked = _sound_transforms.mask(spectrogram, axis, 0.2)
        lines = (masked != spectrogram).all(1 - axis).nonzero().flatten()
        assert torch.equal(lines, torch.arange(len(lines)) + (lines[0] if len(lines) else 0))
        assert (masked.index_select(axis, lines) == spectrogram.mean()).all()
        assert int((masked != spectrogram).sum()) == len(lines) * spectrogram.shape[1 - axis]
        widths.add(len(lines))
    assert widths == set(range(spectrogram.shape[axis] // 5 + 1))


def test_augmented_clips_follow_from_the_seed_and_rest_in_evaluation() -> None:
    settings = AudioFolder(root="x", augment=list(AudioFolder.augmentations), strength=strength())
    augment = SoundAugment(settings, hearing())
    clips = torch.from_numpy(np.stack([tone(440.0), tone(660.0)])).float()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return augment.train()(clips)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    plain = augment.front(clips)
    assert torch.equal(augment.eval()(clips), plain)
    masks = SoundAugment(replace(settings, augment=["time_mask"]), hearing())
    kept = plain.clone()
    assert not torch.equal(masks.train()(plain), plain) and torch.equal(plain, kept)
    never = SoundAugment(replace(settings, strength=replace(settings.strength, probability=1e-9)), hearing())
    assert torch.equal(never.train()(clips), plain)
    assert not list(augment.state_dict())


# Data


def load(
    root: Path, *, waveforms: bool = False, group: str | None = None, seconds: float = 0.5, **settings: Any
) -> Data:
    data = AudioFolder(root=str(root), seconds=seconds, **settings)
    heard = hearing(seconds=seconds, features=data.spectrogram)
    return load_data(data, seed=0, encoder=AudioEncoder(heard, waveforms=waveforms), group=group)


def entries(kind: str) -> list[str]:
    return [entry["key"] for entry in cache_info()["entries"] if entry["kind"] == kind]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of four tones in a folder, and an empty cache."""
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    return tones(tmp_path / "tönes and spaces", 3, 4)


def test_a_folder_gives_spectrograms_or_waveforms_with_labels(fresh: Path) -> None:
    data = load(fresh)
    assert data.class_names == ["tone0", "tone1", "tone2"] and np.bincount(data.train.labels).tolist() == [4, 4, 4]
    batch = data.train.batch([5, 0])
    assert batch["sound"].shape == (2, 128, 51) and batch["labels"].tolist() == [1, 0]
    sounds = load(fresh, waveforms=True).train.batch([5, 0])["sound"]
    torch.testing.assert_close(LogMel(Spectrogram(), RATE)(sounds), batch["sound"], rtol=0, atol=1e-3)
    inputs = load_inputs(sound_inputs([fresh / "tone1", fresh / "tone0" / "rec0_0.wav"]), AudioEncoder(hearing()))
    assert len(inputs) == 5 and set(inputs.labels) == {-1}
    torch.testing.assert_close(inputs.batch([1, 4])["sound"], batch["sound"], rtol=0, atol=1e-3)


def test_sounds_are_decoded_once_and_a_changed_setting_never_reads_stale_spectrograms(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(fresh).train.batch(range(12))["sound"]
    assert len(entries("waveforms")) == len(entries("spectrograms")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(_audio, "read_sound", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load(fresh).train.batch(range(12))["sound"], before)
        fewer = load(fresh, spectrogram=Spectrogram(n_mels=40)).train.batch(range(12))["sound"]
        assert fewer.shape == (12, 40, 51)
        assert (len(entries("waveforms")), len(entries("spectrograms"))) == (1, 2)
    load(fresh, seconds=0.25)
    write(fresh / "tone0" / "rec0_0.wav", tone(3000.0))
    changed = load(fresh).train.batch(range(12))["sound"]
    assert not torch.equal(changed[0], before[0]) and torch.equal(changed[1:], before[1:])
    assert (len(entries("waveforms")), len(entries("spectrograms"))) == (3, 4)
    assert "audio_folder, train, 0.5 s at 16000 Hz" in {entry["made_from"] for entry in cache_info()["entries"]}


@pytest.mark.parametrize("kind", ["waveforms", "spectrograms"])
def test_a_damaged_entry_is_built_again(kind: str, fresh: Path) -> None:
    before = load(fresh).train.batch(range(12))["sound"]
    [file] = (fresh.parent / "cache" / kind).glob("*/samples.npy")
    data = bytearray(file.read_bytes())
    data[-1000:] = bytes(1000)
    file.write_bytes(data)
    assert torch.equal(load(fresh).train.batch(range(12))["sound"], before)


def test_unreadable_sounds_are_named_or_left_out(fresh: Path) -> None:
    (fresh / "tone1" / "rec0_0.wav").write_text("no sound")
    write(fresh / "tone2" / "rec1_1.wav", np.zeros(0))
    with pytest.raises(UserError) as caught:
        load(fresh)
    for words in ("2 sounds cannot be read", "tone1/rec0_0.wav: not a sound", "tone2/rec1_1.wav: it holds no samples"):
        assert words in str(caught.value)
    for _ in range(2):  # the second time from the cache
        data = load(fresh, on_error="skip")
        assert len(data.train) == 10 and len(data.skipped) == 2
    with pytest.raises(UserError, match="2 sounds cannot be read"):
        load(fresh)


def test_lengths_that_differ_from_a_clips_are_told(fresh: Path) -> None:
    write(fresh / "tone0" / "long.wav", tone(300.0, 1.0))
    write(fresh / "tone0" / "short.wav", tone(300.0, 0.1))
    for waveforms in (False, True):  # the second from the cache
        warnings = load(fresh, waveforms=waveforms).warnings
        assert "train: 1 sounds are longer than data.seconds=0.5: their centre is used" in warnings
        assert "train: 1 sounds are shorter than data.seconds=0.5: filled up with zeros" in warnings


def test_a_folder_without_sounds_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="the class folder has no sound.*only notes.txt.*\n?put sounds there"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"the folder has no sound"):
        sound_inputs([tmp_path / "a"])
    write(tmp_path / "loose" / "x.wav", tone(300.0))
    with pytest.raises(UserError, match=r"has 1 sounds but no class folder; expected loose/CLASS/clip.wav"):
        load(tmp_path / "loose")


# Groups


def test_leave_one_recording_out_by_a_part_of_the_file_name(fresh: Path) -> None:
    data = load(fresh, group_pattern=r"(?P<recording>rec\d+)_(?P<take>\d+)", group="recording")
    assert set(data.train.groups) == {"rec0", "rec1"}
    folds = make_folds(data, CV(folds=2, group="recording", stratified=False, val_fraction=0), 0)
    for fold in folds:
        heldout, train = set(fold.heldout.groups), set(fold.train.groups)
        assert len(heldout) == 1 and not heldout & train
    assert {group for fold in folds for group in fold.heldout.groups} == {"rec0", "rec1"}


def test_groups_may_stand_in_a_table(fresh: Path) -> None:
    paths = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*.wav"))
    lines = ["path,day", *(f"{path},{'mon' if 'rec0' in path else 'tue'}" for path in paths)]
    (fresh / "groups.csv").write_text("\n".join(lines))
    assert set(load(fresh, group="day").train.groups) == {"mon", "tue"}
    with pytest.raises(UserError, match="cv.group=night: .*no such column"):
        load(fresh, group="night")


def test_patterns_of_groups_say_what_is_wrong(fresh: Path) -> None:
    with pytest.raises(
        UserError, match="cv.group=recordin: data.group_pattern names no such part; did you mean recording"
    ):
        load(fresh, group_pattern=r"(?P<recording>rec\d+)", group="recordin")
    (fresh / "tone0" / "other.wav").write_bytes((fresh / "tone0" / "rec0_0.wav").read_bytes())
    with pytest.raises(UserError, match="finds no recording in 1 of 13 names: tone0/other.wav"):
        load(fresh, group_pattern=r"(?P<recording>rec\d+)", group="recording")


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"augment": ["flip"]}, "no augmentation 'flip'"),
        ({"augment": ["gain", "gain"]}, "twice"),
        ({"augment": ["gain"], "spectrogram": Spectrogram(reference="max")}, "gain does nothing"),
        ({"sample_rate": 0}, "data.sample_rate must be 1 to"),
        ({"seconds": 0.0}, "data.seconds must be above 0"),
        ({"longer": "end"}, "centre or start"),
        ({"shorter": "noise"}, "zeros or repeat"),
        ({"resize": "crop"}, "data.resize: of images"),
        ({"group_pattern": "rec.+"}, "names no part"),
        ({"group_pattern": "(a+)+$"}, "take for ever"),
    ],
)
def test_wrong_settings_of_a_folder(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AudioFolder(root="x", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_fft": 8}, "n_fft must be 16 or more"),
        ({"hop_length": 2000}, "leaves samples out"),
        ({"f_min": -1.0}, "f_min must be 0 Hz or more"),
        ({"f_max": 0.0}, "f_max must be"),
        ({"mel_scale": "bark"}, "htk, slaney, kaldi"),
        ({"norm": "htk"}, "slaney or null"),
        ({"reference": "mean"}, "full_scale or max"),
        ({"low": 0.0}, "must be below high"),
    ],
)
def test_wrong_settings_of_a_spectrogram(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Spectrogram(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"probability": 0.0}, "probability"),
        ({"time_shift": 1.5}, "time_shift must be a share"),
        ({"pitch": 13.0}, "semitones"),
        ({"gain": 0.0}, "dB"),
        ({"noise": [20.0, 10.0]}, "the smaller first"),
        ({"noise": [20.0]}, "two ratios"),
        ({"masks": 0}, "masks must be 1"),
    ],
)
def test_wrong_strengths(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Strength(**settings)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_folder, "find_spec", lambda name: None if name == "soxr" else object())
    with pytest.raises(UserError, match=r"needs the package soxr: pip install 'coeft\[audio\]'"):
        AudioFolder(root="x").check()


def backbone(**facts: Any) -> Backbone:
    return Backbone(name="some", kind="hf", model=torch.nn.Identity(), **facts)


def test_a_model_of_sound_has_its_own_features() -> None:
    of_sound = backbone(modality="audio", fbank=AST)
    heard = resolve_hearing(AudioFolder(root="x", sample_rate=44_100), of_sound)
    assert (heard.sample_rate, heard.features) == (16_000, AST)
    with pytest.raises(UserError, match="makes 1098 frames; some takes 1 to 1024, up to 10.255 s"):
        resolve_hearing(AudioFolder(root="x", seconds=11.0), of_sound)
    with pytest.raises(UserError, match="data.image_size, data.mean: of pictures"):
        resolve_hearing(AudioFolder(root="x", image_size=224, mean=[0.5]), of_sound)
    with pytest.raises(UserError, match="160 samples, fewer than a window"):
        resolve_hearing(AudioFolder(root="x", seconds=0.01), backbone())


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("[]", "not a mapping"),
        ({"num_mel_bins": 64}, "num_mel_bins is 64, but the model's config.json has 16"),
        ({"sampling_rate": "16k"}, "sampling_rate must be"),
        ({"std": 0}, "std above 0"),
    ],
)
def test_a_feature_extractor_that_does_not_fit_is_refused(tree: Any, words: str, tmp_path: Path) -> None:
    from tiny_hf import tiny_model

    from coeft.backbones._hf_sound import fbank

    model = tiny_model("ast")
    found = fbank(model, None)
    assert found == Fbank(sample_rate=16_000, bands=16, frames=24, mean=-4.2677393, std=4.5689974)
    (tmp_path / "preprocessor_config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(UserError, match=words):
        fbank(model, tmp_path)
