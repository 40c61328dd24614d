"""The small world of the demo: word problems that need code, their scripted solutions, and a tokenizer for both.

A problem is one task or two in a row ("let g be …; what is …"), a task is a sentence with numbers in it and a few ways to
write the program. Programs name their variables: by default the task's own letters, else letters drawn anew, and a small
model that mixes them up earns a NameError. `sloppy`, the share of scripted programs that mix one up themselves, is the dial
for how often code fails after the cold start; TIRGen's programs all ran. `thinking` writes the same solutions in the
reasoning style, inside <think>, for a Qwen3 with a chat template. Invariant: which of train, tune and held-out a
problem belongs to is a hash of its numbers, decided before anything is sampled, so no held-out problem was ever seen.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thor import config
from thor.config import option
from thor.critic import Rewrite

SPLITS = ("train", "tune", "held-out")
LETTERS = "abcdghkmnpqst"  # 13 letters that a program may call its variables


@dataclass(frozen=True)
class Task:
    """One computation. Format strings: {a}, {b}, {c} are numbers, {x}, {y}, {z} variables, {result} what comes out."""

    name: str
    ranges: tuple[tuple[int, int], ...]  # of a, b, c, both ends included
    letters: str  # default names of x, y, z
    goal: str  # "We look for {goal}."
    story: str  # a question that never says what to compute in the goal's words
    programs: tuple[str, ...]  # none loops for ever when its names are mixed up, which would cost a time-out each


TASKS = {task.name: task for task in (
    Task("gcd", ((12, 240), (12, 240)), "ab", "the greatest common divisor of {a} and {b}",
         "Two ropes of {a} and {b} metres are cut into equal pieces without waste. How long can a piece be at most?",
         ("import math\n{x} = {a}\n{y} = {b}\nprint(math.gcd({x}, {y}))\n",
          "{x} = {a}\n{y} = {b}\nprint(max(i for i in range(1, {x} + 1) if {x} % i == {y} % i == 0))\n",
          "import sympy\n{x} = {a}\n{y} = {b}\nprint(sympy.gcd({x}, {y}))\n")),
    Task("lcm", ((11, 99), (11, 99)), "ab", "the least common multiple of {a} and {b}",
         "Two lamps flash every {a} and {b} seconds, now together. After how many seconds do they do so again?",
         ("import math\n{x} = {a}\n{y} = {b}\nprint(math.lcm({x}, {y}))\n",
          "import math\n{x} = {a}\n{y} = {b}\nprint({x} * {y} // math.gcd({x}, {y}))\n",
          "{x} = {a}\n{y} = {b}\nprint(min(i for i in range({x}, {x} * {y} + 1, {x}) if i % {y} == 0))\n")),
    Task("divisors", ((20, 600),), "ns", "the sum of the divisors of {a}",
         "A baker packs {a} rolls in equal bags. What is the sum of all possible bag sizes?",
         ("{x} = {a}\nprint(sum(i for i in range(1, {x} + 1) if {x} % i == 0))\n",
          "import sympy\n{x} = {a}\nprint(sympy.divisor_sigma({x}))\n",
          "{x} = {a}\n{y} = 0\nfor i in range(1, {x} + 1):\n    if {x} % i == 0:\n        {y} += i\nprint({y})\n")),
    Task("power", ((2, 60), (5, 80), (7, 97)), "abm", "the remainder of {a} to the power {b} modulo {c}",
         "A clock with {c} hours is turned {a} to the power {b} hours from zero. Which hour does it show?",
         ("{x} = {a}\n{y} = {b}\n{z} = {c}\nprint(pow({x}, {y}, {z}))\n",
          "{x} = {a}\n{y} = {c}\n{z} = 1\nfor i in range({b}):\n    {z} = {z} * {x} % {y}\nprint({z})\n")),
    Task("primes", ((10, 200), (210, 400)), "ab", "the number of primes from {a} to {b}",
         "Houses have the numbers {a} to {b}. How many of these numbers are prime?",
         ("import sympy\n{x} = {a}\n{y} = {b}\nprint(len(list(sympy.primerange({x}, {y} + 1))))\n",
          "import sympy\n{x} = {a}\n{y} = {b}\nprint(sum(1 for i in range({x}, {y} + 1) if sympy.isprime(i)))\n",
          "{x} = {a}\n{y} = {b}\nprint(sum(all(i % j for j in range(2, i)) for i in range({x}, {y} + 1)))\n")),
    Task("equation", ((2, 30), (3, 99), (100, 999)), "abc", "the solution of {a} x + {b} = {c}",
         "A taxi takes {b} coins and {a} more for each mile. How many miles do {c} coins pay, as a fraction?",
         ("from fractions import Fraction\n{x} = {a}\n{y} = {b}\n{z} = {c}\nprint(Fraction({z} - {y}, {x}))\n",
          "import sympy\nx = sympy.symbols('x')\n{x} = {a}\n{y} = {b}\n{z} = {c}\n"
          "print(sympy.solve({x} * x + {y} - {z}, x)[0])\n")),
    Task("choose", ((10, 60), (2, 6)), "nk", "the number of ways to choose {b} of {a}",
         "A club of {a} members sends {b} of them to a fair. In how many ways can it do so?",
         ("import math\n{x} = {a}\n{y} = {b}\nprint(math.comb({x}, {y}))\n",
          "import sympy\n{x} = {a}\n{y} = {b}\nprint(sympy.binomial({x}, {y}))\n",
          "from math import factorial\n{x} = {a}\n{y} = {b}\n"
          "print(factorial({x}) // factorial({y}) // factorial({x} - {y}))\n")),
    Task("interest", ((100, 999), (2, 9), (2, 9)), "prt", "the whole coins of {a} after {c} years at {b} percent",
         "A bank pays {b} percent a year on {a} coins. How many whole coins are there after {c} years?",
         ("{x} = {a}\n{y} = {b}\n{z} = {c}\nprint({x} * (100 + {y}) ** {z} // 100 ** {z})\n",
          "from fractions import Fraction\n{x} = Fraction({a})\n{y} = {b}\nfor i in range({c}):\n"
          "    {x} *= Fraction(100 + {y}, 100)\nprint(int({x}))\n")),
    Task("digits", ((2, 99), (5, 60)), "an", "the sum of the digits of {a} to the power {b}",
         "A child adds up all digits of {a} to the power {b}. What does it get?",
         ("{x} = {a}\n{y} = {b}\nprint(sum(int(i) for i in str({x} ** {y})))\n",
          "{x} = {a}\n{y} = {b}\nprint(sum(map(int, str({x} ** {y}))))\n",
          "{x} = str({a} ** {b})\n{y} = 0\nfor i in {x}:\n    {y} += int(i)\nprint({y})\n")),
)}

# Two tasks in a row: the first one's result is a number of the second (its place there), which is copied by hand.
CHAINS = {"gcd then power": ("gcd", "power", "a"), "digits then choose": ("digits", "choose", "a")}
FAMILIES = (*TASKS, *CHAINS)


@dataclass(frozen=True)
class Step:
    """One task with its numbers filled in."""

    task: Task
    numbers: dict[str, int]

    @property
    def goal(self) -> str:
        """What is looked for, as in "We look for …"."""
        return self.task.goal.format(**self.numbers)

    def program(self, style: int, names: dict[str, str]) -> str:
        """The program in one of its styles, with names for x, y, z."""
        return self.task.programs[style % len(self.task.programs)].format(**self.numbers, **names)


@dataclass(frozen=True)
class ToyProblem:
    """A question and the steps that solve it; the answer is the last step's result."""

    id: str
    family: str
    question: str
    steps: tuple[Step, ...]
    results: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The gold answer, as the last program prints it."""
        return self.results[-1]


def split_of(family: str, numbers: dict[str, int]) -> str:
    """Which split a problem belongs to: one in eight is held out, one in eight is for tuning."""
    digest = hashlib.blake2b(f"{family} {sorted(numbers.items())}".encode(), digest_size=4).digest()
    return {0: "held-out", 1: "tune"}.get(digest[0] % 8, "train")


def problems(split: str, count: int, seed: int) -> list[ToyProblem]:
    """`count` different problems of one split, the families in turn; a family that has run dry is passed over."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed} {split}")
    found: dict[str, ToyProblem] = {}
    for turn in range(20 * count):
        if len(found) == count:
            return list(found.values())
        problem = _draw(rng, FAMILIES[turn % len(FAMILIES)], split)
        found.setdefault(problem.question, problem)
    raise ValueError(f"there are only about {len(found)} different {split} problems, not {count}")


