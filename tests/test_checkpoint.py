"""Checkpoints that are whole or absent, whatever kills the process that writes them."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import fork
from transformers import AutoModelForCausalLM, AutoTokenizer

from thor.checkpoint import ASIDE, StopRequest, latest_checkpoint, load_state, open_run, read_settings, step_of
from thor.checkpoint import write_aside
from thor.optimizer import make_optimizer
from thor.parallel import Ranks, load_optimizer, save_checkpoint
from thor.weights import load_model


@pytest.fixture(scope="module")
def model(tiny_directory):
    return load_model(tiny_directory)


def save(directory: Path, step: int, model, tiny_directory: Path, keep: int = 2) -> Path:
    moments = torch.full((500_000,), float(step))
    state = {"step": step, "moments": moments, "carried": ['{"id": "a"}'], "rng": (1, (2, None))}
    return save_checkpoint(Ranks(), directory, step, model, stepped(model, step), tiny_directory, state, keep)


def stepped(model, step: int) -> torch.optim.AdamW:
    """An optimizer that took a step which changed no weight, and whose first moments are all `step`."""
    optimizer = make_optimizer(model, 0.0, (0.0, 0.9), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(step))
    optimizer.step()
    return optimizer


def test_a_checkpoint_is_a_hugging_face_directory_with_the_state_that_was_given(tmp_path, model, tiny_directory):
    found = save(tmp_path, 3, model, tiny_directory)
    assert latest_checkpoint(tmp_path) == found and step_of(found) == 3
    state = load_state(found)
    assert (state["step"], state["carried"], state["rng"]) == (3, ['{"id": "a"}'], (1, (2, None)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "latest").state_dict()
    assert torch.equal(theirs["model.norm.weight"], model.state_dict()["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "latest").eos_token == "<eos>"


def test_the_newest_are_kept_and_older_ones_removed(tmp_path, model, tiny_directory):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, model, tiny_directory, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_10", "step_11"]
    save(tmp_path, 12, model, tiny_directory, keep=0)
    assert len(list(tmp_path.glob("step_*"))) == 3


def save_some(directory: Path, count: int, model, tiny_directory: Path) -> None:
    for step in range(count):
        save(directory, step, model, tiny_directory, keep=0)


def test_whoever_looks_while_a_checkpoint_is_written_sees_all_of_it_or_nothing(tmp_path, model, tiny_directory):
    whole = {path.name: path.stat().st_size for path in save(tmp_path / "first", 0, model, tiny_directory).iterdir()}
    writer = fork(save_some, tmp_path, 15, model, tiny_directory)
    while writer.is_alive():
        for path in tmp_path.glob("step_?"):
            assert {file.name for file in path.iterdir()} == whole.keys()
            assert (path / "model.safetensors").stat().st_size == whole["model.safetensors"]
        assert not (tmp_path / "latest").is_symlink() or (tmp_path / "latest/trainer.pt").is_file()
    writer.join()
    assert writer.exitcode == 0 and latest_checkpoint(tmp_path).name == "step_14"


def save_for_ever(directory: Path, first: int, model, tiny_directory: Path) -> None:
    for step in range(first, first + 1000):
        save(directory, step, model, tiny_directory)


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, model, tiny_directory):
    """Writers are killed at random moments; what bears a checkpoint's name can be loaded and is what it says, always."""
    step, rng = 0, random.Random(0)
    open_run(tmp_path, {}, ())
    for number in range(15):
        writer = fork(save_for_ever, tmp_path, step + 1, model, tiny_directory)
        time.sleep(rng.uniform(0.01, 0.04 * (number + 1)))
        writer.kill()
        writer.join()
        open_run(tmp_path, {}, ())
        checkpoint = latest_checkpoint(tmp_path)
        if checkpoint is not None:
            assert step_of(checkpoint) >= step
            step = step_of(checkpoint)
        for path in tmp_path.glob("step_*"):
            assert load_state(path)["moments"].eq(step_of(path)).all()
            optimizer = make_optimizer(model, 0.0, (0.0, 0.9), 0.0)
            load_optimizer(Ranks(), path, model, optimizer)
            assert all(state["exp_avg"].eq(step_of(path)).all() for state in optimizer.state.values())
            assert torch.equal(load_model(path).head_weight, model.head_weight)
    assert step > 0 and not list(tmp_path.glob(f"*{ASIDE}"))


