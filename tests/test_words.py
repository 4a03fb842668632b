"""Pages and docstrings are in the plain English of a methods section: short sentences, one
spelling, and none of the phrases that have to be read twice."""

import ast
import json
import re
from pathlib import Path

import pytest

import jaxbkgd


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "pages").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "pages").rglob("*.ipynb"))
# Longer ones are two, in every case so far.
MOST_WORDS = 36

# Archaic words, people that are things, and subjects that the reader has to look for.
PHRASES = re.compile(
    r"\b(be it|without a word|anew|whoever|thereof|therein|thereby|upon|shall|all else)\b"
    r"|\b(movie|file|array|estimator|key)s? of (yours|ours|theirs)\b"
    r"|\b(library|program|package|competitor|file|movie|one|what) (who|is off)\b"
    r"|\b(is|are) no (movie|file|calibration|estimator|range|box|boxes|camera)\b"
    r"|\b(it|there) is what\b|\bwhat (it|they|there) (is|are) of\b|\bor so one would\b"
    # "What is linear leaves ...", "Of several channels the ...", "It is ... that is".
    r"|(?-i:^(What|Whatever|Of)) (?!.*\?$)"
    # One spelling, the British one.
    r"|\b(colors?|centers?|gray|neighbor\w*|behaviors?|(micro|nano)meters?|favor\w*)\b"
    r"|\b(normal|initial|real|recogn|minim|maxim|summar)iz(e|es|ed|ing)\b",
    re.IGNORECASE,
)
END = re.compile(r"(?<=[.?!])(?<!e\.g\.)(?<! al\.) (?=[A-Z\"(x]|smlmlp|jaxbkgd)|[:;] ")


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown text, without code, formulas and tables."""
    text = re.sub(r"^( *)(```|\$\$).*?^\1\2 *$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|^ *\|.*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "x", text)
    text = re.sub(r"!?\[([^]]*)\](\([^)]*\)|\[[^]]*\]|: .*)", r"\1", text)
    blocks = re.split(r"\n\s*\n|^#+ .*$|^ *(?:[-*]|\d+\.) ", text, flags=re.M)
    joined = (" ".join(block.replace("*", "").split()) for block in blocks if block)
    return [sentence for block in joined for sentence in END.split(block) if sentence]


def faults(text: str) -> list[str]:
    """The sentences that are too long, or have a phrase that is not to be."""
    return [
        sentence
        for sentence in sentences(text)
        if len(sentence.split()) > MOST_WORDS or PHRASES.search(sentence)
    ]


OTHERS = [ROOT / "README.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda page: page.name)
def test_a_page_is_read_once(page: Path):
    assert faults(page.read_text("utf-8")) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_read_once(notebook: Path):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert faults("\n\n".join(texts)) == []


# The others are a list, and a page that a script writes.
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.stem != "changelog"],
    ids=lambda page: page.name,
)
def test_a_page_begins_with_its_use(page: Path):
    assert re.match(r"# .+\n\n(After this page you|This page) ", page.read_text("utf-8"))


@pytest.mark.parametrize("file", sorted((ROOT / "jaxbkgd").rglob("*.py")), ids=str)
def test_docstrings_of_public_names_are_read_once(file: Path):
    texts = []
    for node in ast.parse(file.read_text("utf-8")).body:
        is_named = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_named and hasattr(jaxbkgd, node.name):
            parts = (node, *node.body)
            named = [p for p in parts if isinstance(p, ast.ClassDef | ast.FunctionDef)]
            texts += [ast.get_docstring(part) or "" for part in named]
    assert [fault for text in texts for fault in faults(text)] == []
