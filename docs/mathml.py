"""A hook of MkDocs: formulas become MathML, which browsers show without any script."""

import html
import re

from latex2mathml.converter import convert


# What pymdownx.arithmatex makes of $formula$ and $$formula$$, and the marks behind it.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,:;)]*)', flags=re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(formula: re.Match[str]) -> str:
    tag, latex, marks = formula.groups()
    display = "inline" if tag == "span" else "block"
    mathml = convert(html.unescape(latex).strip(), display=display)
    # style.css keeps a line from ending between the two.
    return f'<{tag} class="formula">{mathml}{marks}</{tag}>'
