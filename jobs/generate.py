"""Make a set of images from a student: Ray Data, or the replicas of Ray Serve.

    ray job submit --working-dir jobs -- python generate.py --config configs/digits-generate.yaml

The flags are those of `ddray generate`. Submitted again, it goes on from what is written;
`ray job stop` leaves it so.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
