# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Words that are never right in this project, because they are figures of speech or have another name here."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_apd"

_AMOUNTS = "bytes|figures?|gradients?|networks?|minutes?|ms|MB|GB|one|seconds?|steps?"
_UNITS = "chain|datum|draw|epoch|input|second|step|weight"
#: Patterns, and what to write instead. Only patterns without false alarms; case does not matter.
WORDS = {
    r"anew": "again",
    r"dear(?:er|est|ly)?": "expensive, more expensive",
    r"do(?:es)? not do(?=[.,;:\"])": "fails, is not enough",
    r"fellows?|fellow_ranks": "peer_ranks, other chains",
    rf"(?:{_AMOUNTS}) an? (?:{_UNITS})": "per chain, per draw, per second",
    r"for ever": "indefinitely, any number of",
    r"for want of": "for lack of, without",
    r"goes_with": "set_peers",
    r"ha(?:s|ve) (?:its|their) say": "checks",
    r"hopeful": "candidate",
    r"in passing|pass(?:es)? by": "while draws are made",
    r"last_good": "checkpoint",
    r"laws?(?! of (?:large|total))": "distribution",
    r"by heart": "memorised",
    r"looks? whether": "checks whether",
    r"looks_together": "checks_in_sync",
    r"mend(?:s|ed|ing)?": "fix",
    r"nought": "zero",
    r"(?:is|are) of no (?:use|avail)": "does not help",
    r"quieten(?:s|ed|ing)?": "reduce",
    r"rivals?": "baseline",
    r"speaks? against": "limits, contradicts",
    r"stretch(?:es)?": "segment",
    r"the whole way": "the full demo, from end to end",
    r"what is held out": "held-out draws",
    r"wish(?:es)?": "options",
}
# A phrase may go on in the next line, which begins with ``#`` in a comment.
PHRASES = {words.replace(" ", r"\s+(?:#\s*)?"): instead for words, instead in WORDS.items()}
PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in PHRASES), flags=re.IGNORECASE)


def problems(text):
    """Line, words and replacement of everything in a text that should not be written."""
    for match in PATTERN.finditer(text):
        # Looks at the text after the match, too, which a pattern may mention.
        instead = next(
            right for wrong, right in PHRASES.items() if re.match(wrong, text[match.start() :], re.IGNORECASE)
        )
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def found(paths):
    return [
        f"{path.relative_to(ROOT)}:{line}: {words!r}; write: {instead}"
        for path in paths
        for line, words, instead in problems(path.read_text())
    ]


def texts(folder, *endings):
    return sorted(path for path in folder.rglob("*") if path.suffix in endings)


def test_docs_are_in_plain_words():
    pages = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
    pages += texts(ROOT / "docs", ".md", ".py") + texts(ROOT / "tutorials", ".py")
    assert not found(pages)


def test_the_package_is_in_plain_words():
    assert not found(texts(PACKAGE, ".py", ".jinja"))


def test_no_replacement_is_itself_on_the_list():
    assert not [right for right in WORDS.values() if PATTERN.search(right)]


def test_phrases_are_found_over_lines_and_in_names():
    text = "one step a draw\n# It goes on for\n# ever, by the law of total variance.\nclass Wishes: fellows = None"
    assert list(problems(text)) == [
        (1, "step a draw", "per chain, per draw, per second"),
        (2, "for # ever", "indefinitely, any number of"),
        (4, "Wishes", "options"),
        (4, "fellows", "peer_ranks, other chains"),
    ]
