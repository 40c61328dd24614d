"""One round of a run as a page: `python -m thor.report DIR` reads a dump and writes one HTML file (docs/report.md).

Here is decided what of a dump goes into the page and how it is packed; how it looks is report.html, which computes the
derived numbers too. The file needs no network and no other file. What a model wrote goes into it as compressed bytes in
base64 and nowhere as text, so it can never become markup. The list of groups and all short facts are one block that is
read at once; tokens lie in chunks of a few groups each, unpacked when one of them is shown.

R tokens of a response · T trained tokens of a sample
"""

import argparse
import base64
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from thor.checkpoint import write_aside
from thor.data import read_records
from thor.metrics import read_metrics
from thor.template import load_template
from thor.trajectory import Trajectory, from_json

TEMPLATE = Path(__file__).with_name("report.html")
CHUNK_TOKENS = 60_000  # response tokens of a chunk, above which it takes no further group
LOGPROB_BITS, SMALL_BITS = 14, 11  # bits of the mantissa: four digits of a log-prob, three of a difference or entropy
NUMBERS = ("token", "position", "sampled", "old", "new")  # of every trained token; entropy and reference may be there
FACTS = ("level", "line", "group", "reward", "removed", "advantage", "carried", "kept_for_later", "update", "parent",
         "fork", "first", "count")  # of every sample

Line = dict[str, object]


@dataclass(frozen=True)
class Dump:
    """A round's directory as it was read; `samples` are its lines, `sequence` in them a Trajectory or None."""

    directory: Path
    settings: Line
    samples: list[Line]
    tokens: dict[str, np.ndarray]
    updates: list[Line]
    metrics: list[Line]

    @property
    def families(self) -> list[list[int]]:
        """Numbers of samples that are shown together: a group of trajectories and the branches of its members."""
        found: dict[int, list[int]] = {}
        for number, sample in enumerate(self.samples):
            root = sample if sample["parent"] is None else self.samples[sample["parent"]]
            found.setdefault(root["group"], []).append(number)
        return list(found.values())

    def numbers(self, sample: Line) -> dict[str, np.ndarray]:
        """The [T] arrays of a sample; empty where it was not trained."""
        first = sample["first"] or 0
        return {name: values[first:first + sample["count"]] for name, values in self.tokens.items()}


def find_dump(directory: Path, number: int | None) -> Path:
    """The directory of a round: `directory` itself, else in that run the dump of round `number`, or the last one."""
    if (directory / "samples.jsonl").is_file():
        if number is not None:
            raise ValueError(f"{directory} is one round already; --round chooses among those of a run")
        return directory
    found = sorted((directory / "dump").glob("round_*"))
    if not found:
        raise ValueError(f"{directory} holds no dump of a round; train_rl.py writes them with --dump_every N")
    wanted = found[-1] if number is None else directory / "dump" / f"round_{number:06d}"
    if wanted not in found:
        there = ", ".join(str(int(path.name.removeprefix("round_"))) for path in found)
        raise ValueError(f"{directory} holds no dump of round {number}; there is {there}")
    return wanted


def read_dump(directory: Path) -> Dump:
    """A round's directory, and its run's curves if they lie two levels above. ValueError for what is no dump."""
    try:
        settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
        files = {level: _lines(directory / name) for level, name in
                 (("trajectory", "trajectories.jsonl"), ("step", "branches.jsonl"))}
        samples = [{name: line[name] for name in FACTS} | {
            "sequence": None if line["line"] is None else files[line["level"]][line["line"]]}
            for line in _records(directory / "samples.jsonl")]
        tokens = load_file(directory / "tokens.safetensors")
        missing = [name for name in NUMBERS if name not in tokens]
        if missing:
            raise ValueError(f"tokens.safetensors has no {', '.join(missing)}")
        updates = _records(directory / "updates.jsonl")
        metrics = [json.loads((directory / "metrics.json").read_text(encoding="utf-8"))]
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{directory} is not the dump of a round: {error!r}") from None
    try:
        metrics = read_metrics(directory.resolve().parent.parent)
    except ValueError:  # no run around it, or one that was killed before its first line: the round's own line is known
        pass
    return Dump(directory, settings, samples, tokens, updates, metrics)


def _records(path: Path) -> list[Line]:
    """The JSON objects of a file; a round without branches or updates has an empty one."""
    return [record for _, record in read_records(path)] if path.stat().st_size else []


