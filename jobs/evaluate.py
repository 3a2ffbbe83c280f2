"""How good a student is beside its teacher, or anyone's images, with a report.

    ray job submit --working-dir jobs -- python evaluate.py --config configs/digits-evaluate.yaml

The flags are those of `ddray evaluate`. A job that is stopped goes on where it was.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