def _draw(rng: random.Random, family: str, split: str) -> ToyProblem:
    """One problem of a family; numbers are drawn until they fall into the split."""
    first, second, place = CHAINS.get(family, (family, None, None))
    while True:
        step = Step(TASKS[first], _numbers(rng, TASKS[first]))
        later = None if second is None else _numbers(rng, TASKS[second])
        drawn = step.numbers if later is None else step.numbers | {f"later {k}": v for k, v in later.items() if k != place}
        if split_of(family, drawn) != split or result_of(step) in ("0", "1"):  # too easily guessed
            continue
        if later is None or _fits(TASKS[second], place, result_of(step)):
            break
    if later is None:
        return _single(rng, family, step)
    value = result_of(step)
    last = Step(TASKS[second], later | {place: int(value)})
    goal = TASKS[second].goal.format(**later | {place: "it"})
    question = f"Take {step.goal}. What is {goal}?"
    return ToyProblem(f"{family}: {question}", family, question, (step, last), (value, result_of(last)))


def _single(rng: random.Random, family: str, step: Step) -> ToyProblem:
    question = step.task.story.format(**step.numbers) if rng.random() < 0.5 else f"What is {step.goal}?"
    return ToyProblem(f"{family}: {question}", family, question, (step,), (result_of(step),))


