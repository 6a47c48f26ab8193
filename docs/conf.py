"""Sphinx's configuration: Markdown pages, and an API reference made from docstrings. `make docs` builds it; warnings are errors."""

from __future__ import annotations

import annbatch

project = "annbatch"
author = "the annbatch authors"
version = release = annbatch.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"annbatch {release}"
# pages link to headings of others by the text of the heading
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# `name` in a docstring is a link where there is such a name, and code where there is none
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the signature of the source and in the sections of the docstring
numpydoc_show_class_members = False
