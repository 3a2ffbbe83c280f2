"""Store the features of captions, for sets that are made of them again and again.

    ray job submit --working-dir jobs -- python encode.py s3://YOUR+BUCKET/a.parquet --out s3://YOUR+BUCKET/a

The flags are those of `ddray encode`. Submitted again, it goes on from what is written.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
