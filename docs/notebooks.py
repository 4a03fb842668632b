"""A hook of MkDocs: notebooks become pages, without a kernel and without outputs."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig, **_: object) -> Files:
    """Adds a page beside each notebook, which stays as a file to download."""
    for file in [*files]:
        if file.src_uri.endswith(".ipynb") and file.abs_src_path:
            cells = json.loads(Path(file.abs_src_path).read_text("utf-8"))["cells"]
            content = "\n\n".join(map(_as_markdown, cells))
            name = file.src_uri.replace(".ipynb", ".md")
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Leads links from pages to notebooks to their pages."""
    markdown = re.sub(r"\]\(([\w/-]+)\.ipynb\)", r"](\1.md)", markdown)
    if page.file.src_uri.startswith("notebooks/"):
        notebook = Path(page.file.src_uri).with_suffix(".ipynb").name
        markdown += f"\n\n[Download this notebook]({notebook})\n"
    return markdown


def _as_markdown(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
