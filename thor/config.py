"""Options of the scripts: a flat dataclass beside the code that reads them becomes the command line.

Each field is one flag, its `help` metadata the explanation; `-` and `_` are both taken. What is wrong with the user's
input is a ValueError (or an OSError) anywhere below, and becomes one sentence and exit code 2 here and nowhere else.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser

Options = TypeVar("Options")
Defaults = dict[str, str | int | float | bool | None]  # by the name of a field


def option(default: str | int | float | bool | None, text: str) -> dataclasses.Field:
    """A dataclass field with its default and its line of help. A default of None is an option that may be left out."""
    return dataclasses.field(default=default, metadata={"help": text})


def required(text: str) -> dataclasses.Field:
    """A dataclass field that the command line must give."""
    return dataclasses.field(metadata={"help": text})


def several(text: str) -> dataclasses.Field:
    """A field of type list[str] that takes one value or more after its flag: --name A B C. Empty by default."""
    return dataclasses.field(default_factory=list, metadata={"help": text})


def parse(options_class: type[Options], description: str, argv: list[str] | None = None,
          defaults: Callable[[Options], Defaults] | None = None) -> Options:
    """The command line as an instance of `options_class`; unknown or malformed flags end the program with code 2.

    `defaults` is given the options and may name other defaults; a flag on the command line goes before them.
    """
    parser = HfArgumentParser(options_class, description=description.strip())
    if defaults is not None:
        parser.set_defaults(**defaults(parser.parse_args_into_dataclasses(argv)[0]))
    return parser.parse_args_into_dataclasses(argv)[0]


def check_device(device: str) -> None:
    """ValueError for a --device that is none, or that torch does not find on this machine."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be cpu or cuda")
    import torch  # here: tables and comparisons read options, too, and need none
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and torch finds no CUDA device on this machine")


def save(options: Options, path: Path) -> None:
    """Write the resolved options as JSON, so that a result can be traced to what made it."""
    path.write_text(json.dumps(dataclasses.asdict(options), indent=2) + "\n")


def run(main: Callable[[Options], None], options_class: type[Options], description: str,
        argv: list[str] | None = None, defaults: Callable[[Options], Defaults] | None = None) -> None:
    """Parse, call `main`, and turn a user's mistake into one sentence on stderr and exit code 2."""
    try:
        main(parse(options_class, description, argv, defaults))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was written is kept", file=sys.stderr)
        sys.exit(130)
