"""Checkpoints of a training run: `step_N/` is a Hugging Face directory with the trainer's state beside the weights.

A checkpoint appears whole or not at all: it is written aside, flushed to disk and renamed, then the link `latest` is
moved to it, and only then are old ones removed, under another name first. The optimizer's moments are parallel.py's to
write, into the directory that stands aside. A run's config.json belongs to its checkpoints: who continues it must have
asked for the same.
"""

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from torch import Tensor

from thor.weights import save_tensors

LATEST, STATE, CONFIG = "latest", "trainer.pt", "config.json"
ASIDE = ".aside"  # the ending of what is being written or removed

# What a checkpoint takes over from the model's directory: tokenizer, chat template, generation config.
COPIED = (".json", ".txt", ".jinja", ".model")

State = dict[str, object]
Settings = dict[str, object]  # by name, as JSON has them


def open_run(directory: Path, settings: Settings, free: tuple[str, ...]) -> Path | None:
    """Begin a run in `directory` or continue it: the checkpoint to continue from, None at the beginning.

    Raises ValueError for a file, for a model's directory, whose config.json would be lost, and that names the settings
    in which a run that has a checkpoint differs; those in `free` may differ.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file, and a run needs a directory; use another --out")
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in directory.glob(f"*{ASIDE}"):
        remove(left_over)
    checkpoint = latest_checkpoint(directory)
    settings = json.loads(json.dumps(settings))
    before = read_settings(directory / CONFIG) if checkpoint or (directory / CONFIG).exists() else {}
    if "model_type" in before:
        raise ValueError(f"{directory} holds a model, whose config.json a run would overwrite; use another --out")
    differing = differences(before, settings, sorted((before | settings).keys() - free)) if checkpoint else ""
    if differing:
        raise ValueError(f"{directory} holds a run with other settings ({differing}); use another --out")
    write_aside(directory / CONFIG, json.dumps(settings, indent=2) + "\n")
    return checkpoint


def begin_checkpoint(directory: Path, step: int) -> Path:
    """An empty directory for all of `step_N/`, under another name until `complete_checkpoint`."""
    aside = directory / f"step_{step}{ASIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def complete_checkpoint(aside: Path, weights: dict[str, Tensor], model_directory: Path, state: State,
                        keep: int) -> Path:
    """Add weights and state to what is in `aside` already, give it its name, point `latest` to it and remove all but
    the newest `keep` (0 keeps all).

    `state` may hold tensors, numbers, strings, and lists, tuples and dicts of them. `model_directory` gives config and
    tokenizer. OSError if the disk is full or the like; what was there before is whole then.
    """
    target = aside.with_name(aside.name.removesuffix(ASIDE))
    try:
        _write(aside, weights, model_directory, state)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written ({error}); earlier checkpoints are whole") from None
    if target.exists():  # of a run that was killed before `latest` moved
        remove(target)
    os.rename(aside, target)
    _point(target.parent / LATEST, target.name)
    for old in sorted(_steps(target.parent))[:-keep] if keep else []:
        remove(target.with_name(f"step_{old}"))
    return target


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` points to, by its own name, and the newest where a copy of the directory has lost the
    link; None if the run has none."""
    link, steps = directory / LATEST, _steps(directory)
    if link.is_symlink():
        return directory / os.readlink(link)
    if link.exists():
        raise ValueError(f"{link} should be a link to the newest step_N and is none, as in a copy that followed it; remove it")
    return directory / f"step_{max(steps)}" if steps else None


def step_of(checkpoint: Path) -> int:
    """N of `step_N`."""
    return int(checkpoint.name.removeprefix("step_"))


def load_state(checkpoint: Path) -> State:
    """What `complete_checkpoint` was given as `state`, on the CPU."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def read_settings(path: Path) -> Settings:
    """The settings that were written down in `path` as what lies beside it was begun. ValueError if they cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, so it is not known how what lies beside it was made")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, the settings by name")
    return settings


def differences(before: Settings, now: Settings, names: Iterable[str]) -> str:
    """In which of the settings `names` two runs differ, in words; empty where in none."""
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names
                     if before.get(name) != now.get(name))


def write_aside(path: Path, text: str) -> None:
    """Write a small file so that it holds the old text or the new one, never a part."""
    aside = path.with_name(path.name + ASIDE)
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    os.replace(aside, path)


def remove(path: Path) -> None:
    """Delete a directory or a file, renamed first, so that no half of it is ever found under its name."""
    aside = path if path.name.endswith(ASIDE) else path.with_name(path.name + ".removed" + ASIDE)
    if aside != path:
        os.rename(path, aside)
    shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()


def _write(aside: Path, weights: dict[str, Tensor], model_directory: Path, state: State) -> None:
    save_tensors(weights, aside, model_directory)
    written = {path.name for path in aside.iterdir()}
    for path in model_directory.iterdir():
        if path.suffix in COPIED and path.name not in written and not path.name.endswith(".index.json"):
            shutil.copyfile(path, aside / path.name)
    buffer = io.BytesIO()  # torch's own writer reports a full disk as a RuntimeError
    torch.save(state, buffer)
    (aside / STATE).write_bytes(buffer.getbuffer())
    for path in [*aside.rglob("*"), aside]:
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk: a rename may otherwise get there first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, name: str) -> None:
    aside = link.with_name(link.name + ASIDE)
    aside.unlink(missing_ok=True)
    os.symlink(name, aside)
    os.replace(aside, link)
    _flush(link.parent)


def _steps(directory: Path) -> list[int]:
    return [step_of(path) for path in directory.glob("step_*") if path.name.removeprefix("step_").isdigit()]


class StopRequest:
    """While entered, the first Ctrl-C (or SIGTERM) only sets `asked`, for a stop between steps; the second stops."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
                        } if threading.current_thread() is threading.main_thread() else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step; once more stops at once", flush=True)
