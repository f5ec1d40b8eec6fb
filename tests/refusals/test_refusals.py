# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every example of the page is refused as the page says, and what it says to write instead runs."""

import pytest

from tests.refusals.page import PAGE, groups, page
from tests.refusals.refusal import error_of

ENTRIES = {f"{heading}: {entry.title}": entry for heading, entries in groups().items() for entry in entries}


@pytest.mark.parametrize("title", ENTRIES)
def test_is_refused(title):
    entry = ENTRIES[title]
    error = entry.raised()
    assert isinstance(error, entry.error), f"{type(error).__name__}: {error}"
    missing = [text for text in entry.mentions if text not in str(error)]
    assert not missing, f"the message lacks {missing}: {error}"
    assert len(str(error)) < 1000


@pytest.mark.parametrize("title", [title for title, entry in ENTRIES.items() if entry.instead])
def test_what_to_write_instead_runs(title):
    error = error_of(ENTRIES[title].instead)
    assert error is None, f"{type(error).__name__}: {error}"


def test_page_is_written_from_the_entries():
    assert PAGE.read_text() == page(), "run `python -m tests.refusals`"


def test_titles_are_unique_and_examples_short():
    titles = [entry.title for entries in groups().values() for entry in entries]
    assert len(set(titles)) == len(titles)
    long = {title for title, entry in ENTRIES.items() if len(entry.code().splitlines()) > 8}
    assert not long
