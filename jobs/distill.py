"""Train a student on a trajectory set: Ray Train with DeepSpeed, one worker a GPU.

    ray job submit --working-dir jobs -- python distill.py --config configs/digits-distill.yaml

The flags are those of `ddray distill`. Submitted again, it goes on from what is written;
`ray job stop` leaves it so.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
