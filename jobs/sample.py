"""Fill a trajectory set from a teacher: Ray Data, one actor a GPU.

    ray job submit --working-dir jobs -- python sample.py --config configs/digits-sample.yaml

The flags are those of `ddray sample`. Submitted again, it goes on from what is written;
`ray job stop` leaves it so.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
