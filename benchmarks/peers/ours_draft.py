"""This server with DRAFT_DECODING.

python -m benchmarks.peers.ours_draft PORT WORKLOAD PROCESSES
"""

import os
import sys

from benchmarks.peers import ours

if __name__ == "__main__":
    os.environ["DRAFT_DECODING"] = "true"
    ours.main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
