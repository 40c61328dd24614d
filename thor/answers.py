r"""Final answers as text: one spelling for what is spelled in several ways, and what math-verify may be asked.

`question` says that two answers are the same or not, or hands on a pair for math-verify, rewritten where the library
would misread it, behind guards for what it calls equal and is not. The rulings are those of thor/reward.py. Invariant:
every rule is told by the text alone, treats both sides alike, and what it does not recognise it leaves as it is.
Where in doubt, not equal.
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 1000  # what is longer is no answer
INTEGER = re.compile(r"-?\d+")
LETTERS = re.compile(r"[A-Z](?:,[A-Z])+")

# A number in groups of three: 1{,}000, 1\,000, 1 000, 11,\! 111. Plain commas are left to the library.
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,\s*\\!\s*|\\!,\s*|\{,\}|\\[,;: ]|~|\s)\d{3})+(?!\d)")
WRAPPER = re.compile(r"\\(?:text(?:it|bf|rm|sf|tt|sl|up|normal)?|mbox|hbox|emph|math(?:rm|it|sf))\s*\{(?![Td]\})")
# An array in round or square brackets is a matrix; not one in bars, nor one with a rule between its columns.
ARRAY = re.compile(r"(?:\(|(\[))\s*\\begin\{array\}\{[lcr ]*\}(.*?)\\end\{array\}\s*(?(1)\]|\))", re.DOTALL)
REPEATING = re.compile(r"(?<![\d.,])(?<!\d\s)(\d{1,3}(?:,\d{3})+|\d*)\.(\d*)\\(?:overline|bar)\{(\d+)\}(?!\d)")

# What the library overlooks: both answers have it or neither.
MARKS = [re.compile(pattern) for pattern in (
    r"%|percent", r":", r"\.\.\.|\\[lcd]?dots", r"\\neq?(?![a-z])|\\not(?![a-z])|≠", r"mod",
    r"\\(?:sin|cos|tan|cot|sec|csc).*(?:circ|°)",
    r"\b(?:or|more|less|fewer|least|most|than|not|(?:ten|hundred|thousand|[mbtr]*illion)(?:th)?s?|dozen|half"
    r"|squared|cubed|factorial)\b")]
# What it drops so that nothing is left to compare: then only the same text is the same answer.
DROPPED = [re.compile(pattern) for pattern in (
    r"\d\D*\\text\{[^}]*\}\s*\d",  # 3 hours 20 minutes, 10 (mod 7)
    r"(?<![_^\d])\d+\s+\d", r"'|′", r"^(?:[<>≤≥]|\\[lg](?:eq?|t)(?![a-z]))",  # 4 2 is 6, f' is f, \le 5 is 5
    r"\\pm|\\mp", r"\.\d*\\(?:overline|bar|dot)", r"\d\)?_")]  # 1\pm2\pm3 is 1, a bad 0.\overline{x} is 0, 12_5+1 is 13

UNIT = re.compile(r"\s*\\text\{[~\s]*([^{}]*?)\s*\}(?:\s*\^\s*\{?(-?\d+)\}?)?"
                  r"|(?<=\d)\s+([A-Za-z]{2,}(?:[ /][A-Za-z]+)*)$")
ALIASES = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yds yard", "mi": "mile", "s": "sec secs second",
    "min": "mins minute", "h": "hr hrs hour", "g": "gram", "kg": "kgs kilogram", "lb": "lbs pound", "oz": "ounce",
    "L": "l liter litre", "mL": "ml milliliter millilitre", "mi/h": "mph", "km/h": "kph kmh kmph", "yr": "yrs year",
    "degree": "deg", "day": "", "week": "", "month": "", "unit": "", "dollar": "", "cent": ""}
UNITS = {alias: unit for unit, aliases in ALIASES.items() for alias in (unit, *aliases.split())}
POWERS = ((r"(?:square|sq) (\S+)|(\S+) squared", "2"), (r"(?:cubic|cu) (\S+)|(\S+) cubed", "3"))

BASED = re.compile(r"(?:\(([\dA-Fa-f]+)\)|([\dA-Fa-f]+))_(?:(\d)|\{?(?:\\text\{)?(?:base)?\}?([a-z]+|\d+)\}*)")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "eleven": 11, "twelve": 12, "sixteen": 16}

RELATION = re.compile(r"(<=?|>=?|≤|≥|\\[lg](?:eq?(?:slant)?|t)(?![A-Za-z]))")
VARIABLE = re.compile(r"[a-df-hj-zA-Z]|\\(?:alpha|beta|gamma|lambda|mu|omega|phi|theta)")  # but e and i
OR = re.compile(r"\\text\{\s*or\s*\}|\bor\b|\\(?:lor|vee)(?![a-z])")
NUMERIC = re.compile(r"(?:[\d.+\-*/^(){}\s]|\\(?:frac|sqrt|pi|infty|ln|log|cdot|times)(?![A-Za-z])|e(?![A-Za-z]))+")
PERCENTAGE = re.compile(r"(-?(?:[\d./{}()]|\\(?:frac|sqrt|pi)(?![A-Za-z]))+)\\?%")  # no sum: 5+10% is not 15%
NAMES = re.compile(r"\(([A-Za-z](?:,[A-Za-z])+)\)=")


def question(gold: str, answer: str) -> bool | tuple[str, str]:
    """Whether `answer` means what `gold` means, if the text tells; else the two texts for math-verify to compare."""
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    gold, answer = normalise(gold), normalise(answer)
    if gold == answer or not gold or not answer:
        return gold == answer != ""
    if _words(gold) and _words(answer):
        return _words(gold) == _words(answer)
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):  # most pairs
        return int(gold) == int(answer)
    if LETTERS.fullmatch(gold) and LETTERS.fullmatch(answer):
        return sorted(gold) == sorted(answer)
    gold, answer = _unnamed(gold, answer), _unnamed(answer, gold)
    if _based(gold) or _based(answer):
        return _based(gold) == _based(answer)
    (gold, unit), (answer, other_unit) = _split_unit(gold), _split_unit(answer)
    gold, answer = _intervals(gold, answer)
    gold, answer = _percentages(gold, answer)
    gold, answer = _two_values(gold), _two_values(answer)
    if unit and other_unit and unit != other_unit or not comparable(gold, answer):
        return False
    return gold, answer


def normalise(text: str) -> str:
    """What two spellings of one answer share. Nothing here may make different answers equal."""
    text = text.strip().strip("$").strip().replace("−", "-").replace("\\varnothing", "\\emptyset")
    text = re.sub(r"(?<!\.)\.$", "", text)
    text = re.sub(r"\\boxed\s*\{(.*)\}$", r"\1", text)
    text = _as_text(text)
    text = re.sub(r"\\\\\[-?[\d.]+\s*(?:pt|mm|cm|em|ex|in)\]", r"\\\\", text)  # space between rows
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?=\s*[()\[\]|.\\])\s*", "", text)
    text = ARRAY.sub(r"\\begin{pmatrix}\2\\end{pmatrix}", text)
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # 3 1/2 would be read as a product
    text = re.sub(THOUSANDS, lambda number: re.sub(r"\D", "", number[0]), text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)e(\d+)(?![\w.])|(?<![\w.])(\d+\.\d+)e(-\d+)(?![\w.])",
                  r"\1\3\\times 10^{\2\4}", text)  # 7e37, 1.5e-3; but 2e-3 is 2e less 3
    text = re.sub(r"\\!|(?<!\\)\\[,;: ]", " ", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text).replace("\\dfrac", "\\frac")
    if re.search(r"\d", text) and not re.search(r"[<>]|\\[lg]e", text):  # a list of solutions, not of conditions
        text = re.sub(r"\s*\\text\{\s*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", "", text)
    text = REPEATING.sub(_fraction, text)
    text = re.sub(r"(^|[(\[,])\+(?=\\infty)", r"\1", text.replace("\\bigcup", "\\cup")).replace("\\{\\}", "\\emptyset")
    return _choices(text)


def _as_text(text: str) -> str:
    r"""Words in \text, whatever they were in; what is no word, bare: \text{\$}5, \text{40\%}, \text{x}."""
    text = WRAPPER.sub(lambda found: "\\text{", text)
    text = re.sub(r"\\text\{([\d\s.,%$\\]*)\}", r"\1", text)
    text = re.sub(r"\s*(?:\\text\{\s*percent(?:age)?\s*\}|\bpercent)$", r"\\%", text)
    text = re.sub(r"\\text\{\s*([abcefijknp-rt-z])\s*\}", r"\1", text)  # but m, g, h, s, l, o: units or nothing
    return re.sub(r"(\\text\{[^{}]*)\}\s*/\s*\\text\{", r"\1/", text)


def _fraction(number: re.Match[str]) -> str:
    r"""The fraction that a repeating decimal is: of 0.1\overline{6}, \frac{1}{6}."""
    whole, fixed, period = number[1].replace(",", "") or "0", number[2], number[3]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _choices(text: str) -> str:
    r"""The letter of (B), \text{(B)}, \mathbf{B}; letters in one \text, or each in its own, as a list: B,D."""
    letter = re.fullmatch(r"\(?(?:\\(?:text|mathbf)\{)?\s*\(?([A-Za-z])\)?\s*\}?\)?", text)
    bare = re.sub(r"\\(?:text|mathbf)\{|\}", "", text)
    if re.fullmatch(r"\s*(?:[A-Z]|\([A-Z]\))(?:\s*(?:,(?:\s*and\b)?|\band\b)\s*(?:[A-Z]|\([A-Z]\)))+\s*", bare):
        return ",".join(re.findall(r"[A-Z]", bare))
    return letter[1] if letter else text


def _words(text: str) -> str | None:
    """The answer in lower case if it is a word or a phrase, bare or as text; None for mathematics."""
    found = re.fullmatch(r"(?:\\(?:text|mathbf)\{)?\s*([A-Za-z][A-Za-z .,'-]*[A-Za-z])\s*[.]?\s*\}?", text)
    phrase = " ".join(found[1].lower().split()) if found else ""
    return phrase if re.search(r"[a-z]{2}", phrase) else None


def _unnamed(text: str, other: str) -> str:
    """Without a name that the other answer lacks: n = 65_7, (x, y) = (4, 1)."""
    if "=" in other:
        return text
    name, names = re.match(r"[A-Za-z]=(?!=)", text), NAMES.match(text)
    if names and _is_tuple(text[names.end():]) and len(_elements(text[names.end() + 1:-1])) == len(names[1].split(",")):
        return text[names.end():]
    return text[name.end():] if name and "=" not in text[name.end():] and "," not in text else text


def _based(text: str) -> tuple[int, int] | None:
    r"""Value and base of a number written in a base: 101_2, (101)_2, 3\text{F}_{16}, 12_{\text{base five}}."""
    text = re.sub(r"\\text\{([A-F]+)\}|\s+", r"\1", text)
    found = BASED.fullmatch(text)
    if not found or re.search(r"_\d\d", text):  # 10_23 is 10_2 times 3
        return None
    digits, name = found[1] or found[2], found[3] or found[4]
    base = int(name) if name.isdigit() else BASES.get(name, 0)
    if not 2 <= base <= 16 or digits.isalpha() and not digits.isupper():  # a_{12} is a variable
        return None
    return (int(digits, base), base) if all(int(digit, 16) < base for digit in digits) else None


def _split_unit(text: str) -> tuple[str, str]:
    r"""The text without the units that we know, and all of its units, "" where there are none: 5 km, 90^\circ, \$5.
    In a list, commas before a unit say whose it is."""
    found, kept = [], text
    for match in reversed([match for match in UNIT.finditer(text) if match.start()]):
        power = f"^{match[2]}" if match[2] else ""
        unit, known = _unit((match[1] or match[3] or "") + power)
        if known or not match[3]:
            found.insert(0, "," * (len(_elements(text[:match.start()])) - 1) + unit)
        if known and re.match(r"$|,|\\\}$", text[match.end():]):
            kept = kept[:match.start()] + kept[match.end():]
    found += ["degree"] * ("circ" in text or "°" in text) + ["dollar"] * ("\\$" in text)
    return kept, " ".join(filter(None, found))


def _unit(text: str) -> tuple[str, bool]:
    """One spelling of a unit, and whether all of it is in our table: of square meters per second, m^2/s."""
    parts, known = [], True
    for part in re.split(r"\bper\b|/", text.replace(".", " ").replace("²", "^2").replace("³", "^3")):
        part = " ".join(part.split())
        for pattern, power in POWERS:
            part = re.sub(f"^(?:{pattern})$", lambda found, power=power: f"{found[1] or found[2]}^{power}", part)
        name, *power = part.split("^")
        names = [word if len(word) < 3 or word in UNITS else word.lower() for word in name.split()]
        names = [word if word in UNITS or len(word) < 4 else word.removesuffix("s") for word in names]
        known = known and len(names) == 1 and names[0] in UNITS
        parts.append("^".join([" ".join(UNITS.get(word, word) for word in names), *power]))
    return "/".join(parts), known


def _intervals(gold: str, answer: str) -> tuple[str, str]:
    """Inequalities as the intervals they are, if both answers are either and name no two variables."""
    sets = [_set(text) for text in (gold, answer)]
    if None in sets or not RELATION.search(gold + answer):
        return gold, answer
    (variable, gold_set), (other_variable, answer_set) = sets
    if variable and other_variable and variable != other_variable:
        return gold, answer
    return gold_set, answer_set


def _set(text: str) -> tuple[str, str] | None:
    r"""Variable ("" if it has none) and interval, or union of intervals, of x > 3, x\in(3,\infty), x < 1 or x > 2."""
    named = re.fullmatch(rf"({VARIABLE.pattern})\\in(?![A-Za-z])\s*(.*)", text)
    body = named[2] if named else text
    if all(_is_tuple(piece) and len(_elements(piece[1:-1])) == 2 for piece in body.split("\\cup")):
        return (named[1] if named else "", body)
    found = [_interval(piece) for piece in OR.split(text)]
    if None in found or len({variable for variable, _ in found}) > 1:
        return None
    return found[0][0], "\\cup".join(interval for _, interval in found)


def _interval(text: str) -> tuple[str, str] | None:
    """Variable and interval of one inequality, x > 3 or 1 < x <= 2, whose ends are numbers; None for anything else."""
    parts = [part.strip() for part in RELATION.split(text)]
    less = re.match(r"<|≤|\\l", parts[1]) if len(parts) > 1 else None
    if len(parts) == 3 and VARIABLE.fullmatch(parts[0]):
        parts = ["-\\infty" if less else "\\infty", "<" if less else ">", *parts]
    elif len(parts) == 3:
        parts += ["<" if less else ">", "\\infty" if less else "-\\infty"]
    if len(parts) != 5 or bool(re.match(r"<|≤|\\l", parts[3])) != bool(less):
        return None
    low, below, variable, above, high = parts if less else parts[::-1]
    if not (VARIABLE.fullmatch(variable) and NUMERIC.fullmatch(low) and NUMERIC.fullmatch(high)):
        return None
    if all(re.fullmatch(r"-?\d+(?:\.\d+)?", end) for end in (low, high)) and float(low) >= float(high):
        return None  # empty: (4,1) is a point
    closed = [bool(re.search(r"=|≤|≥|e", sign)) for sign in (below, above)]
    return variable, f"{'(['[closed[0]]}{low},{high}{')]'[closed[1]]}"


def _percentages(gold: str, answer: str) -> tuple[str, str]:
    r"""What stands before the percent signs, if both are percentages: \frac{1}{2}% and 0.5%."""
    found = [PERCENTAGE.fullmatch(text) for text in (gold, answer)]
    return (found[0][1], found[1][1]) if all(found) else (gold, answer)


def _two_values(text: str) -> str:
    r"""The list in which each element with one \pm is two."""
    elements = _elements(text)
    if "\\pm" not in text or "\\mp" in text or any(element.count("\\pm") > 1 for element in elements):
        return text
    return ",".join(element.replace("\\pm", sign) for element in elements
                    for sign in ("+-" if "\\pm" in element else "+"))


def comparable(gold: str, answer: str) -> bool:
    """False where math-verify would find two answers equal that are not: the rulings of thor/reward.py."""
    if any(bool(mark.search(gold)) != bool(mark.search(answer)) for mark in MARKS):
        return False
    if any(dropped.search(text) for dropped in DROPPED for text in (gold, answer)):
        return False
    if _is_tuple(gold) != _is_tuple(answer):
        return False
    return _same_length(_elements(gold), _elements(answer)) and _letters(gold, answer) == _letters(answer, gold)


def _is_tuple(text: str) -> bool:
    """Whether it is written as (a, b), [a, b), …: a point or an interval, not a list or a set."""
    text = re.split(r"=|\\in\b", text)[-1].strip()
    return text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(_elements(text)) == 1 < len(_elements(text[1:-1]))


def _elements(text: str) -> list[str]:
    """The elements of a list: cut at commas outside brackets that separate no thousands."""
    text = re.sub(r"(?<!\d)(\d{1,3})((?:,\d{3})+)(?!\d)", lambda found: found[0].replace(",", ""), text)
    text = text.strip().removeprefix("\\{").removesuffix("\\}")
    depth, elements = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _same_length(gold: list[str], answer: list[str]) -> bool:
    """Whether two lists can be equal: the library drops what is there twice."""
    twice = len(set(gold)) < len(gold) or len(set(answer)) < len(answer)
    return len(gold) == len(answer) and (not twice or sorted(gold) == sorted(answer))


def _letters(text: str, other: str) -> set[str]:
    """The variables of an answer, which the library takes for units (2h is 2) or whose case it drops; not those of a
    name before "=" that the other answer lacks, nor e and i, which may be numbers."""
    if "=" not in other:
        text = re.sub(r"(^|,)[^=,]*=", r"\1", text)
    if "\\in" not in other:
        text = re.sub(r"^.*\\in(?![a-z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|begin|end)\{[^}]*\}", "", text)
    text = re.sub(r"(?<=\d)\s+[A-Za-z]{2,}$", "", text)
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|sqrt|infty", "", text))) - {"e", "i"}