def test_what_a_killed_writer_left_aside_is_cleared_away(tmp_path, model, tiny_directory):
    """Killed between making the new link and moving it, a writer leaves a link to a whole checkpoint, which must stay."""
    open_run(tmp_path, {}, ())
    step = save(tmp_path, 1, model, tiny_directory)
    (tmp_path / f"latest{ASIDE}").symlink_to(step.name)
    (tmp_path / f"step_2{ASIDE}").mkdir()
    open_run(tmp_path, {}, ())
    assert not list(tmp_path.glob(f"*{ASIDE}")) and load_state(step) and latest_checkpoint(tmp_path) == step


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint_whole(tmp_path, model, tiny_directory):
    """The limit on a file's size stands in for the disk: the weights fit, the state does not; then not even they do."""
    before = save(tmp_path, 1, model, tiny_directory)
    weights = (before / "model.safetensors").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (weights - 1, (before / "trainer.pt").stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            with pytest.raises(OSError):
                save(tmp_path, 2, model, tiny_directory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
        assert latest_checkpoint(tmp_path) == before and load_state(before)["step"] == 1


def test_a_directory_left_by_a_run_that_was_killed_before_latest_moved_is_replaced(tmp_path, model, tiny_directory):
    save(tmp_path, 1, model, tiny_directory)
    (tmp_path / "step_2").mkdir()
    (tmp_path / "step_2/trainer.pt").touch()
    save(tmp_path, 2, model, tiny_directory)
    assert load_state(tmp_path / "step_2")["step"] == 2 and latest_checkpoint(tmp_path).name == "step_2"


def test_a_run_with_other_settings_is_refused_and_the_fields_are_named(tmp_path, model, tiny_directory):
    assert open_run(tmp_path, {"lr": 0.1, "out": "a", "seed": 0}, ("out",)) is None
    assert open_run(tmp_path, {"lr": 0.2, "out": "a", "seed": 0}, ("out",)) is None  # nothing to lose yet
    save(tmp_path, 1, model, tiny_directory)
    assert open_run(tmp_path, {"lr": 0.2, "out": "b", "seed": 0}, ("out",)).name == "step_1"
    with pytest.raises(ValueError, match="lr was 0.2, is 0.3; new was None, is 1"):
        open_run(tmp_path, {"lr": 0.3, "out": "a", "seed": 0, "new": 1}, ("out",))


def test_a_run_overwrites_no_model_and_no_file(tmp_path, tiny_directory):
    model = Path(shutil.copytree(tiny_directory, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(ValueError, match="model holds a model, whose config.json a run would overwrite"):
        open_run(model, {"model": str(model)}, ())
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, and a run needs a directory"):
        open_run(tmp_path / "file", {}, ())


def test_a_copy_of_a_run_that_has_lost_the_link_goes_on_from_the_newest_checkpoint(tmp_path, model, tiny_directory):
    open_run(tmp_path, {}, ())
    for step in (9, 10):
        save(tmp_path, step, model, tiny_directory)
    (tmp_path / "latest").unlink()
    assert open_run(tmp_path, {}, ()).name == "step_10"
    shutil.copytree(tmp_path / "step_10", tmp_path / "latest")
    with pytest.raises(ValueError, match="latest should be a link to the newest step_N and is none"):
        open_run(tmp_path, {}, ())


@pytest.mark.parametrize("text, message", [(None, "is missing"), ("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_settings_that_cannot_be_read_are_named(tmp_path, text, message):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"settings.json {message}"):
        read_settings(path)


def test_a_small_file_holds_the_old_text_or_the_new(tmp_path):
    path = tmp_path / "state.json"
    write_aside(path, "old")
    write_aside(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_the_first_ctrl_c_asks_for_a_stop_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
