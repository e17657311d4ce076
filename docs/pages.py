"""What the site has beside the pages of docs/: the README as its home page, and the tutorial.

A hook of MkDocs, see mkdocs.yml. Links are written for the repository, where every file can be reached. On
the site, those to files outside docs/ become links to the repository, whose address is in CITATION.cff
(`repository-code`), or plain text where there is none yet; quoted code gets its file as a title.
"""

import base64
import json
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
HOME, TUTORIAL = "index.md", "tutorial.md"
PAGES = {"README.md": HOME, "docs/README.md": HOME, "examples/tutorial.ipynb": TUTORIAL}
LINK = re.compile(r"(!?\[(?:[^][]|\[[^]]*\]\([^)]*\))*\])\(([^)\s]+)\)")
QUOTED = re.compile(r"^```(\w+) (\S+)$", re.MULTILINE)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def on_config(config: MkDocsConfig) -> None:
    """Takes the repository's address from where `setup.py` does."""
    found = re.search(r"^repository-code: \"?(.+?)/?\"?$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    config.repo_url = found and found[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the two pages that lie elsewhere, and the tutorial's pictures."""
    home = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, HOME, content=_for_site(home, "", config)))
    text, pictures = _notebook(ROOT / "examples" / "tutorial.ipynb")
    files.append(File.generated(config, TUTORIAL, content=_for_site(text, "examples", config)))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page of docs/ as the site has it."""
    if page.file.src_uri in (HOME, TUTORIAL):
        return markdown
    return _for_site(markdown, "docs", config)


def _for_site(text: str, folder: str, config: MkDocsConfig) -> str:
    """A page that lies in `folder` of the repository, with links for the site."""

    def link(found: re.Match) -> str:
        label, target = found.groups()
        if "](" in label:  # a picture that is a link
            label = LINK.sub(link, label[1:-1]).join("[]")
        if re.match(r"\w+:|#", target) or (folder == "examples" and target.startswith("tutorial_")):
            return f"{label}({target})"
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif config.repo_url is None:
            return label.lstrip("!")[1:-1]
        else:
            kind = "raw" if path.endswith(".png") else "blob"
            path = f"{config.repo_url}/{kind}/HEAD/{path}"
        return f"{label}({path}{hash_}{anchor})"

    return QUOTED.sub(r'```\1 title="\2"', LINK.sub(link, text))


def _notebook(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
            elif shown := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(f"```text\n{ESCAPE.sub('', shown).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