def _lines(path: Path) -> list[Trajectory]:
    """Trajectories or branches; their ids may repeat."""
    return [from_json(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]  # U+2028 ends no line here


class Vocabulary:
    """Every token that the page shows, numbered as it first comes up, with its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self.places: dict[int, int] = {}

    def add(self, ids: Iterable[int]) -> list[int]:
        """The page's numbers of some token ids."""
        return [self.places.setdefault(int(token), len(self.places)) for token in ids]

    def text(self, token: int) -> str:
        """One token decoded by itself: a leading space is kept, a part of a character is named by its piece."""
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"⟨{token}⟩"
        if "\ufffd" in text:
            return f"⟨{piece}⟩"
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text

    def table(self) -> Line:
        """What the page needs: ids, texts, and which of them are special."""
        ids = list(self.places)
        return {"ids": ids, "texts": [self.text(token) for token in ids],
                "special": [place for place, token in enumerate(ids) if token in self.special]}


def build_chunks(dump: Dump, vocabulary: Vocabulary,
                 chunk_tokens: int = CHUNK_TOKENS) -> tuple[list[bytes], dict[int, tuple[int, int]]]:
    """Packed chunks of whole families, and for each number of a sample its chunk and place therein."""
    chunks, places = [], {}
    for members in _by_size(dump, chunk_tokens):
        places |= {number: (len(chunks), place) for place, number in enumerate(members)}
        chunks.append(pack_chunk(dump, members, vocabulary))
    return chunks, places


def _by_size(dump: Dump, chunk_tokens: int) -> Iterator[list[int]]:
    """Families one after another, put together until they have so many response tokens."""
    members: list[int] = []
    size = 0
    for family in dump.families:
        members, size = members + family, size + sum(_length(dump.samples[number]) for number in family)
        if size >= chunk_tokens:
            yield members
            members, size = [], 0
    if members:
        yield members


def _length(sample: Line) -> int:
    """R, or T where the response is not there because it was drawn a round before."""
    return len(sample["sequence"].response_ids) if sample["sequence"] else sample["count"]


def pack_chunk(dump: Dump, members: list[int], vocabulary: Vocabulary) -> bytes:
    """A few families' tokens: a JSON header, then int32 tokens and float32 numbers, each sample's at an offset.

    Differences are stored instead of the log-probs themselves (gap = old − sampled, shift = new − old): a gap of 1e-6
    would be lost in the rounding that makes the file small.
    """
    columns: dict[str, list[np.ndarray]] = {}
    prompts: dict[tuple[int, ...], int] = {}
    records = []
    for number in members:
        sample, arrays = dump.samples[number], sample_arrays(dump, dump.samples[number], vocabulary)
        at = {name: sum(map(len, columns.get(name, []))) for name in arrays}
        for name, values in arrays.items():
            columns.setdefault(name, []).append(values)
        records.append({"at": at} | sample_text(sample, dump.numbers(sample)["position"], vocabulary, prompts))
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    header = {"samples": records, "prompts": [vocabulary.add(prompt) for prompt in prompts],
              "columns": [[name, len(values)] for name, values in arrays.items()]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)
    return len(text).to_bytes(4, "little") + text + b"".join(values.tobytes() for values in arrays.values())


def sample_arrays(dump: Dump, sample: Line, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """`token` and `sampled` of each response token [R], the rest of each trained one [T]."""
    numbers, sequence = dump.numbers(sample), sample["sequence"]
    ids = numbers["token"] if sequence is None else sequence.response_ids
    logprobs = numbers["sampled"] if sequence is None else [np.nan if p is None else p for p in
                                                            sequence.logprobs or [None] * len(ids)]
    old = numbers["old"].astype(np.float64)
    arrays = {"token": np.array(vocabulary.add(ids), "<i4"), "sampled": rounded(logprobs, LOGPROB_BITS),
              "gap": rounded(old - numbers["sampled"], SMALL_BITS), "shift": rounded(numbers["new"] - old, SMALL_BITS)}
    return arrays | {name: rounded(numbers[name], bits) for name, bits in
                     (("entropy", SMALL_BITS), ("reference", LOGPROB_BITS)) if name in numbers}


def sample_text(sample: Line, positions: np.ndarray, vocabulary: Vocabulary,
                prompts: dict[tuple[int, ...], int]) -> Line:
    """Spans, executions, dropped attempts and which tokens were trained; a branch's prompt is its parent's text.

    Without its trajectory (carried from the round before) the trained tokens are the text, cut where some lie between.
    """
    sequence = sample["sequence"]
    if sequence is None:
        gaps = np.flatnonzero(np.diff(positions) > 1) + 1
        bounds = [0, *gaps.tolist(), len(positions)]
        return {"trained": [[0, len(positions)]], "spans": [["unknown", start, end] for start, end in zip(
            bounds[:-1], bounds[1:], strict=True)], "positions": [int(positions[start]) for start in bounds[:-1]]}
    prompt = tuple(sequence.prompt_ids)
    return {
        "prompt": None if sample["parent"] is not None else prompts.setdefault(prompt, len(prompts)),
        "prompt_tokens": len(prompt), "trained": runs(positions - len(prompt)),
        "spans": [[span.kind, span.start, span.end] for span in sequence.spans],
        "executions": [run and asdict(run) for run in sequence.executions],
        "attempts": [{"step": attempt.step, "start": attempt.start, "tokens": vocabulary.add(attempt.response_ids),
                      "sampled": [round(p, 4) for p in attempt.logprobs], "execution": asdict(attempt.execution)}
                     for attempt in sequence.attempts]}


def runs(positions_T: np.ndarray) -> list[list[int]]:
    """Ascending positions as [start, end) of the stretches without a gap. Example: 3, 4, 5, 9 give [3, 6], [9, 10]."""
    if not len(positions_T):
        return []
    ends = np.flatnonzero(np.diff(positions_T) != 1)
    starts = positions_T[np.append(0, ends + 1)]
    return np.stack([starts, positions_T[np.append(ends, len(positions_T) - 1)] + 1], 1).tolist()


def rounded(values: Iterable[float], bits: int) -> np.ndarray:
    """As float32 with `bits` bits of mantissa and zeros after them, which compress. NaN stays NaN."""
    drop = 23 - bits
    raw = np.asarray(values, "<f4").view("<u4")
    return ((raw + (1 << drop - 1)) >> drop << drop).astype("<u4").view("<f4")


def build_index(dump: Dump, places: dict[int, tuple[int, int]], vocabulary: Vocabulary) -> Line:
    """Everything that the page knows before any chunk is unpacked."""
    return {"run": dump.directory.resolve().parent.parent.name, "settings": dump.settings, "updates": dump.updates,
            "metrics": dump.metrics, "vocabulary": vocabulary.table(), "groups": groups_of(dump),
            "samples": [sample_facts(sample, *places[number]) for number, sample in enumerate(dump.samples)]}


def groups_of(dump: Dump) -> list[Line]:
    """Groups in the order of the page, branches after the trajectories that they grew from, with their members."""
    found: dict[int, Line] = {}
    for family in dump.families:
        for number in family:
            sample, sequence = dump.samples[number], dump.samples[number]["sequence"]
            group = found.setdefault(sample["group"], {name: sample[name] for name in (
                "group", "level", "carried", "parent", "fork")} | {"members": []} | {
                    name: getattr(sequence, name, None) for name in ("id", "question", "answer")})
            group["members"].append(number)
    return list(found.values())


def sample_facts(sample: Line, chunk: int, place: int) -> Line:
    """What a list or a heading says of a sample."""
    sequence = sample["sequence"]
    known = {} if sequence is None else {
        "sample": sequence.sample, "finish": sequence.finish, "boxed": sequence.boxed,
        "outcomes": [run.outcome for run in sequence.executions if run]}
    return {name: value for name, value in sample.items() if name not in ("sequence", "line", "first")} | known | {
        "tokens": _length(sample), "chunk": chunk, "place": place}


def render(dump: Dump, tokenizer: PreTrainedTokenizerBase) -> str:
    """The page. Only its own script may run in it: its hash is the one that the content security policy names."""
    vocabulary = Vocabulary(tokenizer)
    chunks, places = build_chunks(dump, vocabulary)
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    index = json.dumps(build_index(dump, places, vocabulary), ensure_ascii=False).encode()
    blocks = "\n".join(data_block(f"chunk-{number}", chunk) for number, chunk in enumerate(chunks))
    for name, block in (("policy", policy), ("index", data_block("index", index)), ("chunks", blocks)):
        page = page.replace(f"{{{{{name}}}}}", block)
    return page


def data_block(name: str, content: bytes) -> str:
    """Bytes as a script element that no browser runs; the same bytes give the same text."""
    packed = base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def main(directory: Path, number: int | None, tokenizer: str | None, out: Path | None) -> None:
    """Read, build, write."""
    dump = read_dump(find_dump(directory, number))
    model = tokenizer or dump.settings["options"]["model"]
    if not Path(model).is_dir():
        raise ValueError(f"the model that was trained, {model}, is not there; name its tokenizer with --tokenizer DIR")
    target = out or directory / "report.html"
    page = render(dump, load_template(model, "base", "", None, False).tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_aside(target, page)
    size = len(page.encode()) / 1e6
    print(f"wrote {target}: round {dump.settings['round']}, {len(dump.samples)} samples, {size:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m thor.report", description="One dumped round as a page of HTML.")
    parser.add_argument("directory", type=Path, help="a run (its last dumped round), or the directory of one round")
    parser.add_argument("--round", type=int, help="another round of the run")
    parser.add_argument("--tokenizer", help="Hugging Face directory, if that of the trained model is gone")
    parser.add_argument("--out", type=Path, help="the file to write; default DIR/report.html")
    given = parser.parse_args()
    try:
        main(given.directory, given.round, given.tokenizer, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
