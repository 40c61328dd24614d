"""The cold start: Eq. 2 against transformers' own loss, and runs that are killed, interrupted, repeated and broken."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from thor.batch import Sample
from thor.data import read_sft
from thor.template import Template
from thor.trajectory import OBSERVE, Span, Trajectory, to_json
from train_sft import SftOptions, Trainer, batch_of, main, read_samples

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """The tiny model before it learned anything."""
    return tiny.make_model(tmp_path_factory.mktemp("untrained"), steps=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 written solutions; every third has an error observation as well."""
    path, rng = tmp_path_factory.mktemp("data") / "sft.jsonl", random.Random(3)
    lines = []
    for _ in range(40):
        question, _, response = tiny.write_solution(rng)
        lines.append(json.dumps({"question": question, "response": response}) + "\n")
    path.write_text("".join(lines))
    return path


def options_for(model: Path, data: Path, out: Path) -> SftOptions:
    return SftOptions(model=str(model), data=str(data), out=str(out), style="base", instruction="", epochs=4, batch=10,
                      lr=3e-3, micro_tokens=300, threads=torch.get_num_threads(), tensorboard=False)


@pytest.fixture
def options(untrained, data, tmp_path) -> SftOptions:
    return options_for(untrained, data, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(untrained, data, tmp_path_factory) -> Path:
    """The directory of a long run that nothing interrupted."""
    options = long_run(options_for(untrained, data, tmp_path_factory.mktemp("whole") / "run"))
    main(options)
    return Path(options.out)


def metrics(options: SftOptions) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(options.out) / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_gradient_of_a_step_are_those_of_transformers_on_a_padded_batch(options):
    """One step over all 40 records; observations, prompt and padding have the label that transformers ignores."""
    main(replace(options, epochs=1, batch=40, max_grad_norm=1e9))
    template = Template(tiny.make_tokenizer(), style="base", instruction="")
    inputs, labels = [], []
    for record in read_sft(options.data, template):
        kinds = [span.kind for span in record.spans for _ in range(span.start, span.end)]
        inputs.append(torch.tensor(record.prompt_ids + record.response_ids))
        labels.append(torch.tensor([-100] * len(record.prompt_ids) + [
            -100 if kind == OBSERVE else token for token, kind in zip(record.response_ids, kinds, strict=True)]))
    model = AutoModelForCausalLM.from_pretrained(options.model)
    loss = model(input_ids=torch.nn.utils.rnn.pad_sequence(inputs, True, 0),
                 labels=torch.nn.utils.rnn.pad_sequence(labels, True, -100)).loss
    loss.backward()
    [found] = metrics(options)
    assert found["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["train/grad_norm"] == pytest.approx(
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item(), rel=1e-4)


def test_the_size_of_micro_batches_does_not_matter(options, tmp_path):
    main(options)
    other = replace(options, out=str(tmp_path / "other"), micro_tokens=1)
    main(other)
    for one, two in zip(metrics(options), metrics(other), strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-4)


def test_the_end_of_turn_token_is_trained_and_observations_are_not(options):
    template = Template(tiny.make_tokenizer(), style="base", instruction="")
    for sample, record in zip(read_samples(options)[0], read_sft(options.data, template), strict=True):
        trained = template.decode([token for token, flag in zip(sample.ids, sample.trained, strict=True) if flag])
        assert trained.endswith("<eos>") and "```output" not in trained and "```output" in record.text


def test_a_model_learns_and_so_does_its_loss_on_held_out_questions(options):
    main(replace(options, epochs=20, eval_share=0.2, eval_every=1, schedule="cosine"))
    lines = metrics(options)
    assert lines[-1]["train/loss"] < 0.5 * lines[0]["train/loss"]
    assert lines[-1]["eval/loss"] < 0.5 * lines[0]["eval/loss"]


def test_no_question_is_both_trained_on_and_held_out(options):
    train, held_out = read_samples(replace(options, eval_share=0.3))
    prompts = [{tuple(token for token, flag in zip(sample.ids, sample.trained, strict=True) if not flag)[:14]
                for sample in samples} for samples in (train, held_out)]
    assert len(train) + len(held_out) == 40 and held_out and not prompts[0] & prompts[1]


@pytest.mark.parametrize("number, batch", [(40, 10), (41, 10), (7, 10), (23, 5)])
def test_every_epoch_uses_every_record_once_in_an_order_of_its_own(number, batch):
    samples = [Sample([index], [True], []) for index in range(number)]
    trainer = Trainer(SftOptions(batch=batch), None, None, samples, [], None)
    batches = [batch_of(trainer, step) for step in range(1, 2 * trainer.steps_per_epoch + 1)]
    epochs = [sum(batches[:len(batches) // 2], []), sum(batches[len(batches) // 2:], [])]
    for epoch in epochs:
        assert sorted(sample.ids[0] for sample in epoch) == list(range(number))
    assert epochs[0] != epochs[1]
    assert max(map(len, batches)) <= batch and max(map(len, batches)) - min(map(len, batches)) <= 1


def test_the_result_is_a_model_that_transformers_loads(options):
    main(options)
    latest = Path(options.out) / "latest"
    assert os.readlink(latest) == "step_16" and (latest / "tokenizer.json").is_file()
    theirs = AutoModelForCausalLM.from_pretrained(latest)
    assert not torch.equal(theirs.model.norm.weight, torch.ones(64))


def wait_for_lines(path: Path, count: int) -> None:
    """Until a file has that many lines; two minutes at most."""
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{path} has not got {count} lines"
        time.sleep(0.001)


def start(options: SftOptions) -> subprocess.Popen:
    """The script as a process of its own."""
    flags = [part for name, value in asdict(options).items() if value is not None for part in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, str(ROOT / "train_sft.py"), *flags], cwd=ROOT, stdout=subprocess.DEVNULL)


def long_run(options: SftOptions) -> SftOptions:
    """100 steps with many checkpoints, so that a kill may well hit one being written."""
    return replace(options, epochs=25, save_every=3, eval_share=0.2, eval_every=7)


def kill_and_finish(options: SftOptions, kills: int, rng: random.Random) -> None:
    """Kill the script `kills` times, each time some steps and a random moment further on, then let it finish."""
    for number in range(1, kills + 1):
        process = start(options)
        wait_for_lines(Path(options.out) / "metrics.jsonl", 100 * number // (kills + 2))
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    main(options)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_restarted_metrics_continue_as_if_nothing_had_happened(options, whole, kills):
    kill_and_finish(long_run(options), kills, random.Random(kills))
    for name in ("metrics.jsonl", "latest/model.safetensors"):
        assert (Path(options.out) / name).read_bytes() == (whole / name).read_bytes()


def interrupt_after(path: Path, lines: int) -> threading.Thread:
    """Ctrl-C for this very process, once the file has that many lines."""
    def interrupt() -> None:
        wait_for_lines(path, lines)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def test_after_ctrl_c_the_state_is_saved_and_the_run_can_go_on(options, whole):
    stopped = replace(long_run(options), save_every=1000)
    thread = interrupt_after(Path(options.out) / "metrics.jsonl", 5)
    with pytest.raises(KeyboardInterrupt):
        main(stopped)
    thread.join()
    assert os.readlink(Path(options.out) / "latest") == f"step_{metrics(stopped)[-1]['step']}" != "step_100"
    main(stopped)
    assert (Path(options.out) / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_resumed_run_that_has_nothing_left_to_do_says_so(options, capsys):
    main(options)
    before = (Path(options.out) / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    main(options)
    assert "nothing left to do" in capsys.readouterr().out
    assert (Path(options.out) / "metrics.jsonl").read_bytes() == before


def test_a_run_with_other_settings_or_other_data_is_refused_and_the_fields_are_named(options, data, tmp_path):
    main(options)
    with pytest.raises(ValueError, match="epochs was 4, is 5; lr was 0.003, is 0.1"):
        main(replace(options, epochs=5, lr=0.1))
    longer = tmp_path / "longer.jsonl"
    longer.write_text(data.read_text() * 2)
    with pytest.raises(ValueError, match="train_sequences was 40, is 80"):
        main(replace(options, data=str(longer)))


def test_losses_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run_with_the_batch_dumped(options):
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        main(replace(options, lr=1e30, warmup=0.0, save_every=1))
    assert [line["train/skipped"] for line in metrics(options)] == [0, 1, 2]
    assert metrics(options)[1]["train/grad_norm"] is None
    [dumped] = Path(options.out).glob("not_finite_step_4.jsonl")
    assert len(dumped.read_text().splitlines()) == 10


def test_records_that_are_too_long_are_left_out_and_counted(options, capsys):
    template = Template(tiny.make_tokenizer(), style="base", instruction="")
    lengths = sorted(len(record.prompt_ids + record.response_ids) for record in read_sft(options.data, template))
    kept = [length for length in lengths if length <= lengths[20]]
    main(replace(options, max_length=lengths[20], epochs=1))
    assert f"{40 - len(kept)} of 40 records are longer than {lengths[20]} tokens" in capsys.readouterr().out
    assert sum(line["train/sequences"] for line in metrics(options)) == len(kept)


def test_a_trajectory_written_without_its_prompt_is_trained_with_the_templates(options, tmp_path):
    plain = read_samples(options)[0]
    bare = tmp_path / "bare.jsonl"
    records = read_sft(options.data, Template(tiny.make_tokenizer(), style="base", instruction=""))
    bare.write_text("".join(to_json(replace(record, prompt_ids=[])) + "\n" for record in records))
    assert read_samples(replace(options, data=str(bare)))[0] == plain


def test_trajectories_of_another_tokenizer_are_refused(options, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(to_json(Trajectory("a", 0, "1+1", "2", [1], [5000], [None], [Span("think", 0, 1)])) + "\n")
    with pytest.raises(ValueError, match="a token 5000 and the model has"):
        main(replace(options, data=str(other)))


def with_file(name: str, text: str) -> Callable[[SftOptions], SftOptions]:
    """Options whose data are a file with this text."""
    def change(options: SftOptions) -> SftOptions:
        path = Path(options.out).parent / name
        path.write_text(text)
        return replace(options, data=str(path))
    return change


@pytest.mark.parametrize("change, message", [
    (with_file("empty.jsonl", ""), "is empty"),
    (with_file("bad.jsonl", '{"question": "1+1"}\n'), "line 1: expected a trajectory"),
    (lambda options: replace(options, max_length=3), "none of 40 records"),
    (lambda options: replace(options, eval_share=0.999), "every record is held out"),
    (lambda options: replace(options, model=None), "--model is missing"),
    (lambda options: replace(options, batch=0), "batch is 0; it must be 1 or more"),
    (lambda options: replace(options, lr=0.0), "lr is 0.0; it must be above 0"),
    (lambda options: replace(options, warmup=1.5), "warmup is 1.5"),
    (lambda options: replace(options, schedule="linear"), "schedule is 'linear'; it must be one of constant, cosine"),
    (lambda options: replace(options, keep=-1), "keep is -1"),
    (lambda options: replace(options, device="gpu"), "device is 'gpu'; it must be cpu or cuda"),
])
def test_bad_input_is_one_clear_sentence(options, change, message):
    with pytest.raises(ValueError, match=message):
        main(change(options))


def test_bfloat16_arithmetic_keeps_float32_weights_and_learns_the_same(options, tmp_path):
    main(options)
    half = replace(options, out=str(tmp_path / "half"), dtype="bfloat16")
    main(half)
    assert metrics(half)[-1]["train/loss"] == pytest.approx(metrics(options)[-1]["train/loss"], rel=0.02)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half/latest").dtype == torch.float32
