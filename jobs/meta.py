"""The meta job as a plain script: python jobs/meta.py key=value ..."""

import sys

from graftstack.cli import main

if __name__ == "__main__":
    sys.exit(main(["meta", *sys.argv[1:]]))
