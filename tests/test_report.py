"""The page of a round: what is in the file, and what a browser makes of it (chromium, skipped where there is none)."""

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from make_dump import NASTY, make_dump
from thor import report
from thor.grpo import LossOptions, Tokens, count_tokens, hierarchical_loss
from thor.template import load_template

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_BROWSER = "no chromium on this machine; apt-get install chromium brings it"

HASHES = ["group=0&sample=0&colour=mask", "group=0&sample=0&colour=advantage", "group=0&sample=0&colour=ratio&token=0",
          "group=0&sample=1&colour=clipped", "group=0&sample=1&colour=advantage", "group=0&sample=0&colour=gap",
          "group=0&sample=0&colour=weight", "group=0&sample=0&colour=surprise", "group=0&sample=2&colour=mask",
          "group=1&sample=0&colour=ratio", "group=2&sample=0", "group=3&sample=0&colour=mask",
          "group=4&filter=failures", "group=6&sample=1&token=0", "group=5&filter=removed&token=0",
          "group=6&filter=branches&colour=clipped", "group=8"]
VARIANTS = [{}, {"joint": True}, {"sequence_ratio": True}, {"importance_cap": 0.9999995}, {"dual_clip": 0},
            {"step_weight": 0.5}, {"kl_weight": 0.1}, {"clip_low": 0.05, "clip_high": 0.01}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A made-up run with one dumped round."""
    directory = tmp_path_factory.mktemp("run")
    make_dump(directory)
    return directory


@pytest.fixture(scope="module")
def dump(run) -> report.Dump:
    """That round as the page reads it."""
    return report.read_dump(report.find_dump(run, None))


@pytest.fixture(scope="module")
def page(run, dump) -> str:
    """The page of that round."""
    return report.render(dump, load_template(run / "model", "base", "", None, False).tokenizer)


def unpacked(page: str, name: str) -> bytes:
    """The content of a data block."""
    [block] = re.findall(f'<script type="application/octet-stream" id="{name}">([A-Za-z0-9+/=]+)</script>', page)
    return gzip.decompress(base64.b64decode(block))


def index_of(page: str) -> dict:
    return json.loads(unpacked(page, "index"))


def read_chunk(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and columns of a chunk."""
    length = int.from_bytes(content[:4], "little")
    header, offset, columns = json.loads(content[4:4 + length]), 4 + length, {}
    for name, size in header["columns"]:
        columns[name] = np.frombuffer(content, np.int32 if name == "token" else np.float32, size, offset)
        offset += 4 * size
    assert offset == len(content)
    return header, columns


def samples_of(page: str) -> list[dict]:
    """Every sample with its arrays, as the page would load it."""
    index, chunks, found = index_of(page), {}, []
    for sample in index["samples"]:
        if sample["chunk"] not in chunks:
            chunks[sample["chunk"]] = read_chunk(unpacked(page, f"chunk-{sample['chunk']}"))
        header, columns = chunks[sample["chunk"]]
        record = header["samples"][sample["place"]]
        sizes = {name: sample["tokens"] if name in ("token", "sampled") else sample["count"] for name in record["at"]}
        found.append(sample | record | {name: columns[name][at:at + sizes[name]] for name, at in record["at"].items()})
    return found


# ---- the file ----

def test_the_page_loads_nothing_and_runs_no_script_but_its_own(page):
    for foreign in ("http:", "https:", "//www", "src=", "href=", "url(", "@import", "fetch(", "XMLHttp", "WebSocket"):
        assert foreign not in page
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in page
    assert "{{" not in page.replace(script, "")


def test_what_a_model_wrote_is_nowhere_in_the_file_as_text(page):
    assert NASTY in index_of(page)["groups"][2]["question"] + index_of(page)["groups"][1]["question"]
    for piece in ("onerror", "alert(1)", "<b>bold", "&amp; <b>"):
        assert piece not in page


def test_every_sample_is_in_the_page_with_its_text_and_its_facts(page, dump):
    index, samples = index_of(page), samples_of(page)
    ids, texts = index["vocabulary"]["ids"], index["vocabulary"]["texts"]
    assert len(samples) == len(dump.samples) == sum(len(group["members"]) for group in index["groups"])
    for line, sample in zip(dump.samples, samples, strict=True):
        facts = ("level", "group", "reward", "removed", "advantage", "update", "kept_for_later", "carried", "parent",
                 "fork")
        assert {name: sample[name] for name in facts} == {name: line[name] for name in facts}
        tokens = [ids[place] for place in sample["token"]]
        if line["sequence"] is None:
            numbers = dump.numbers(line)
            assert tokens == numbers["token"].tolist() and sample["positions"][0] == numbers["position"][0]
            continue
        assert tokens == line["sequence"].response_ids
        assert "".join(texts[place] for place in sample["token"]).removesuffix("<eos>") == line["sequence"].text
        assert [tuple(span) for span in sample["spans"]] == [(s.kind, s.start, s.end) for s in line["sequence"].spans]
        assert sample["outcomes"] == [run.outcome for run in line["sequence"].executions]


def test_the_numbers_of_the_trained_tokens_are_the_dumps_to_three_digits(page, run, dump):
    exact = load_file(dump.directory / "tokens.safetensors")
    seen = 0
    for line, sample in zip(dump.samples, samples_of(page), strict=True):
        if line["first"] is None:
            continue
        part = slice(line["first"], line["first"] + line["count"])
        prompt = sample.get("prompt_tokens", exact["position"][part][0])
        trained = [k for start, end in sample["trained"] for k in range(start, end)]
        if line["sequence"]:
            assert [k + prompt for k in trained] == exact["position"][part].tolist()
        old, new, sampled = (exact[name][part].astype(float) for name in ("old", "new", "sampled"))
        np.testing.assert_allclose(sample["sampled"][trained], sampled, rtol=1e-4)
        np.testing.assert_allclose(sample["gap"], old - sampled, rtol=1e-3, atol=1e-12)
        np.testing.assert_allclose(sample["shift"], new - old, rtol=1e-3, atol=1e-12)
        seen += line["count"]
    assert seen == len(exact["token"])


def test_branches_lie_in_the_chunk_of_their_trajectory_and_chunks_hold_whole_families(dump):
    vocabulary = report.Vocabulary(load_template(dump.settings["model"], "base", "", None, False).tokenizer)
    chunks, places = report.build_chunks(dump, vocabulary, chunk_tokens=1)
    assert len(chunks) == 7 and sorted(places) == list(range(len(dump.samples)))
    for number, sample in enumerate(dump.samples):
        if sample["parent"] is not None:
            assert places[number][0] == places[sample["parent"]][0]


@pytest.mark.parametrize(("positions", "expected"), [([], []), ([3, 4, 5, 9], [[3, 6], [9, 10]]), ([0], [[0, 1]])])
def test_positions_become_stretches(positions, expected):
    assert report.runs(np.array(positions, dtype=int)) == expected


def test_rounding_keeps_the_promised_digits_and_zeros_the_rest():
    values = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32) * 1e-6
    kept = report.rounded(values, 11)
    assert np.abs(kept / values - 1).max() <= 2 ** -12 and not (kept.view(np.uint32) & 0xfff).any()
    assert np.isnan(report.rounded([np.nan], 11)).all() and report.rounded([0.0], 11)[0] == 0


