"""docs/log.md: dated, newest first, one paragraph each, and every figure in a file it links to."""

import re
from pathlib import Path

import pytest

LOG = Path(__file__).parents[1] / "docs" / "log.md"
_, *PARTS = re.split(r"^## ", LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
ENTRIES = dict(part.split("\n", 1) for part in PARTS)


def test_entries_are_dated_newest_first():
    assert len(ENTRIES) == len(PARTS)
    dates = [re.fullmatch(r"(\d{4}-\d\d-\d\d): .+", heading)[1] for heading in ENTRIES]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("heading", ENTRIES)
def test_an_entry_is_a_paragraph_backed_by_its_files(heading):
    text = ENTRIES[heading].strip()
    assert "\n\n" not in text
    links = [LOG.parent / link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)]
    assert [link for link in links if not link.is_file()] == []
    backing = " ".join(link.read_text(encoding="utf-8") for link in links)
    words = re.sub(r"\]\([^)]*\)", "]", text)
    figures = re.findall(r"\b\d+\.\d+(?:e-\d+)?%?|\b\d{3,}(?= ms| against)", words)
    assert [figure for figure in figures if figure not in backing] == []


def test_links_into_results_find_their_heading():
    results = (LOG.parent / "results.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", results, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    used = set(re.findall(r"results\.md#([\w-]+)", LOG.read_text(encoding="utf-8")))
    assert used and used <= anchors
