"""Statistics of real images, with which generated ones are compared.

    ray job submit --working-dir jobs -- python reference.py s3://YOUR+BUCKET/real --out s3://YOUR+BUCKET/r.npz

The flags are those of `ddray reference`. A job that is stopped goes on where it was.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["reference", *sys.argv[1:]]))
