"""The leak probe: answers to the bare question that betray a hint which only the teacher was shown.

The rule. An answer leaks if it contains a marker verbatim, case and all, or, with phrases, if one
of PHRASES matches it (any case, white space folded) that does not match the text of its question:
a question may itself speak of a given answer. Every answer counts once, and the leak rate is the
share of answers that leak. It is counted on answers sampled without the hint, so that an honest
answer has nothing to refer to; a phrase in a thought counts like one in the answer.
"""

import re

# What one says of a text that was handed over; "the solution is" and "the answer is" stay free.
_HANDED = r"(?:provided|given|supplied|official|known|expected|hidden|privileged)"
_NO_CHOICE = r"(?! (?:choices?|options?|format|set|type))"
PHRASES = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    r"\breference (?:solution|answer|derivation|proof|response|text|context)s?\b",
    r"\b(?:answer|solution) key\b",
    r"\bground[- ]truth (?:answer|solution)\b|\bgold(?:en)? (?:answer|solution)\b",
    rf"\bthe {_HANDED} (?:answer|solution|hint|derivation|proof)\b{_NO_CHOICE}",
    r"\b(?:according to|as per|consistent with|in line with|agrees? with|match(?:es|ing)?) the "
    r"(?:solution|reference|hint)\b",
    r"\bas (?:shown|given|stated|provided|indicated|described|derived|seen) in the "
    r"(?:solution|answer|reference|hint)\b",
    r"\bthe (?:solution|hint|reference) (?:says|states|mentions|tells|indicates|confirms|above)\b",
    r"\b(?:i was|we were|i am|we are|i have been|we have been) (?:given|told|shown) the "
    r"(?:answer|solution)\b",
))


def leaks(text, markers, question=None):
    """Whether an answer leaks; question: the text that PHRASES are held against, None for none."""
    if any(marker in text for marker in markers):
        return True
    if question is None:
        return False
    text, question = (" ".join(t.split()) for t in (text, question))
    return any(p.search(text) and not p.search(question) for p in PHRASES)


def leak_rate(texts, markers, questions=None):
    """Share of texts that leak; questions: one per text, None to look for markers alone."""
    asked = [None] * len(texts) if questions is None else questions
    found = [leaks(t, markers, q) for t, q in zip(texts, asked, strict=True)]
    return sum(found) / max(1, len(found))


def leak_metrics(rollout, config, name):
    """{name: leak rate} of sampled completions, or {} where nothing is looked for."""
    if not config.leak_markers and not config.leak_phrases:
        return {}
    questions = None
    if config.leak_phrases:
        questions = [question_text(row["prompt"]) for row in rollout.rows]
    return {name: leak_rate(rollout.texts, config.leak_markers, questions)}


def question_text(prompt):
    """All that the student reads: the prompt, or the contents of its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
