"""Sphinx settings: guides in Markdown, the API from docstrings. `make docs` builds them and fails on a warning."""

import os
import re
from pathlib import Path

import sdkernels

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = {  # what stands elsewhere on a forge and is a page of this site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/repro/report.md": "report.md",
}

project = "sdkernels"
author = "the sdkernels authors"
release = version = sdkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "py:obj"
html_theme = "furo"
html_title = f"sdkernels {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_use_ivar = True


def plain_bars(app, what, name, obj, options, lines):
    """In docstrings |S| is a size, not a substitution of reStructuredText."""
    for at, line in enumerate(lines):
        lines[at] = re.sub(r"\|(\w+)\|", r"\\|\1\\|", line)


def on_this_site(text, directory):
    """Markdown whose relative links, right where its file lies, are made right for a page of this site."""

    def link(match):
        label, path, anchor = match.groups()
        target = (directory / path).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        if target.is_dir():
            return label
        page = PAGES.get(target.relative_to(ROOT).as_posix()) or os.path.relpath(target, DOCS)
        return f"[{label}]({page}{anchor or ''})"

    return re.sub(r"\[([^]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)", link, text)


def links_of_page(app, docname, content):
    """Of a page of docs/."""
    content[0] = on_this_site(content[0], DOCS)


def links_of_included(app, path, docname, content):
    """Of a document that a page of docs/ includes whole."""
    content[0] = on_this_site(content[0], (DOCS / path).parent)


def setup(app):
    """Connect all of it."""
    app.connect("autodoc-process-docstring", plain_bars, priority=400)
    app.connect("source-read", links_of_page)
    app.connect("include-read", links_of_included)
