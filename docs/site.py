"""What mkdocs.yml needs beyond options: README.md is the front page, and a link to a file that is no page becomes its name."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    """Add README.md as index.md, in which docs/ is the folder at hand."""
    front = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=front))
    return files


def on_page_markdown(markdown, page, config, files):
    """A file of the repository that is no page of the site has no link, but a name."""

    def link(found: re.Match) -> str:
        words, target = found.groups()
        path = target.partition("#")[0]
        outside = (ROOT / path if page.file.src_uri == "index.md" else ROOT / "docs" / path).exists()
        return words if outside and path and not files.get_file_from_path(path) else found[0]

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)]+)\)", link, markdown)
