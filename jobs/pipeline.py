"""The pipeline job as a plain script: python jobs/pipeline.py key=value ..."""

import sys

from graftstack.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
