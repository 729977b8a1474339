"""The one data-parallel loop, and the tasks that plug into it."""
