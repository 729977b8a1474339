"""Read and check the data, and split it by query.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/prepare.py CONFIG.yaml [--set KEY=VALUE]
"""

import sys

from relevance_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "prepare")
    main()
