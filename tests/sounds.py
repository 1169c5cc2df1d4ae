"""Sounds that tests synthesise: tones, and hums like those of rotors, in class folders."""

import wave
from pathlib import Path

import numpy as np

RATE = 16_000


def tone(
    frequency: float, seconds: float = 0.5, rate: int = RATE, *, peak: float = 0.5, phase: float = 0.0
) -> np.ndarray:
    """A sine, float64 (T,)."""
    return peak * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate + phase)


def rotor(kind: int, draw: np.random.Generator, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A hum like that of four rotors, which differ in speed a little: harmonics of the blades' frequency, and wind.

    A kind has its own frequency (a sixth of an octave from the next) and its own balance of even and odd harmonics.
    """
    time = np.arange(round(seconds * rate)) / rate
    base = 80 * 2 ** (kind / 6)
    even = 0.25 + 0.75 * (kind % 3) / 2
    sound = np.zeros_like(time)
    for _ in range(4):
        speed = base * (1 + 0.01 * draw.standard_normal())
        for harmonic in range(1, 13):
            if speed * harmonic < rate / 2:
                weight = (even if harmonic % 2 == 0 else 1.0) / harmonic
                sound += weight * np.sin(2 * np.pi * (speed * harmonic * time + draw.random()))
    wind = draw.standard_normal(len(time))
    return 0.05 * sound + 0.02 * wind


def write(path: Path, sound: np.ndarray, rate: int = RATE) -> Path:
    """A WAV file of 16 bits: (T,), or (T, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.round(np.clip(sound, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return path


def tones(root: Path, classes: int = 3, clips: int = 10, seconds: float = 0.5) -> Path:
    """ROOT/CLASS/recN_M.wav: sines an octave and a half apart in noise; two clips of each recording N."""
    draw = np.random.default_rng(0)
    for kind in range(classes):
        for clip in range(clips):
            frequency = 300 * 3**kind * (1 + 0.02 * draw.standard_normal())
            sound = tone(frequency, seconds, phase=draw.random()) + 0.01 * draw.standard_normal(round(seconds * RATE))
            write(root / f"tone{kind}" / f"rec{clip // 2}_{clip % 2}.wav", sound)
    return root


def rotors(root: Path, classes: int = 31, clips: int = 10, seconds: float = 0.5, *, seed: int = 0) -> Path:
    """ROOT/CLASS/N.wav of rotor-like hums."""
    draw = np.random.default_rng(seed)
    for kind in range(classes):
        for clip in range(clips):
            write(root / f"drone{kind:02}" / f"{clip}.wav", rotor(kind, draw, seconds))
    return root
