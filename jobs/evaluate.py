"""Compare a student with its teacher, and write the report.

    ray job submit --working-dir jobs -- python evaluate.py --config configs/digits-evaluate.yaml

The flags are those of `ddray evaluate`. It writes at its end, so a job that is
stopped begins anew.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