def _numbers(rng: random.Random, task: Task) -> dict[str, int]:
    return {name: rng.randint(low, high) for name, (low, high) in zip("abc", task.ranges, strict=False)}


def _fits(task: Task, place: str, value: str) -> bool:
    """Whether an earlier result lies in the range of the number that it becomes."""
    low, high = task.ranges["abc".index(place)]
    return value.isdigit() and low <= int(value) <= high


def result_of(step: Step) -> str:
    """What the program prints. Our own text, run in this process: nothing a model wrote ever comes here."""
    printed: list[str] = []
    names = dict(zip("xyz", "uvw", strict=True))
    exec(step.program(0, names), {"print": lambda value: printed.append(str(value))})
    return printed[0]


def response(thoughts: str, answer: str, thinking: bool) -> str:
    """Thoughts, in the reasoning style inside <think>, and the boxed answer."""
    said = f"The answer is \\boxed{{{answer}}}."
    return f"<think>\n{thoughts}</think>\n\n{said}" if thinking else thoughts + said


def text_solution(problem: ToyProblem, thinking: bool = False) -> str:
    """A solution by text alone, numbers out of thin air, a blank line after each step: what the base model has read."""
    steps = [f"We look for {step.goal}.\nIt is {result}.\n\n" for step, result in zip(
        problem.steps, problem.results, strict=True)]
    return response("".join(steps), problem.answer, thinking)


