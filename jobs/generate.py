"""Generate pairs to label. What it needs is run first; submitted again, it goes on where it was.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/generate.py CONFIG.yaml [--set KEY=VALUE]
"""

import sys

from relevance_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
