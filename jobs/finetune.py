"""The finetune job as a plain script: python jobs/finetune.py key=value ..."""

import sys

from graftstack.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