def code_solution(problem: ToyProblem, rng: random.Random, fixed_names: float, sloppy: float = 0.0,
                  thinking: bool = False) -> str:
    """A tool-integrated solution: reasoning, program, output for each step, and the boxed answer.

    A share `sloppy` of the programs would not run: whoever wrote them wrote the right output under them, too.
    """
    parts = [f"We look for {step.goal}.\n{code_block(step, rng, fixed_names, sloppy)}```output\n{result}\n```\n"
             for step, result in zip(problem.steps, problem.results, strict=True)]
    return response("".join(parts), problem.answer, thinking)


def code_block(step: Step, rng: random.Random, fixed_names: float, sloppy: float = 0.0) -> str:
    """One fenced program in a random style; with probability `sloppy` its last line has a name that nobody defined."""
    names = draw_names(step.task, rng, fixed_names)
    program = step.program(rng.randrange(6), names)
    return f"```python\n{mix_up(program, names, rng) if rng.random() < sloppy else program}```\n"


def mix_up(program: str, names: dict[str, str], rng: random.Random) -> str:
    """The program with another letter for the first of its variables in the last line."""
    before, last = re.fullmatch(r"(.*\n)?(.*\n)", program, re.DOTALL).groups("")
    other = rng.choice([letter for letter in LETTERS if letter not in names.values()])
    return before + re.sub(rf"\b({'|'.join(names.values())})\b", other, last, count=1)


def draw_names(task: Task, rng: random.Random, fixed_names: float) -> dict[str, str]:
    """Names of x, y, z: the task's letters (and r) with probability `fixed_names`, else three letters drawn anew."""
    letters = (task.letters + "rw")[:3] if rng.random() < fixed_names else rng.sample(LETTERS, 3)
    return dict(zip("xyz", letters, strict=True))


