"""Files in and out: what is wrong names file and line, and a killed run's half line is cut off."""

import gzip
import json

import pytest

import tiny
from thor.data import append_trajectory, open_to_append, read_problems, read_sft, read_trajectories
from thor.template import Template
from thor.trajectory import Trajectory, loss_mask, to_json

LINE = {"id": "a", "question": "1+1", "answer": "2"}


def write(path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.fixture(scope="module")
def chat() -> Template:
    return Template(tiny.make_tokenizer(), style="chat", instruction="")


def test_problems_keep_their_order_and_their_extra_fields(tmp_path):
    path = write(tmp_path / "p.jsonl", LINE, "", {**LINE, "id": "b", "level": 3, "answer": None})
    problems = read_problems(path)
    assert [problem.id for problem in problems] == ["a", "b"]
    assert problems[0].answer == "2" and problems[1].answer is None and problems[1].extra == {"level": 3}


@pytest.mark.parametrize("bad, message", [
    ("{", "line 2: not JSON"),
    ("[1]", "line 2: a JSON object"),
    ('{"id": "b", "question": "x\\uD800", "answer": "2"}', "line 2: half of a surrogate pair"),
    ({"id": "b", "answer": "2"}, "line 2: a problem needs a non-empty string 'question'"),
    ({"id": 3, "question": "x", "answer": "2"}, "line 2: a problem needs a non-empty string 'id'"),
    ({"id": "b", "question": "x", "answer": 2}, "line 2: 'answer' must be"),
    (LINE, "line 2: the id 'a' has been seen before"),
])
def test_a_bad_problem_line_is_named_with_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "p.jsonl", LINE, bad)
    with pytest.raises(ValueError, match="p.jsonl.*" + message.replace("[", r"\[")):
        read_problems(path)


def test_missing_empty_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_problems(write(tmp_path / "e.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_problems(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("damage", [lambda packed: b"plain text", lambda packed: packed[:-9], lambda packed: packed[:20] + b"?" * 40])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"id": "a", "question": "b", "answer": "c"}\n')))
    with pytest.raises(ValueError, match="x.jsonl.gz is not a whole gzip file"):
        read_problems(path)


@pytest.mark.parametrize("half", [b"", b'{"id": "b", "sam', b"x" * 200_000])
def test_half_a_line_at_the_end_is_cut_off_and_whole_lines_are_kept(tmp_path, half):
    path = tmp_path / "t.jsonl"
    whole = Trajectory("a", 0, "1+1", "2", [1])
    with open_to_append(path) as file:
        append_trajectory(file, whole)
    path.write_bytes(path.read_bytes() + half)
    with open_to_append(path) as file:
        append_trajectory(file, Trajectory("a", 1, "1+1", "2", [1]))
    assert [t.sample for t in read_trajectories(path)] == [0, 1]


def test_a_file_that_is_being_written_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "t.jsonl"
    with open_to_append(path) as file:
        file.write("half a li")
        file.flush()
        with pytest.raises(ValueError, match="t.jsonl is being written by another process"):
            open_to_append(path)
        file.write("ne\n")
    assert path.read_text() == "half a line\n"
    open_to_append(path).close()


def test_the_same_sample_twice_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with open_to_append(path) as file:
        for _ in range(2):
            append_trajectory(file, Trajectory("a", 0, "1+1", "2", [1]))
    with pytest.raises(ValueError, match="line 2: sample 0 of problem 'a'"):
        read_trajectories(path)


def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        open_to_append(tmp_path)


RESPONSE = "Add.\n```python\nprint(1+1)\n```\n```output\n2\n```\n\\boxed{2}"


def test_the_three_kinds_of_sft_records_give_the_same_tokens(tmp_path, chat):
    pair = {"question": "1+1", "response": RESPONSE}
    talk = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": RESPONSE}]}
    first, second = read_sft(write(tmp_path / "s.jsonl", pair, talk), chat)
    assert (first.prompt_ids, first.response_ids, first.spans) == (second.prompt_ids, second.response_ids, second.spans)
    [again] = read_sft(write(tmp_path / "again.jsonl", to_json(first)), chat)
    assert again == first


def test_only_the_last_assistant_turn_is_trained(tmp_path, chat):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Add"},
            {"role": "user", "content": "1+1"}, {"role": "assistant", "content": RESPONSE}]
    [record] = read_sft(write(tmp_path / "s.jsonl", {"messages": talk}), chat)
    assert "Add" in chat.decode(record.prompt_ids) and record.text == RESPONSE
    mask = loss_mask(record.spans, len(record.response_ids))
    trained = chat.decode([t for t, m in zip(record.response_ids, mask, strict=True) if m])
    assert trained == RESPONSE.replace("\n```output\n2\n```\n", "") + "<eos>"


@pytest.mark.parametrize("record, message", [
    ({"question": "1+1"}, "expected a trajectory"),
    ({"question": "1+1", "response": " "}, "response is empty"),
    ({"messages": [{"role": "user", "content": "x"}]}, "must end with an assistant turn"),
    ({"messages": ["x", "y"]}, "each message needs"),
    ({"response_ids": []}, "not a trajectory"),
])
def test_a_bad_sft_line_is_named(tmp_path, chat, record, message):
    with pytest.raises(ValueError, match="line 1: .*" + message):
        read_sft(write(tmp_path / "s.jsonl", record), chat)


def test_messages_need_the_chat_style(tmp_path):
    base = Template(tiny.make_tokenizer(), style="base")
    with pytest.raises(ValueError, match="need --style chat"):
        read_sft(write(tmp_path / "s.jsonl", {"messages": [{"role": "user", "content": "x"}]}), base)
