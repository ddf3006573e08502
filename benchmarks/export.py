"""Print the runs of a figure in marl-eval's JSON format.

python -m benchmarks.export returns > returns.json

marl-eval wants as many seeds and evaluations of every algorithm and task: name a figure whose runs
have that.
"""

import json
import sys
from pathlib import Path

from benchmarks.results import ManifestError, load_manifest, marl_eval

if __name__ == "__main__":
    try:
        figures = load_manifest(Path(__file__).with_name("runs.yaml")).figures
        if sys.argv[1:2] == [] or sys.argv[1] not in figures:
            raise ManifestError(f"name one of the figures: {', '.join(figures)}")
    except ManifestError as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    json.dump(marl_eval(figures[sys.argv[1]]), sys.stdout, indent=1)
