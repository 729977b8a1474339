"""The student behind HTTP."""
