"""Put students behind HTTP on the cluster, for as long as the job runs: Ray Serve.

    ray job submit --no-wait --working-dir jobs -- python serve.py --student s3://YOUR+BUCKET/run/student

The flags are those of `ddray serve`. `ray job stop` lets what was begun be
answered, then ends the service.
"""

import sys

from ddray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
