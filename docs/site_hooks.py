"""What the site changes in pages that were made from docstrings."""

import re


def on_page_content(html: str, **_: object) -> str:
    """Show the roles of Sphinx that docstrings have (:meth:`name`) as code."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>(?:~)?", "<code>", html)
