"""The tutorial runs as it stands, and prints what it shows."""

import contextlib
import io
import json
import pathlib
import re

import matplotlib
import numpy as np

PATH = pathlib.Path(__file__).parent.parent / "examples" / "tutorial.ipynb"
NUMBER = re.compile(r"\d+\.\d\d")  # errors and their CI; not seconds, nor what is rounding


def test_every_cell_runs_and_prints_what_it_shows():
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    names, compared = {}, 0
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), names)
        shown = "".join("".join(out.get("text", "")) for out in cell["outputs"] if "text" in out)
        found, expected = (NUMBER.findall(text) for text in (printed.getvalue(), shown))
        assert NUMBER.sub("", printed.getvalue()).split()[:3] == NUMBER.sub("", shown).split()[:3]
        # Other processors round otherwise, and 5,000 iterations later that is seen.
        np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=0.25, atol=0.02)
        compared += len(found)
    assert compared >= 8


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in json.loads(PATH.read_text())["cells"])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) >= 4
    assert all(link.startswith("https://") or (PATH.parent / link).is_file() for link in links)
