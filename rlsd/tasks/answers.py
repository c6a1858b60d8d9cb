"""Where a text states its answer: a tag, the #### of GSM8K, a box, or all after the thoughts.

Every reader goes over a text a fixed number of times, whatever it holds: a policy may well repeat a
mark ten thousand times.
"""

import math
import re

BOX = re.compile(
    r"(?P<box>\\{1,3}(?:boxed|fbox)\s*\{)|\\{1,3}(?:boxed|fbox)\s+(?P<bare>-?\d[\d,./]*)|\\.|"
    r"(?P<brace>[{}])", re.DOTALL
)
# What introduces an answer after ####, as a heading of its own or on the same line.
LABEL = re.compile(r"\W{0,4}(?:the )?(?:final )?answer\b(?: is\b)?[\s:*]*", re.IGNORECASE)


def as_text(value):
    """A solution that is a number as its text: 42 for 42.0, as pandas writes whole numbers of a
    column with gaps; None, no solution, for what is not finite, the gaps."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    return None if value in (None, []) else str(value)


def tagged(text):
    """What the last <answer>...</answer> holds, or None."""
    opened = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if opened < 0:
        return None
    opened += len("<answer>")
    return text[opened : text.find("</answer>", opened)]


def last_boxed(text):
    r"""What the last \boxed{...} or \fbox{...} holds, to any depth of braces, or None.

    Escaped braces do not count; a number may follow without any, as at times in MATH.
    """
    opened, found, last = [], None, -1
    for mark in BOX.finditer(text):
        if mark["box"] or mark["brace"] == "{":
            opened.append((mark.end(), mark["box"]))
        elif mark["brace"] and opened:
            start, boxed = opened.pop()
            if boxed and start > last:
                found, last = text[start : mark.start()], start
        elif mark["bare"]:
            found, last = mark["bare"].rstrip(",./"), mark.end()
    return None if found is None else found.strip()


def readings(text):
    """What the one place that states a text's answer may mean, the most literal reading first.

    The place is the last <answer>...</answer>, else what follows the last ####, else the last box,
    else all (after the thoughts). A box inside of it is opened; what follows #### is read by its
    first line too, without a label such as "Final answer". There is one place, so that a text
    cannot state two answers.
    """
    found, place = [], tagged(text)
    if place is None:
        place = text
    else:
        found.append(place.strip())
    _, after_mark, after = place.rstrip("# \n").rpartition("####")  # a heading may be closed
    if after_mark:
        place = after.strip()
        found.append(place)
    box = last_boxed(place)
    if box is not None:
        found.append(box)
    elif after_mark:
        label = LABEL.match(place)
        for rest in (place, place[label.end() :] if label else ""):
            found.append(rest.partition("\n")[0].strip())
    if not found:
        found.append(text.rpartition("</think>")[2].strip() or text.strip())
    return list(dict.fromkeys(filter(None, found))) or [""]


def final_answer(text):
    """The plainest reading of the answer that a text states."""
    return readings(text)[-1]


def states(text, solution):
    """Whether a text's answer is the solution, character for character, or its last answer."""
    if text.strip() == solution.strip():
        return True
    return not {solution.strip(), *readings(solution)}.isdisjoint(readings(text))


def stated(text):
    """Readings of an answer in words: where nothing marks it, also what follows "answer is"."""
    found = readings(text)
    said = SAID.findall(found[-1])
    return [*found, *said[-1:]]


SAID = re.compile(r"answer(?: is|:)[ *:]*([^\n]*)", re.IGNORECASE)
# A number with words for units after it, or a currency before; thousands apart by spaces or commas.
QUANTITY = re.compile(
    r"\\?\$?\s?(?P<number>[-+]?(?:\d{1,3}(?:(?:[ ,~]|\\[,! ])\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?)"
    r"\s?(?P<unit>(?:[^\W\d_]{2,}[²³.]?|\\?%|°)(?:[\s/^]+(?:[^\W\d_]+[²³.]?|[23](?!\d)))*)?\.?"
)
WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{|[{}]")
SPACES = re.compile(r"(?:\s|~|\\[,;:! ])+")
# Names that stand for mathematics and for no word.
FORMAL = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi max min mod "
    "gcd lcm det lim and or inf infty infinity".split()
)
LETTERS = re.compile(r"[^\W\d_](?:\s?(?:[,;]|and|or|\s)\s?[^\W\d_])+")


def quantity(text):
    """The number of an answer such as 10 dollars, \\$10 or 1 000, as digits; else None."""
    text = SPACES.sub(" ", WRAPPERS.sub("", text)).strip(" *")
    found = QUANTITY.fullmatch(text)
    if not found or not found["number"].strip("+-"):
        return None
    unit = found["unit"] or ""
    if set(re.findall(r"[^\W\d_]+", unit.lower())) & FORMAL:
        return None
    number = re.sub(r"[ ,~]|\\[,! ]", "", found["number"])
    return number + "\\%" if "%" in unit else number


def wording(text):
    """An answer as the words that it says: no markup, case or space counts."""
    text = SPACES.sub(" ", WRAPPERS.sub("", text.replace("$", " "))).casefold()
    return re.sub(r"\s?([,;])\s?", r"\1 ", text.strip(" *\"'`.!?:;()[]\\"))


def is_wording(text):
    """Whether an answer is said in words (east, BADC, "B, A, C") rather than in mathematics.

    Between dollars or \\(, \\[ it is mathematics, unless it is wrapped in \\text.
    """
    if any(mark in text for mark in ("$", "\\(", "\\[")) and "\\text" not in text:
        return False
    said = wording(text)
    if quantity(text) is not None:
        return False
    if LETTERS.fullmatch(said):
        return True
    words = set(re.findall(r"(?<![\\\w])[^\W\d_]{2,}(?![\w(^])", said)) - FORMAL
    return bool(words) and not re.search(r"[=+*/^_<>\\]", said)
