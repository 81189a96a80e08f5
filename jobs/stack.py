"""The stack job as a plain script: python jobs/stack.py key=value ..."""

import sys

from graftstack.cli import main

if __name__ == "__main__":
    sys.exit(main(["stack", *sys.argv[1:]]))
