"""One word per thing: words that docs, messages and docstrings no longer use."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("flags/**/*.flags"),
    *ROOT.glob("maml/**/*.py"),
    *ROOT.glob("examples/*.py"),
    *ROOT.glob("benchmarks/*.py"),
]
# {a retired word: the one to use}
RETIRED = {
    r"\b(go|goes|gone|going) on with\b": "resume, or continue",
    r"\b(tell|tells|told) apart\b": "classify",
    r"\bone's own\b": "custom, or your own",
    r"\b_?[Rr]efus(e|es|ed|al|als)(?!\()": "check, reject",
    r"\b[Mm]end(s|ed)?\b": "fix",
    r"[,;] needed (?!for|by|to|in |=)": "expected X, got Y",
    r"\b(Give|Drop) it\.": "a sentence that says what to do, or none",
    r"since not given": "defaults (paper)",
    r"figure is worth": "evaluation protocol",
    r"\bCheck the rights\b|\bthe rights\b": "permissions",
    r"(?<![\d.\w])\.\d+ [±%]": "a leading zero",
}


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_stays_away(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(word, line)
    ]
    assert not found, f"say {RETIRED[word]}:\n" + "\n".join(found)


def test_docstrings_begin_with_what_something_is_or_does():
    first = re.compile(r'^\s*(?:r|f)?"""(What|Where|Of|As) ', re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in PAGES
        if path.suffix == ".py"
        for match in first.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
