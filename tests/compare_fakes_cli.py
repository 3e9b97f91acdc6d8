"""``labkit`` whose measuring processes are the stand-ins of `compare_fakes`: everything else is real."""

import functools
import sys
from pathlib import Path

from labkit import cli, comparison

WORKER = (sys.executable, str(Path(__file__).with_name("compare_fakes.py")))

if __name__ == "__main__":
    comparison.compare = functools.partial(comparison.compare, _worker=WORKER)
    sys.exit(cli.main())
