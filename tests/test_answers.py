r"""The rules of thor/answers.py, each with what it must find and what it must not let through, both ways round."""

import random
import re
from fractions import Fraction

import pytest

from thor.answers import MAX_CHARACTERS, UNITS, normalise, question
from thor.reward import equivalent

# Rule: (answers that it makes equal, answers that a careless one would).
RULES = {
    "matrices": ([
        (r"\left[\begin{array}{c}1\\2\end{array}\right]", r"\begin{bmatrix}1\\2\end{bmatrix}"),
        (r"3\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}3\\6\end{pmatrix}"),
        (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ], [
        (r"[\begin{array}{cc}1&2\end{array}]", r"[\begin{array}{c}1\\2\end{array}]"),
        (r"|\begin{array}{cc}1&0\\0&5\end{array}|", r"(\begin{array}{cc}1&0\\0&5\end{array})"),
        (r"|\begin{array}{cc}1&0\\0&5\end{array}|", r"\begin{pmatrix}1&0\\0&5\end{pmatrix}"),
        (r"[\begin{array}{cc|c}1&0&2\end{array}]", r"\begin{pmatrix}1&0&2\end{pmatrix}"),
        (r"\left\{\begin{array}{c}1\\2\end{array}\right.", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left(\begin{array}{c}5\\2\end{array}\right)", "10"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    ]),
    "units": ([
        (r"5\text{ sq. cm.}", r"5\text{ cm}^2"), (r"5\text{ cm squared}", r"5\text{ cm}^{2}"),
        (r"5\text{ cubic feet}", r"5\text{ ft}^3"), (r"5\text{ feet per second}", r"5\text{ ft/s}"),
        (r"5\text{ ft/sec}", r"5\,\mathrm{ft}/\mathrm{s}"), ("5 miles per hour", r"5\text{ mph}"),
        (r"5\text{ lbs}", r"5\text{ pounds}"), (r"5\text{ kph}", r"5\text{ km/h}"), (r"5\text{ L}", r"5\text{ liters}"),
        (r"5\text{ m/s}^2", r"5\text{ meters per second squared}"), (r"\frac{5}{2}\text{ min.}", r"2.5\text{ minutes}"),
        (r"5\text{ in.}", r"5\text{ inches}"), (r"3\text{ cm}, 4\text{ cm}", "3,4"), (r"2 \text{hrs}", "2"),
    ], [
        (r"5\text{ m}", r"5\text{ min}"), (r"5\text{ m}^2", r"5\text{ m}^3"), (r"5\text{ m}", r"5\text{ mi}"),
        (r"5\text{ ms}", r"5\text{ m}"), (r"5\text{ ms}", r"5\text{ s}"), (r"5\text{ in}", r"5\text{ min}"),
        (r"5\text{ square m}", r"5\text{ m}"), (r"5\text{ square m}", r"5\text{ cubic m}"), ("5 km", "5 mi"),
        (r"5\text{ m/s}", r"5\text{ m}"), (r"5\text{ m/s}", r"5\text{ m/s}^2"), (r"5\text{ m/s}", r"5\text{ s/m}"),
        (r"5\text{ m}/\text{s}", r"5\text{ m}\cdot\text{s}"), (r"5\text{ s}^{-1}", r"5\text{ s}"),
        (r"5\text{ mph}", r"5\text{ km/h}"), (r"5\text{ miles}", r"5\text{ mph}"), (r"5\text{ M}", r"5\text{ m}"),
        (r"5\text{ MB}", r"5\text{ Mb}"), (r"5\text{ L}", r"5\text{ lb}"), (r"5\text{ mL}", r"5\text{ L}"),
        (r"5\text{ squared}", "5"), (r"5\text{ factorial}", "5"), (r"5\text{ tenths}", "5"), ("2ft", "2"), ("2 h", "2"),
        (r"2\text{ ft }3\text{ in}", r"2\text{ ft}"), (r"2\text{ ft }3\text{ in}", "5"), (r"2\mathrm{a}", "2"),
        (r"5\text{ cm},3\text{ m}", r"5\text{ m},3\text{ cm}"), (r"5\text{ cm},3", r"5,3\text{ cm}"),
        (r"5\text{ m}\times3\text{ m}", "15"), (r"1\text{ in }6", "1"), (r"10\text{ a.m.}", r"10\text{ m}"),
    ]),
    "percent": ([
        (r"37.5\%", r"37\frac{1}{2}\%"), (r"0.5\%", r"\frac12\%"), (r"16.\overline{6}\%", r"16\frac23\%"),
        (r"\text{50\%}", r"50\text{ percent}"),
    ], [
        (r"12.5\%", "12.5"), (r"5+10\%", r"15\%"), (r"5-10\%", r"-5\%"), (r"10\%,20\%", r"10,20\%"),
        (r"0.5\%", r"50\%"), (r"\frac{1}{2}\%", r"\frac{1}{2}"), (r"20\text{ percent}", "0.2"), (r"-5\%", r"5\%"),
        (r"66\frac{2}{3}\%", r"66.7\%"), (r"\$5", r"5\%"), (r"5\%\text{ increase}", r"5\%\text{ decrease}"),
    ]),
    "repeating decimals": ([
        (r"1.2\overline{34}", r"\frac{611}{495}"), (r"-0.\overline{3}", r"-\frac13"), (r"0.\bar{3}", r"\frac13"),
        (r"0.\overline{9}", "1"), (r".\overline{81}", r"\frac{9}{11}"),
    ], [
        ("1/3", "0.333"), (r"0.3\overline{3}", "0.3"), (r"0.\overline{3}", "0.3333333333"), (r"0.\overline{3}5", "1/3"),
        (r"0.\overline{12}", r"0.\overline{21}"), (r"0.\overline{x}", "0"), (r"0.\overline3", r"0.\overline4"),
        (r"0.\dot{3}", "0"), (r"\overline{23}", "23"), (r"1,0.\overline{3}", r"10.\overline{3}"),
        (r"2\,0.\overline{3}", r"2\frac{1}{3}"), (r"0.\overline{36}", r"\frac{9}{25}"), (r"\overline{3+4i}", "3+4i"),
    ]),
    "bases": ([
        ("FF_{16}", r"\text{FF}_{16}"), (r"12_{\text{seven}}", "12_7"), ("0101_2", "101_2"), ("b=12_7", "12_7"),
        ("(12)_{7}", r"12_{\text{base seven}}"), (r"12_{\text{base}7}", "(12)_7"),
    ], [
        ("101_2", "101_3"), ("FF_{16}", "255"), ("a_{12}", "A_{12}"), ("a_1", "A_1"), ("12_5+1", "13"),
        ("n=65_7", "65"),
        ("12_5", "12_{15}"), ("10_12", "10_{12}"), (r"1101_2", r"1101_{\text{ten}}"), ("n=65_7", "m=65_7"),
        (r"101_{\text{two}}", "101"), (r"101_{\text{foo}}", "101"), ("-101_2", "-101"), ("101.1_2", "101.1"),
        ("x_{12}", "x_1"), ("32_{b}", "32_{c}"), ("3_{4}5", "35_4"),
    ]),
    "inequalities": ([
        ("x>3", r"x\in(3,+\infty)"), ("3<x", r"(3,\infty)"), (r"x\geqslant 3", r"[3,\infty)"), ("4>x>=1", "[1,4)"),
        (r"\theta>\frac{\pi}{2}", r"\left(\frac{\pi}{2},\infty\right)"), ("x<1 or x>2", "x>2 or x<1"),
        (r"x<1\text{ or }2<x", r"x\in(-\infty,1)\bigcup(2,\infty)"), (r"-\sqrt2<x<\sqrt2", r"(-\sqrt{2},\sqrt{2})"),
    ], [
        ("[2,3]", "2<x<3"), ("2<x<3", "(2,3]"), ("x>3", "(3,4)"), ("y>3", "x>3"), ("x>3", r"y\in(3,\infty)"),
        ("x>3", r"[3,\infty)"), ("x>3", r"(-\infty,3)"), ("2<x<3", "2,3"), ("2<x<3", r"\{2,3\}"), ("4<x<1", "(4,1)"),
        ("4<x>1", "(1,4)"), ("x>3 or x<1", "(1,3)"), ("x>3, x<5", "(3,5)"), ("2x>6", r"(6,\infty)"), ("x>3", "3"),
        ("x<1 or x=2", r"(-\infty,1)"), (r"x<5\text{ and }x<7", r"(-\infty,7)"), ("x>0", "x"), ("x><3", r"(3,\infty)"),
        (r"x<\frac13", r"(-\infty,0.333)"), ("x>a", r"(b,\infty)"), (r"x\notin(1,2)", "(1,2)"), ("x>3!", r"(3,\infty)"),
        (r"1<x<2\text{ or }3<x<4", "(1,2),(3,4)"), (r"x\in[1,2]\cup\{5\}", "[1,2]"), (r"x>3\%", r"(3,\infty)"),
        ("x>3 or y<1", r"(-\infty,1)\cup(3,\infty)"), (r"x>0, x\neq 1", r"(0,\infty)"), ("|x|>3", r"(3,\infty)"),
        ("(1,2)", "(2,1)"), ("[5,2]", "[7,3]"), ("[3,2)", "[5,4)"),
    ]),
    "plus or minus": ([
        (r"\pm2i", "2i,-2i"), (r"\{\pm1,\pm2\}", "1,2,-1,-2"), (r"x=2\pm\sqrt3", r"2+\sqrt3,2-\sqrt3"),
        (r"x=\pm2", "x=2,x=-2"), (r"(\pm1,2)", "(1,2),(-1,2)"),
        (r"\frac{1\pm\sqrt5}{2}", r"\frac{1}{2}\pm\frac{\sqrt5}{2}"),
    ], [
        (r"\pm2", "-2"), (r"1\pm2\pm3", r"1\pm2\pm4"), (r"1\pm2\pm3", "1"), (r"1\pm2\pm3", "6,-4"),
        (r"\pm1\pm2", "1,-1"),
        (r"\pm1,\pm2", "1,2"),
        (r"(\pm1,2)", "(1,2)"), (r"2\pm\sqrt3", r"\sqrt3\pm2"), (r"5\pm0.1", "5"), (r"x\pm y", "x+y"), (r"\pm0", "0"),
        (r"\pm3\%", r"3\%"), (r"2\pm1", r"2\mp1,x"),
    ]),
    "complex constants": ([
        (r"2\,\mathrm{i}", "2i"), (r"\frac{1+i}{1-i}", "i"), ("(1+i)^2", "2i"), (r"\sqrt{-4}", "2i"), ("i^2", "-1"),
        (r"2e^{i\pi/2}", "2i"), (r"\cos\frac{\pi}{3}+i\sin\frac{\pi}{3}", r"e^{i\pi/3}"),
        ("0.5+0.5i", r"\frac{1+i}{2}"),
        (r"\sqrt{3+2\sqrt2}+i", r"1+\sqrt2+i"), ("0.1i", r"\frac{i}{10}"),
    ], [
        ("i", "1"), ("i", "-i"), ("2i", "2"), (r"\frac{1}{i}", "i"), ("ni", "-n/i"), ("a_i", "a"), ("2+i", "2-i"),
        ("-ik", r"\frac{k}{i}"), ("x^2i^2", "-x^2"), ("10^{30}+i", "10^{30}+2i"), ("10^{20}+i", "10^{20}+1+i"),
        (r"10^{-20}i", r"2\cdot10^{-20}i"), ("1+10^{-20}i", "1"), ("0.333+i", "1/3+i"), ("1+i\\sqrt3", "1+1.732i"),
        (r"e^{i\pi/3}", r"e^{-i\pi/3}"), ("I", "i"), ("2i", "2j"), ("i,1", "-i,1"), ("3+4i", "5"), ("(i,1)", "(-i,1)"),
        (r"\frac{1+i}{0}", r"\frac{2+i}{0}"), ("2+3i", "(2,3)"),
    ]),
    "text": ([
        (r"\text{(A), (D)}", "A,D"), (r"\text{A and D}", "D, A"), (r"\text{A}, \text{D}", "D,A"),
        (r"\texttt{yes}", "yes"),
        (r"\left(\text{C}\right)", "C"), ("(x,y,z)=(1,2,3)", "(1,2,3)"), (r"\text{\$}5.50", "5.5"),
        (r"\emptyset", r"\{ \}"),
    ], [
        (r"\text{A,D}", "A"), (r"\text{A,D}", "(A,D)"), ("(A,D)", "(D,A)"), ("A,A", "A"), ("A,A,B", "A,B,B"),
        (r"\text{A or D}", "A,D"),
        ("AD", "A,D"), ("A,D", "a,d"), ("(x,y)=(4,1)", "(1,4)"), ("(x,y)=(4,1)", "(y,x)=(4,1)"), (r"2\mathit{x}", "2"),
        ("(x,y)=(4,1)", "(a,b)=(4,1)"), ("(x,y)=(4,1)", "4,1"), ("(x,y)=(4,1)", "(4,1,0)"),
        ("(x,y)=(4,1,0)", "(4,1,0)"), ("x=1,y=2", "(2,1)"),
        (r"5\text{-}6", "-1"), (r"\bar{x}", "x"), (r"\mathbf{R}", r"\mathbb{R}"), (r"x_{\text{a}}", r"x_{\text{b}}"),
    ]),
    "small numbers in lists": ([
        (r"(1,10^{-20})", r"(1,\frac{1}{10^{20}})"),
    ], [
        ("(1,10^{-20})", r"(1,2\times10^{-20})"), ("1,10^{-20}", r"1,2\times10^{-20}"),
        ("[0,10^{-20}]", r"[0,2\times10^{-20}]"),
        (r"\begin{pmatrix}10^{-20}\\2\end{pmatrix}", r"\begin{pmatrix}0\\2\end{pmatrix}"),
    ]),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_finds_what_it_is_there_for(rule):
    missed = [(gold, answer) for gold, answer in RULES[rule][0]
              if not (equivalent(gold, answer) and equivalent(answer, gold))]
    assert missed == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_lets_nothing_else_through(rule):
    taken = [(gold, answer) for gold, answer in RULES[rule][1] if equivalent(gold, answer) or equivalent(answer, gold)]
    assert taken == []


@pytest.mark.parametrize("gold, answer, verdict", [
    ("5", "05", True), ("5", "6", False), ("5", "", False), ("", "", False), (r"\text{Yes}", "yes", True),
    ("yes", "no", False), ("101_2", "(101)_2", True), ("101_2", "5", False), ("A,D", "D,A", True),
    ("A,D", "A,B", False),
    (r"50\%", "50", False), ("1", "1" * (MAX_CHARACTERS + 1), False),
])
def test_where_the_text_tells_nobody_is_asked(gold, answer, verdict):
    assert question(gold, answer) is verdict


@pytest.mark.parametrize("gold, answer, asked", [
    ("1/2", "0.5", ("1/2", "0.5")),
    (r"\frac52\text{ min}", r"2.5\text{ minutes}", (r"\frac{5}{2}", "2.5")),
    (r"37.5\%", r"37\frac12\%", ("37.5", r"37\frac{1}{2}")),
    ("3<x", "[3,4]", (r"(3,\infty)", "[3,4]")),
    (r"1\pm\sqrt2", "1,2", (r"1+\sqrt2,1-\sqrt2", "1,2")),
    (r"0.1\overline{6}", "1/6", (r"\frac{1}{6}", "1/6")),
])
def test_what_the_library_is_asked(gold, answer, asked):
    assert question(gold, answer) == asked


def test_a_repeating_decimal_is_the_limit_of_its_digits():
    """Against the decimals themselves: the fraction of n digits differs from it by less than 10^-n."""
    noise = random.Random(0)
    for _ in range(200):
        whole, fixed, period = (str(noise.randrange(10 ** noise.randint(1, 4))) for _ in range(3))
        found = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", normalise(rf"{whole}.{fixed}\overline{{{period}}}"))
        digits = (fixed + period * 40)[:40]
        error = Fraction(int(found[1]), int(found[2])) - int(whole) - Fraction(int(digits), 10 ** 40)
        assert 0 <= error < Fraction(1, 10 ** 40) or set(period) == {"9"}


def test_no_two_units_share_a_spelling():
    for alias, unit in UNITS.items():
        others = {other for other in UNITS.values() if other != unit and "/" not in other + unit}
        assert question(rf"5\text{{ {alias}}}", rf"5\text{{ {unit}}}") in (True, ("5", "5"))
        same = [other for other in others if question(rf"5\text{{ {alias}}}", rf"5\text{{ {other}}}") is not False]
        assert same == []


def test_exchanging_gold_and_answer_exchanges_the_question():
    """On texts of the tables with a character lost here and there."""
    noise, texts = random.Random(0), [text for found, _ in RULES.values() for pair in found for text in pair]
    for _ in range(3000):
        gold, answer = noise.choice(texts), noise.choice(texts)
        cut = noise.randrange(len(gold))
        gold = gold[:cut] + gold[cut + 1:]
        one, other = question(gold, answer), question(answer, gold)
        assert other == (one if isinstance(one, bool) else one[::-1]), (gold, answer)


@pytest.mark.parametrize("piece", ["(", "{", "\\text{", "1,", "1 ", "x>", "a b ", "\\pm", "0.\\overline{", "A, "])
def test_degenerate_repetition_is_answered_at_once(piece):
    """That is, at all: a pattern that backtracked for each start and end would not finish 1000 characters."""
    assert isinstance(question("5", (piece * MAX_CHARACTERS)[:MAX_CHARACTERS]), (bool, tuple))
