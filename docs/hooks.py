"""A hook for MkDocs: it changes links that lead out of docs/, and no text."""

from __future__ import annotations

import posixpath
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page: Any, config: MutableMapping[str, Any], **_: Any) -> str:
    """Return the page with new targets for links that leave docs/. In the repository they lead to files, as on GitHub."""

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target.partition("#")[0]))
        if place.startswith("docs/") or not (ROOT / place).exists():
            return match[0]  # MkDocs checks it
        if place == "README.md":
            return f"[{text}]({posixpath.relpath('index.md', posixpath.dirname(page.file.src_uri) or '.')})"
        repository = config["extra"]["repository"]
        return f"[{text}]({repository}/blob/main/{place})" if repository else text

    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)", link, markdown)