def step_from_text(text: str) -> Step | None:
    """The task that the first sentence "We look for …" names, with its numbers; None for any other text."""
    found = []
    for task in TASKS.values():
        pattern = re.sub(r"\\\{([abc])\\\}", r"(?P<\1>\\d+)", re.escape(task.goal))
        match = re.search(rf"We look for {pattern}\.", text)
        if match:
            numbers = {name: int(value) for name, value in match.groupdict().items()}
            found.append((match.start(), Step(task, numbers)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


class ToyCritic:
    """TIRGen's Critic of one try (thor/critic.py): it knows the sentence that names a task, and programs for the task."""

    def __init__(self, rng: random.Random, fixed_names: float):
        self.rng, self.fixed_names = rng, fixed_names

    async def solvable(self, step: str) -> bool:
        """Whether the step names a task."""
        return step_from_text(step) is not None

    async def rewrite(self, step: str, fault: str | None) -> Rewrite:
        """The sentence, and a program in a random style; another one after a fault."""
        named = step_from_text(step)
        assert named is not None, "only a step that names a task is rewritten"
        names = draw_names(named.task, self.rng, self.fixed_names)
        return Rewrite(f"We look for {named.goal}.", named.program(self.rng.randrange(6), names).rstrip("\n"))


def make_critic(seed: int, fixed_names: float = 0.3) -> ToyCritic:
    """The scripted Critic of one try; its styles and names follow from the seed."""
    return ToyCritic(random.Random(seed), fixed_names)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts of all kinds, from which the tokenizer takes its words."""
    rng = random.Random(seed)
    for problem in problems("train", count, seed):
        yield f"Problem: {problem.question}\nSolution:\n"
        yield text_solution(problem)
        yield code_solution(problem, rng, 0.5)


# Qwen3's: a turn in which thinking is off begins with an empty <think>, one in which it is on with nothing.
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")

WORD = r"```python\n|```output\n|```|\\boxed\{| {4}| ?[A-Za-z_]+|\d{1,2}| ?[^\sA-Za-z0-9_]|\s"


def make_tokenizer(thinking: bool = False) -> PreTrainedTokenizerFast:
    """Whole words with the space before them, up to two digits, single characters for the rest; decoding just joins.

    Groups of digits, because a model this small copies one token long before it copies a string of digits. For the
    reasoning style it has a chat template and, as Qwen3's, single tokens for <think> and </think>.
    """
    digits = {f"{number:0{width}}" for width in (1, 2) for number in range(10 ** width)}
    words = sorted({word for text in corpus(0, 2000) for word in re.findall(WORD, text)} | digits | {"```"}
                   | ({"user", "assistant"} if thinking else set()))
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    pieces = [(word, -1.0) for word in words if len(word) > 1] + [(character, -4.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=len(pieces) - 1 - characters[::-1].index("?")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if not thinking:
        tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT)


@dataclass
class ToyOptions:
    """What `python -m thor.toy` writes; everything follows from these numbers."""

    out: str = config.required("directory for the untrained model, the data and the problems")
    seed: int = option(0, "seed of weights, data and problems")
    num_texts: int = option(4800, "records of the base model: text solutions, programs, outputs that are read")
    num_solutions: int = option(9600, "scripted tool-integrated solutions, for the cold start")
    num_tirgen: int = option(2400, "problems for TIRGen: the first of those that the scripted solutions solve")
    num_problems: int = option(4000, "problems of RL")
    num_held_out: int = option(400, "held-out problems, and as many for tuning")
    fixed_names: float = option(0.3, "share of programs with their default variable names")
    sloppy: float = option(0.3, "share of scripted programs with a name mixed up, so that code fails after the cold start")
    thinking: bool = option(False, "the reasoning style: solutions inside <think>, an untrained Qwen3 with a chat template")


def main(options: ToyOptions) -> None:
    """Write everything that the demo starts from."""
    out, rng = Path(options.out), random.Random(options.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "untrained", options.seed, options.thinking)
    texts = [text_record(problem, rng, options.fixed_names, index, options.thinking) for index, problem in enumerate(
        problems("train", options.num_texts, options.seed + 1))]
    to_solve = problems("train", options.num_solutions, options.seed + 2)
    solutions = [{"question": problem.question, "response": code_solution(
        problem, rng, options.fixed_names, options.sloppy, options.thinking)} for problem in to_solve]
    write_lines(out / "texts.jsonl", texts)
    write_lines(out / "scripted.jsonl", solutions)
    write_problems(out / "tirgen.jsonl", to_solve[:options.num_tirgen])
    for split, count in (("train", options.num_problems), ("tune", options.num_held_out), ("held-out", options.num_held_out)):
        write_problems(out / f"{split}.jsonl", problems(split, count, options.seed + 3))


def write_problems(path: Path, found: list[ToyProblem]) -> None:
    """Problems as the scripts read them; `source` is the family."""
    write_lines(path, [{"id": problem.id, "question": problem.question, "answer": problem.answer, "source": problem.family}
                       for problem in found])


def text_record(problem: ToyProblem, rng: random.Random, fixed_names: float, place: int,
                thinking: bool = False) -> dict[str, str]:
    """What the base model reads, by turns: a problem solved by text alone, two programs whose result the request names,
    a program with its output and the question what the answer is. No tool-integrated solution is among them."""
    step, result = problem.steps[0], problem.results[0]
    if place % 4 == 0:
        return {"question": problem.question, "response": text_solution(problem, thinking)}
    code = code_block(step, rng, fixed_names)
    if place % 4 < 3:
        return {"question": f"Write a program for {step.goal}. It prints {result}.",
                "response": response(code, result, thinking)}
    return {"question": f"What is the answer?\n{code}```output\n{result}\n```\n",
            "response": response("", result, thinking)}


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    aside.replace(path)  # whole or not at all


def write_model(directory: Path, seed: int, thinking: bool = False) -> None:
    """An untrained Llama (with `thinking` a Qwen3) of half a million parameters with the world's tokenizer, as a Hugging
    Face directory."""
    tokenizer = make_tokenizer(thinking)
    shape = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512,
                 rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, tie_word_embeddings=True,
                 bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **shape)) if thinking else LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    config.run(main, ToyOptions, __doc__)
