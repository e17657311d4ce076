"""Makes an entry of `maml/weights/` of a run folder: `python -m benchmarks.pack_weights RUN NAME`.

Takes the best validated checkpoint (`--checkpoint=newest`, `--test_iter=N`: another), which must have been
tested: its results, with their protocols, go into the entry. `--out=DIR` writes elsewhere. The next wheel
of the checkout has it.
"""

import argparse
import pathlib

from maml.runs import shipped
from maml.runs.files import test_settings
from maml.runs.load import trained
from maml.tables.pretrained import FOLDER


def main() -> None:
    """Packs the run that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("name")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--checkpoint", default="best", choices=("best", "newest"))
    parser.add_argument("--test_iter", type=int)
    asked = parser.parse_args()
    choice = f"--test_iter={asked.test_iter}" if asked.test_iter else f"--checkpoint={asked.checkpoint}"
    settings = test_settings(asked.run, [choice])
    algorithm, iteration = trained(settings, from_run=True)
    path = shipped.pack(algorithm, settings, iteration, asked.name, asked.out)
    weights = path.with_suffix(shipped.ENDING)
    print(f"wrote {path} and {weights.name}, {weights.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