class Pieces:
    """A tokenizer of three pieces: a word with a leading space, half a character, a control token."""

    all_special_ids, added_tokens_decoder = [2], {2: "</s>"}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return ["word", "\ufffd", "</s>"][ids[0]]

    def convert_ids_to_tokens(self, token):
        return ["▁word", "<0xE2>", "</s>", None][token]


def test_a_token_by_itself_keeps_its_space_and_half_a_character_has_a_name():
    vocabulary = report.Vocabulary(Pieces())
    assert vocabulary.add([2, 0, 2, 1]) == [0, 1, 0, 2]
    assert vocabulary.table() == {"ids": [2, 0, 1], "texts": ["</s>", " word", "⟨<0xE2>⟩"], "special": [0]}


# ---- the command ----

def test_the_last_round_becomes_a_page_in_the_runs_directory(run, page, capsys):
    report.main(run, None, None, None)
    assert "round 2, 26 samples" in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_a_directory_without_a_dump_is_one_sentence_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "thor.report", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dump_every" in done.stderr


def test_a_round_that_was_not_dumped_is_named_with_those_that_were(run):
    with pytest.raises(ValueError, match="no dump of round 3; there is 2"):
        report.find_dump(run, 3)
    assert report.find_dump(run, 2) == report.find_dump(report.find_dump(run, None), None)


