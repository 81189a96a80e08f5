"""The sweep job as a plain script: python jobs/sweep.py key=value ..."""

import sys

from graftstack.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
