"""``labkit`` whose measuring processes are the stand-ins of `compare_fakes`: everything else is real."""

import functools
import sys
from pathlib import Path

from labkit.cli import main
from labkit.measure import compare

WORKER = (sys.executable, str(Path(__file__).with_name("compare_fakes.py")))

if __name__ == "__main__":
    compare.compare = functools.partial(compare.compare, _worker=WORKER)
    sys.exit(main.main())