def test_a_line_separator_that_a_model_wrote_ends_no_line_of_a_dump(run, tmp_path):
    copy = shutil.copytree(report.find_dump(run, None), tmp_path / "round_000002")
    lines = [json.loads(line) for line in (copy / "trajectories.jsonl").read_text().split("\n")[:-1]]
    lines[0]["text"] += "\u2028\x85"
    (copy / "trajectories.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert report.read_dump(copy).samples[0]["sequence"].text.endswith("\u2028\x85")


@pytest.mark.parametrize(("name", "content"), [
    ("samples.jsonl", b"{}\n"), ("samples.jsonl", b'{"line": null, "level": "step"}\n'),
    ("tokens.safetensors", b"x"), ("settings.json", b"{"),
    ("trajectories.jsonl", b'{"id": 1}\n'), ("updates.jsonl", b"[]\n")])
def test_a_broken_dump_is_a_value_error_that_names_it(run, tmp_path, name, content):
    broken = tmp_path / "round_000002"
    shutil.copytree(report.find_dump(run, None), broken)
    (broken / name).write_bytes(content)
    with pytest.raises(ValueError, match="round_000002 is not the dump of a round"):
        report.read_dump(broken)


def test_a_model_that_is_gone_is_asked_for(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(report.find_dump(run, None), moved)
    settings = json.loads((moved / "settings.json").read_text())
    settings["options"]["model"] = str(tmp_path / "gone")
    (moved / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="--tokenizer DIR"):
        report.main(moved, None, None, None)
    written = tmp_path / "new" / "page.html"
    report.main(moved, None, str(run / "model"), written)
    assert len(index_of(written.read_text(encoding="utf-8"))["metrics"]) == 1  # the round's alone: there is no run


# ---- the browser ----

def browse(page: str, directory: Path, fragment: str, dark: bool) -> dict:
    """What tests/report_probe.js saw of the page, whose policy lets its hash through; nothing else is changed."""
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail(NO_BROWSER)
        pytest.skip(NO_BROWSER)
    probe = (ROOT / "tests" / "report_probe.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    plan = json.dumps({"hashes": HASHES, "variants": [] if dark else VARIANTS})
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    scripts = f'<script id="plan" type="application/json">{plan}</script><script>{probe}</script>'
    page = page.replace("</head>", f"{scripts}</head>", 1)
    (directory / "page.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,800",
               f"--user-data-dir={directory / 'profile'}", "--enable-logging=stderr", "--remote-debugging-port=0",
               "--disable-ipc-flooding-protection",  # which would slow down so many changes of the hash
               *(["--force-dark-mode"] if dark else []), f"file://{directory / 'page.html'}#{fragment}"]
    pieces, console, said = [], [], []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                          start_new_session=True) as browser:
        deadline = threading.Timer(300, os.killpg, (browser.pid, signal.SIGKILL))  # for a browser that hangs
        deadline.start()
        for line in browser.stderr:  # however long it takes; the page's last words are its 0th piece
            if piece := re.search(r"seen:(\d+):([A-Za-z0-9+/=]*)", line):
                pieces.append(piece.group(2))
                if piece.group(1) == "0":
                    break
            else:
                said.append(line)
                console += [line] * ("CONSOLE" in line)
        deadline.cancel()
        os.killpg(browser.pid, signal.SIGKILL)
    assert pieces, "".join(said)[-2000:]
    return json.loads(base64.b64decode("".join(pieces))) | {"console": console}


@pytest.fixture(scope="module")
def light(page, tmp_path_factory) -> dict:
    return browse(page, tmp_path_factory.mktemp("light"), HASHES[0], dark=False)


@pytest.fixture(scope="module")
def dark(page, tmp_path_factory) -> dict:
    return browse(page, tmp_path_factory.mktemp("dark"), HASHES[0], dark=True)


def view(seen: dict, fragment: str) -> dict:
    return seen["views"][fragment]


def trained_of(dump: report.Dump, number: int) -> set[int]:
    """Response tokens of a sample that a loss saw."""
    sample = dump.samples[number]
    return set((dump.numbers(sample)["position"] - len(sample["sequence"].prompt_ids)).tolist())


def test_no_view_has_an_error_and_none_scrolls_sideways_at_1000_pixels(light, dark):
    for seen in (light, dark):
        assert seen["errors"] == [] and seen["console"] == []
        assert seen["width"] == 1000 and max(view["overflow"] for view in seen["views"].values()) <= 0


def test_a_view_is_reached_by_its_address_alone(light):
    assert light["first"] == view(light, HASHES[0])


def test_all_tokens_are_shown_in_order_with_what_they_say(light, dump):
    shown = [token for token in view(light, HASHES[0])["tokens"]]
    sequence = dump.samples[0]["sequence"]
    assert [token["k"] for token in shown] == list(range(len(sequence.response_ids)))
    assert "".join(token["text"] for token in shown).replace("⏎", "") == sequence.text + "<eos>"
    assert [label.split(" ")[0] for label in view(light, HASHES[0])["labels"]] == [span.kind for span in sequence.spans]


def test_the_mask_tells_trained_tokens_from_the_others(light, dump):
    for fragment, number in (("group=0&sample=0&colour=mask", 0), ("group=3&sample=0&colour=mask", 11)):
        tokens = [token for token in view(light, fragment)["tokens"] if token["s"] == number]
        trained = trained_of(dump, number)
        assert 0 < len(trained) < len(tokens)
        for token in tokens:
            assert token["classes"] == (["pos"] if token["k"] in trained else ["out"])
    removed = view(light, "group=0&sample=2&colour=mask")
    assert all("out" in token["classes"] for token in removed["tokens"] if token["s"] == 2)
    assert "failed_execution" in removed["why"][0]


def test_colours_are_those_of_the_numbers(light, dump):
    numbers = dump.numbers(dump.samples[0])
    shift = dict(zip(sorted(trained_of(dump, 0)), numbers["new"].astype(float) - numbers["old"], strict=True))
    for token in view(light, "group=0&sample=0&colour=ratio&token=0")["tokens"]:
        if token["k"] in shift:
            value = shift[token["k"]]
            assert token["classes"][0] == ("pos" if value > 0 else "neg")
            limit = np.log(1.28) if value > 0 else -np.log(0.8)
            assert token["v"] == pytest.approx(min(abs(value) / limit, 1), abs=2e-3)
    for sample, side in ((0, "pos"), (1, "neg")):
        tokens = view(light, f"group=0&sample={sample}&colour=advantage")["tokens"]
        values = {(token["classes"][0], token["v"]) for token in tokens if token["k"] in trained_of(dump, sample)}
        assert values == {(side, round(abs(dump.samples[sample]["advantage"]) / 2, 3))}


def test_clipped_tokens_are_marked_by_side_and_the_others_are_not(light, dump):
    def expected(number: int) -> list[str]:
        sample, numbers = dump.samples[number], dump.numbers(dump.samples[number])
        ratio = np.exp(numbers["new"].astype(float) - numbers["old"])
        positive = sample["advantage"] > 0
        return [("high" if r > 1.28 else "") if positive else "low" if r < 0.8 else "dual" if r > 3 else ""
                for r in ratio]

    branches = "group=6&filter=branches&colour=clipped"
    for fragment, number in (("group=0&sample=1&colour=clipped", 1), (branches, 17), (branches, 18), (branches, 19)):
        tokens = [token for token in view(light, fragment)["tokens"]
                  if token["s"] == number and token["k"] in trained_of(dump, number)]
        sides = [[name for name in token["classes"] if name not in ("pos", "neg")] for token in tokens]
        assert [side[0] if side else "" for side in sides] == expected(number)
    assert {"low", "dual"} <= set(expected(1)) and "high" in expected(17)


def test_untrained_tokens_have_no_colour_but_their_probability(light, dump):
    plain, surprise = (view(light, f"group=0&sample=0&colour={colour}")["tokens"] for colour in ("weight", "surprise"))
    observed = [token["k"] for token in plain if token["k"] not in trained_of(dump, 0)]
    assert {plain[k]["v"] for k in observed} == {surprise[k]["v"] for k in observed} == {0.0}
    sampled = dump.samples[0]["sequence"].logprobs
    assert [token["v"] for token in surprise if token["k"] not in observed] == pytest.approx(
        [min(-p / 3, 1) for p in sampled if p is not None], abs=2e-3)


def test_branches_stand_side_by_side_at_their_fork_with_rewards_and_runs(light, dump):
    for fragment in ("group=0&sample=2&colour=mask", "group=6&filter=branches&colour=clipped"):
        seen = view(light, fragment)
        assert seen["branches"] == ["what the trajectory did", "branch 0pass reward 1", "branch 1pass reward 0",
                                    "branch 2pass reward 1", "branch 3no reward"]
        assert seen["strips"] == 1
        assert [run.split(":")[0] for run in seen["runs"]] == ["✗ error", "✓ ok", "✗ error", "✓ ok"]
        assert "Fork at token 6" in seen["fork"][0] and "2 of the 3 that count passed" in seen["fork"][0]
        for number in (2, 17, 18, 19, 20):
            tokens = [token["k"] for token in seen["tokens"] if token["s"] == number]
            assert tokens == list(range(len(dump.samples[number]["sequence"].response_ids)))


def test_dropped_attempts_are_folded_where_they_were_made(light):
    [first, second] = view(light, "group=3&sample=0&colour=mask")["dropped"]
    assert not first[0] and "Dropped attempt 1" in first[1] and "print(2+x)" in first[1] and "NameError" in first[1]
    assert not second[0] and "print(2+z)" in second[1]


def test_a_trajectory_says_what_became_of_it(light):
    assert "advantage Â+0.5773 = (1 − 0.6667) / 0.5774" in view(light, HASHES[0])["facts"]
    assert "trainedin update 1" in view(light, HASHES[0])["facts"]
    assert "groups_equal_rewards" in view(light, "group=2&sample=0")["why"][0]
    assert "trainedin the next round" in view(light, "group=5&filter=removed&token=0")["facts"]
    assert "carried to the next round" in view(light, "group=5&filter=removed&token=0")["inspect"][0]
    assert "carried from the round before" in view(light, "group=8")["heading"]
    assert len(view(light, "group=8")["tokens"]) == 21 and "from position 8" in view(light, "group=8")["labels"][0]


@pytest.mark.parametrize(("name", "groups"), [
    ("failures", "0 6 4 7"), ("branches", "0 6 4 7"), ("removed", "0 6 2 4 7")])
def test_filters_leave_the_groups_that_they_name(light, name, groups):
    [fragment] = [fragment for fragment in HASHES if f"filter={name}" in fragment]
    assert [text.split(" ")[0] for text in view(light, fragment)["list"]] == groups.split(" ")


def test_text_that_looks_like_markup_stays_text(light):
    seen = view(light, "group=1&sample=0&colour=ratio")
    assert NASTY in "".join(token["text"] for token in seen["tokens"]).replace("⏎", "")
    assert seen["images"] == 0


def test_a_mark_that_turns_the_direction_of_text_turns_no_other_token(light):
    assert {token["bidi"] for seen in light["views"].values() for token in seen["tokens"]} == {"isolate"}


def test_a_run_that_was_killed_before_its_first_line_of_metrics_has_a_page(run, tmp_path):
    killed = shutil.copytree(run, tmp_path / "run")
    (killed / "metrics.jsonl").write_text("")
    assert [line["step"] for line in report.read_dump(report.find_dump(killed, None)).metrics] == [2]


def oracle(dump: report.Dump, changes: dict) -> dict[tuple[int, int], float]:
    """−∂L/∂log π of every trained token by (sample, response token), by differentiating the trainer's own loss."""
    options = {name: dump.settings["options"].get(name) for name in LossOptions.__dataclass_fields__} | changes
    options = LossOptions(**options | {name: options[name] or None for name in ("dual_clip", "importance_cap")})
    found = {}
    for update in dump.updates:
        members = [number for number, sample in enumerate(dump.samples) if sample["update"] == update["update"]]
        numbers = [dump.numbers(dump.samples[number]) for number in members]
        old, sampled, new, reference = (torch.tensor(np.concatenate([part[name] for part in numbers])).double()
                                        for name in ("old", "sampled", "new", "reference"))
        counts = torch.tensor([len(part["token"]) for part in numbers])
        spread = [torch.tensor(values).repeat_interleave(counts) for values in (
            [dump.samples[number]["advantage"] for number in members],
            [dump.samples[number]["level"] == "step" for number in members], range(len(members)))]
        tokens = Tokens(old, sampled, spread[0].double(), spread[1], spread[2])
        new.requires_grad_()
        hierarchical_loss(new, tokens, count_tokens(tokens), options, reference).backward()
        for number, part, slope in zip(members, numbers, torch.split(new.grad, counts.tolist()), strict=True):
            sequence = dump.samples[number]["sequence"]
            start = len(sequence.prompt_ids) if sequence else None
            places = part["position"] - start if sequence else range(len(slope))
            found |= {(number, int(k)): -value for k, value in zip(places, slope.tolist(), strict=True)}
    return found


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "defaults")
def test_the_weight_of_every_token_is_the_derivative_of_the_loss(light, dump, changes):
    seen = {(number, k): value for number, k, value in light["weights"][json.dumps(changes, separators=(",", ":"))]}
    expected = oracle(dump, changes)
    assert len(expected) == 605 and {place for place, value in seen.items() if value is not None} == set(expected)
    scale = max(map(abs, expected.values()))
    for place, value in expected.items():
        assert seen[place] == pytest.approx(value, rel=1e-3, abs=1e-5 * scale), place


def test_the_inspector_shows_how_the_weight_is_made(light, dump):
    [said] = view(light, "group=0&sample=0&colour=ratio&token=0")["inspect"]
    assert "0 (Eq. 5: ρ above 1 + ε_high) + α 0.01 / " in said and "tokens with Â > 0 (Eq. 6)" in said
    assert said.endswith(f"; the tokens counted are those of update {dump.samples[0]['update']}, trajectories alone")


def test_a_branchs_token_has_an_address_too(light, dump):
    [said] = view(light, "group=6&sample=1&token=0")["inspect"]
    tokens = dump.updates[dump.samples[18]["update"]]["counts"]["step_tokens"]
    assert f"Â −1.155 / {tokens} tokens" in said or "Eq. 5: ρ above c" in said
    assert said.endswith(f"those of update {dump.samples[18]['update']}, branches alone")


def test_curves_mark_the_dumped_round_and_say_its_numbers(light):
    charts = {title: (lines, now, key) for title, lines, now, key in light["charts"]}
    assert len(charts) == 8
    assert charts["execution pass rate"][0] == 2 and charts["how they ended"][0] == 5
    assert {now for _, now, _ in charts.values()} == {f"M{100 / 3} -4V104"}
    assert "trajectory 0.85" in charts["execution pass rate"][2] and "branches 0.4" in charts["execution pass rate"][2]


def test_the_page_is_used_by_keyboard_alone(light):
    places = [(key, place) for key, place, _ in light["focus"]]
    assert places == [
        ("j", "group 6"), ("ArrowDown", "group 1"), ("k", "group 6"), ("Enter", "heading"), ("n", "BUTTON"),
        ("t", "token 0"), ("ArrowRight", "token 1"), ("ArrowLeft", "token 0"), ("4", "token 0"), ("Escape", "group 0"),
        ("f", "group 0"), ("?", "BUTTON")]
    hashes = {key: fragment for key, _, fragment in light["focus"]}
    assert "group=6" in hashes["Enter"] and "colour=ratio" in hashes["4"] and "filter=failures" in hashes["f"]
    assert light["dialog"] and light["unnamed"] == 0


def test_dark_mode_is_another_palette_and_every_text_can_be_read_in_both(light, dark):
    assert light["ground"] == "rgb(255, 255, 255)" and dark["ground"] != light["ground"]
    for seen in (light, dark):
        worst = min((view["contrast"] for view in seen["views"].values()), key=lambda pair: pair[0])
        assert worst[0] >= 4.5, worst
