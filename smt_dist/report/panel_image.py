"""Draw one matplotlib panel as an image for an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def svg_image(name: str, draw: Callable[[Axes], None], height: float = 3.2) -> str:
    """Draw one panel as an ``<img>`` that holds its SVG.

    An SVG is sharp at any zoom, and inside an ``<img>`` it can't run scripts.

    Args:
        name: the element's id; it isn't escaped, so it must not come from user input.
        draw: draws on the axes passed to it.
        height: in inches.

    Returns:
        The HTML of the ``<img>`` element.
    """
    figure, buffer = Figure(figsize=(9, height), layout="constrained"), io.BytesIO()
    draw(figure.add_subplot())
    with rc_context({"svg.hashsalt": name}):  # equal plots give equal files
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img id="{name}" alt="{name}" width="100%" src="data:image/svg+xml;base64,{content}">'
